"""Serve a folder on this machine, on the first free port at or after the one asked for."""

import argparse
import functools
import http.server
import pathlib
import socketserver


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line per request, and never from a stale browser cache."""

    def log_message(self, *_):
        """Stay quiet."""

    def end_headers(self):
        """Ask the browser to check for a newer page every time."""
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """One thread per request; a port in use is an error, so that the next one is tried."""

    daemon_threads = True
    allow_reuse_address = True


def listen(folder: pathlib.Path, port: int) -> Server:
    """A server on the first free port at or after `port`."""
    handler = functools.partial(Handler, directory=str(folder))
    for candidate in range(port, port + 100):
        try:
            return Server(("127.0.0.1", candidate), handler)
        except OSError:
            continue
    raise SystemExit(f"no free port between {port} and {port + 99}; choose another with PORT=")


def main() -> None:
    """Parse the command line and serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    if not (args.folder / "index.html").exists():
        raise SystemExit(f"{args.folder} has no index.html; build the book first: make html")
    server = listen(args.folder, args.port)
    print(f"\nThe book is at http://127.0.0.1:{server.server_port}/   (Ctrl-C stops)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
