"""A server on this machine in the place of the official hosts."""

from __future__ import annotations

import http.server
import threading
from typing import Any


class OfficialHost:
    """Plays the host of the official archives on this machine.

    `cut_off` breaks the connection in the middle of what was asked for; `tags` gives files an ETag, with which parts
    of them can be had; `ranges` holds what was asked for so.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut_off: set[str] = set()
        self.tags: dict[str, str] = {}
        self.careless = False  # gives parts whatever the condition says
        self.requests: list[str] = []
        self.ranges: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append(self.path)
                body = outer.files.get(self.path)
                if body is None:
                    self.send_error(404)
                    return
                tag, wanted = outer.tags.get(self.path), self.headers.get("Range")
                if tag and wanted and (self.headers.get("If-Range") == tag or outer.careless):
                    outer.ranges.append(wanted)
                    start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                    self.send_response(206 if start < len(body) else 416)
                    self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
                    body = body[start:]
                else:
                    self.send_response(200)
                if tag:
                    self.send_header("ETag", tag)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if self.path in outer.cut_off else body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def put(self, path: str, body: bytes) -> str:
        self.files[path] = body
        return self.url + path

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
