"""Receivers of webhooks on loopback: real HTTP servers that remember what they were sent."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Received:
    """One request: path, headers with names in lower case, body."""

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """What arrived, and how to answer: `answer` is called with the request's number (from 1) and gives the status.

    `look` sees each request as it arrives, as a receiver of somebody's own would.
    """

    url: str = ""
    look: Callable[[Received], None] = lambda _: None
    answer: Callable[[int], int] = lambda _: 204
    location: str = ""
    seen: list[Received] = field(default_factory=list)
    arrived: threading.Condition = field(default_factory=threading.Condition)

    def wait_for(self, count: int, seconds: float = 20.0) -> list[Received]:
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.seen) >= count, seconds), f"{len(self.seen)} arrived"
            return list(self.seen)


@contextmanager
def receiving(answer: Callable[[int], int] = lambda _: 204, location: str = "") -> Iterator[Receiver]:
    """A receiver on a free port of 127.0.0.1."""
    receiver = Receiver(answer=answer, location=location)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            one = Received(self.path, headers, body)
            receiver.look(one)
            with receiver.arrived:
                receiver.seen.append(one)
                number = len(receiver.seen)
                receiver.arrived.notify_all()
            self.send_response(receiver.answer(number))
            if receiver.location:
                self.send_header("Location", receiver.location)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Quietly."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A caller that lost patience is no news."""

    server = Server(("127.0.0.1", 0), Handler)
    receiver.url = f"http://127.0.0.1:{server.server_port}/hook"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
