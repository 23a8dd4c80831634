"""A real local server that stands in for the Hugging Face hub and for GitHub: files of repositories, and refusals."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """`files`: path in the repository to content, the same for every repository; `raw/...` stands for GitHub.

    `status`, `error`: what every request is refused with. `broken` files are cut off half-way. `given`: files sent.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)
        self.status, self.error = 200, ""
        self.broken: set[str] = set()
        self.given: list[str] = []
        self.tokens: set[str | None] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                outer.tokens.add(self.headers.get("Authorization"))
                path = unquote(urlsplit(self.path).path).lstrip("/")
                if outer.status != 200:
                    self.send(outer.status, b"{}", {"X-Error-Code": outer.error, "X-Error-Message": "no"}, body)
                elif path.startswith("api/datasets/"):
                    entries = [
                        {"type": "file", "path": name, "size": len(content), "oid": digest(content)}
                        for name, content in outer.files.items()
                    ]
                    self.send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"}, body)
                else:
                    name = path.split("/", 5)[5] if path.startswith("datasets/") else path
                    self.send_file(name, path, body)

            def send_file(self, name: str, path: str, body: bool) -> None:
                if name not in outer.files:
                    self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)
                    return
                content = outer.files[name]
                commit = path.split("/")[4] if path.startswith("datasets/") else ""
                if body:
                    outer.given.append(name)
                self.send(200, content, {"ETag": f'"{digest(content)}"', "X-Repo-Commit": commit}, body, name)

            def send(self, status: int, content: bytes, headers: Mapping[str, str], body: bool, name: str = "") -> None:
                self.send_response(status)
                for header, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(header, value)
                self.end_headers()
                if body:
                    self.wfile.write(content[: len(content) // 2] if name in outer.broken else content)

            def log_message(self, *arguments: object) -> None:
                """Quiet."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def running_hub(files: Mapping[str, bytes]) -> Iterator[Hub]:
    hub = Hub(files)
    yield hub
    hub.http.shutdown()
    hub.http.server_close()
