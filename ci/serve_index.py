"""Serves a package index of static files on 127.0.0.1: `python ci/serve_index.py FOLDER ADDRESS_FILE`.

Writes its address into ADDRESS_FILE when it listens, on a port that was free. It gives JSON (PEP 691) to whom asks for
it, and HTML to others, as an index that can negotiate does; one on plain web space gives everybody HTML.
"""

from __future__ import annotations

import functools
import os
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

JSON = "application/vnd.pypi.simple.v1+json"


class Handler(SimpleHTTPRequestHandler):
    def translate_path(self, path: str) -> str:
        """A folder's index.json for a client that takes JSON."""
        found = super().translate_path(path)
        page = os.path.join(found, "index.json")
        return page if JSON in self.headers.get("Accept", "") and os.path.exists(page) else found

    def guess_type(self, path: str | os.PathLike[str]) -> str:
        return JSON if os.fspath(path).endswith("index.json") else super().guess_type(path)

    def log_message(self, format: str, *args: object) -> None:
        pass


def main(folder: str, address_file: str) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        Path(address_file).write_text(f"http://127.0.0.1:{server.server_address[1]}", encoding="utf-8")
        server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
