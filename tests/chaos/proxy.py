"""Between the farm and S3: passes every request on, unless it is told to spoil it.

Signatures cover the Host header, which is passed on as it came, so S3 takes requests through here for its own.
"""

import random
import sys
import threading
import time
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self
from urllib.parse import urlsplit

Trouble = Literal["", "busy", "full", "expired", "gone", "slow", "cut"]

ANSWERS: dict[str, tuple[int, str]] = {
    "busy": (503, "SlowDown"),
    "full": (507, "InsufficientStorage"),
    "expired": (403, "ExpiredToken"),
    "gone": (404, "NoSuchBucket"),
}
HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding"})


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A worker that was killed while it sent: no trouble of this server.
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Proxy:
    """Listens on loopback until the block ends. `cause` says what befalls requests from then on."""

    def __init__(self, upstream: str, seed: int) -> None:
        place = urlsplit(upstream)
        self.upstream = (place.hostname or "", place.port or 80)
        self.delay = 0.0
        """Seconds that a slow request waits before it is passed on."""
        self.spoilt = 0
        self.bitten = 0
        """Requests spoilt by the present trouble, or the latest."""
        self.unanswered = 0
        """Requests to which S3 itself said nothing."""
        self._trouble: Trouble = ""
        self._share = 1.0
        self._lock = threading.Lock()
        self.random = random.Random(seed)
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, name="proxy", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def cause(self, trouble: Trouble, share: float = 1.0) -> None:
        """From now on this befalls that share of the requests, the next one among them."""
        with self._lock:
            self._trouble, self._share, self.bitten = trouble, share, 0

    def relent(self) -> None:
        """From now on nothing befalls requests."""
        with self._lock:
            self._trouble = ""

    def draw(self) -> Trouble:
        """What befalls the request that is just being read."""
        with self._lock:
            # The first one always, or a small share might befall nobody.
            if not self._trouble or (self.random.random() >= self._share and self.bitten):
                return ""
            self.spoilt += 1
            self.bitten += 1
            return self._trouble

    def note_silence(self) -> None:
        """S3 is not there."""
        with self._lock:
            self.unanswered += 1


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            trouble = proxy.draw()
            if trouble in ANSWERS:
                self._refuse(*ANSWERS[trouble])
                return
            if trouble == "slow":
                time.sleep(proxy.delay)
            try:
                self._pass_on(body, cut=trouble == "cut")
            except (OSError, HTTPException):
                self.close_connection = True

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any  # noqa: N815

        def _pass_on(self, body: bytes, *, cut: bool) -> None:
            connection = HTTPConnection(*proxy.upstream, timeout=60)
            try:
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    connection.putheader(name, value)
                connection.endheaders()
                if cut:
                    connection.send(body[: len(body) // 2])
                    self.close_connection = True
                    return
                connection.send(body)
                answer = connection.getresponse()
                data = answer.read()
            except (OSError, HTTPException):
                proxy.note_silence()
                raise
            finally:
                connection.close()
            self.send_response_only(answer.status)
            length = "Content-Length"
            for name, value in answer.getheaders():
                if name.lower() not in HOP_BY_HOP and name.lower() != length.lower():
                    self.send_header(name, value)
            self.send_header(length, answer.getheader(length, "0") if self.command == "HEAD" else str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _refuse(self, status: int, code: str) -> None:
            document = f"<Error><Code>{code}</Code><Message>trouble</Message></Error>".encode()
            self.send_response_only(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(document)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(document)

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    return Handler
