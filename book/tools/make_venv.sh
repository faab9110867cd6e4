#!/usr/bin/env bash
# make_venv.sh DIR: create a virtual environment from Python 3.12 or newer.
set -euo pipefail
venv=$1

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null
}

for python in ${PYTHON:-} python3.12 python3.13 python3.14 python3 python; do
    if new_enough "$python"; then
        echo "making $venv with $("$python" --version) ($(command -v "$python"))"
        if ! "$python" -m venv "$venv"; then
            rm -rf "$venv"
            echo "error: $python could not make a virtual environment." >&2
            echo "       On Debian or Ubuntu the package python3-venv is missing." >&2
            exit 1
        fi
        exit 0
    fi
done
echo "error: attnlab needs Python 3.12 or newer, and none was found on the PATH." >&2
echo "       Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2
exit 1
