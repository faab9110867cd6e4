#!/usr/bin/env bash
# install.sh DIR EXTRAS: install attnlab, editable, with these extras into the environment DIR.
# uv does it in seconds; where uv cannot be had or fails, pip does the same.
set -euo pipefail
venv=$1
extras=$2
python=$venv/bin/python

echo "installing attnlab[$extras] into $venv"
[ -x "$venv/bin/uv" ] || "$python" -m pip install --quiet uv || true
if [ -x "$venv/bin/uv" ] &&
    "$venv/bin/uv" pip install --quiet --python "$python" --editable ".[$extras]"; then
    exit 0
fi
echo "uv could not do it; trying pip (slower)"
"$python" -m pip install --quiet --editable ".[$extras]"
