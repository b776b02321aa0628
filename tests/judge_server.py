"""A small chat-completions server in the test process, which answers or misbehaves as a test defines."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest import mock


def completion(text: Any, top: dict[str, float] | None = None, tokens: tuple[int, int] = (11, 3)) -> dict[str, Any]:
    """A chat completion with this text; `top` are the log-probabilities of its first token."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if top is not None:
        alternatives = [{"token": token, "logprob": logp} for token, logp in top.items()]
        choice["logprobs"] = {"content": [{**alternatives[0], "top_logprobs": alternatives}]}
    return {"choices": [choice], "usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}}


@dataclass
class Server:
    """The server as a test sees it.

    Attributes:
        answer: from the body of a request and the number of earlier requests with the same body, the reply: a JSON
            value, raw bytes, a status, or (status, headers, body). None closes the connection; a float keeps it open
            for that many seconds.
        asked: the bodies, in the order of their arrival.
        headers: of these requests.
    """

    answer: Callable[[dict, int], Any]
    url: str = ""
    asked: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    most_at_once: int = 0
    _at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, body: dict, headers: dict) -> Any:
        with self._lock:
            before = self.asked.count(body)
            self.asked.append(body)
            self.headers.append(headers)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return self.answer(body, before)
        finally:
            with self._lock:
                self._at_once -= 1


@contextlib.contextmanager
def serving(answer: Callable[[dict, int], Any], context: ssl.SSLContext | None = None) -> Iterator[Server]:
    """Run a server, without the pauses that the client makes for real servers; over TLS with a context."""
    server = Server(answer)
    closing = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            headers = {name.title(): value for name, value in self.headers.items()}
            said = server.take(body, {"path": self.path, **headers})
            status, headers, content = said if isinstance(said, tuple) else (200, {}, said)
            if isinstance(content, float):
                deadline = time.monotonic() + content
                self.send_response(200)
                self.end_headers()
                with contextlib.suppress(OSError):
                    while time.monotonic() < deadline and not closing.wait(0.05):
                        self.wfile.write(b" ")  # each byte restarts a timeout for the next one
                        self.wfile.flush()
                return
            if content is None:
                self.close_connection = True
                self.connection.close()
                return
            if isinstance(content, int):
                status, content = content, b""
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(data)

        def log_message(self, *args):
            pass

        def handle(self):
            with contextlib.suppress(OSError, ValueError):
                super().handle()

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    server.url = f"http://127.0.0.1:{httpd.server_address[1]}/v1"
    if context is not None:
        httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
        server.url = f"https://localhost:{httpd.server_address[1]}/v1"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        with mock.patch("openai._base_client.INITIAL_RETRY_DELAY", 0.01):
            yield server
    finally:
        closing.set()
        httpd.shutdown()
        httpd.server_close()
        thread.join()
