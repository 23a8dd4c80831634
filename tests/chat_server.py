"""A real local server of chat completions that misbehaves in every way a real one does."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

from vrag_lib.corpus import Corpus, Document, Page
from vrag_lib.geometry import Size, View
from vrag_lib.trajectory import ImageRef

SECRET = "sk-very-secret-123"
PAGE = Size(100, 140)


class Server:
    """Answers the n-th request with the n-th behaviour, the last one from then on; keeps what it was sent."""

    def __init__(self) -> None:
        self.behaviours: list[Callable] = []
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.times: list[float] = []
        self.lock = threading.Lock()
        self.now = self.most_at_once = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    n = len(outer.requests)
                    outer.requests.append(body)
                    outer.headers.append(dict(self.headers))
                    outer.times.append(time.monotonic())
                    outer.now += 1
                    outer.most_at_once = max(outer.most_at_once, outer.now)
                try:
                    outer.behaviours[min(n, len(outer.behaviours) - 1)](self, body)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the policy hung up, as it should
                finally:
                    with outer.lock:
                        outer.now -= 1

            def log_message(self, *arguments: object) -> None:
                """Quiet."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@contextmanager
def running_server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def one_page_corpus(folder: Path) -> Corpus:
    """Page d_1 can be read, page d_2 cannot."""
    Image.new("RGB", (PAGE.width, PAGE.height), "white").save(folder / "p.png")
    pages = (Page("d_1", "d", 1, folder / "p.png", PAGE), Page("d_2", "d", 2, folder / "missing.png", PAGE))
    return Corpus([Document("d", folder / "d.pdf", "0" * 64, pages)])


def page(page_id: str) -> ImageRef:
    """The page as shown: 84 x 112 or the like, sides multiples of 28."""
    return ImageRef(page_id, View.of_page(PAGE, 28 * 28, 64 * 28 * 28))


def impatient(url: str, **settings: object) -> dict:
    """Arguments of any client of the server: quick to try again, no cache unless named."""
    fast = {"backoff": 0.01, "connect_timeout": 5, "read_timeout": 10, "total_timeout": 20, "max_retries": 2}
    return {"base_url": url, "model": "tiny", "api_key": SECRET, "cache": None} | fast | settings


def send(data: bytes | str, status: int = 200, headers: dict | None = None) -> Callable:
    raw = data.encode() if isinstance(data, str) else data

    def behave(handler: BaseHTTPRequestHandler, body: dict) -> None:
        handler.send_response(status)
        for name, value in ({"Content-Length": str(len(raw))} | (headers or {})).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(raw)

    return behave


def say(text: object, finish: str | None = "stop", message: dict | None = None, **choice: object) -> Callable:
    """message: more fields of it."""
    said = {"role": "assistant", "content": text} | (message or {})
    return send(json.dumps({"choices": [{"message": said, "finish_reason": finish} | choice]}))


TINY_TIMEOUTS = {"read_timeout": 0.25, "total_timeout": 0.4}
"""For a server that hangs and does nothing else: a busy machine takes longer to answer."""

SHORT_TIMEOUTS = {"read_timeout": 2.5, "total_timeout": 5.0}
"""For a server that hangs among other things."""


def hang(handler: BaseHTTPRequestHandler, body: dict) -> None:
    time.sleep(20)


def drip(handler: BaseHTTPRequestHandler, body: dict) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def drip_headers(handler: BaseHTTPRequestHandler, body: dict) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for i in range(40):
        handler.wfile.write(f"X-{i}: 1\r\n".encode())
        handler.wfile.flush()
        time.sleep(0.1)


def cut_off(handler: BaseHTTPRequestHandler, body: dict) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')


def ten_megabytes(handler: BaseHTTPRequestHandler, body: dict) -> None:
    say("a" * 10_000_000)(handler, body)


BOMB = send(gzip.compress(b" " * 20_000_000), headers={"Content-Encoding": "gzip"})
REFUSAL = send(json.dumps({"choices": [{"message": {"content": None, "refusal": "I will not"}}]}))
TOO_LONG = send('{"error": {"code": "context_length_exceeded", "message": "maximum context length is 8192"}}', 400)
