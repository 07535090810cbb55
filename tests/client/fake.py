"""A farm of paper: answers requests from a script, keeps what it was asked, renders nothing."""

import hashlib
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import orjson

PICTURE = b"\x89PNG\r\n\x1a\n a picture"


@dataclass
class Asked:
    """One request as it arrived. Header names are lower case."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes

    @property
    def lines(self) -> list[Any]:
        return [orjson.loads(line) for line in self.body.splitlines()]


@dataclass
class Reply:
    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    hang_up: bool = False
    """Close the connection without an answer."""

    def encoded(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else orjson.dumps(self.body)


Route = Reply | Callable[[Asked], Reply]


def problem(status: int, code: str, detail: str = "no", **more: Any) -> Reply:
    body = {"type": "about:blank", "title": code, "status": status, "detail": detail, "code": code, **more}
    return Reply(status, body, {"Content-Type": "application/problem+json"})


class FakeFarm:
    """Serves on a free port of the loopback. `on` adds replies for a route; the last of them stays for good."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.first_piece = threading.Event()
        self._routes: dict[tuple[str, str], list[Route]] = defaultdict(list)
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                """Tests read `asked`."""

            def serve(self) -> None:
                fake.serve(self)

        for method in ("GET", "POST", "DELETE"):
            setattr(Handler, f"do_{method}", Handler.serve)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def on(self, method: str, path: str, *replies: Route) -> None:
        self._routes[method, path] += replies

    def paths(self) -> list[str]:
        return [f"{asked.method} {asked.path}" for asked in self.asked]

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        url = urlsplit(handler.path)
        headers = {name.lower(): value for name, value in handler.headers.items()}
        asked = Asked(handler.command, url.path, parse_qs(url.query), headers, self._body(handler))
        self.asked.append(asked)
        routes = self._routes.get((asked.method, asked.path))
        route = problem(404, "not-found", f"{asked.path} is not here") if not routes else routes[0]
        if routes and len(routes) > 1:
            routes.pop(0)
        reply = route(asked) if callable(route) else route
        if reply.hang_up:
            handler.close_connection = True
            return
        body = reply.encoded()
        handler.send_response(reply.status)
        for name, value in ({"Content-Length": str(len(body))} | reply.headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    def _body(self, handler: BaseHTTPRequestHandler) -> bytes:
        if handler.headers.get("Transfer-Encoding") != "chunked":
            return handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        body = b""
        while size := int(handler.rfile.readline() or b"0", 16):  # a client that gave up ends the body anywhere
            body += handler.rfile.read(size)
            handler.rfile.readline()
            self.first_piece.set()
        handler.rfile.readline()
        return body


def job_document(number: int = 0, state: str = "succeeded", picture: bytes = PICTURE, **more: Any) -> dict[str, Any]:
    image = {"sha256": hashlib.sha256(picture).hexdigest(), "bytes": len(picture), "width": 64, "height": 64}
    return {
        "id": str(uuid4()),
        "batch_id": str(uuid4()),
        "number": number,
        "state": state,
        "attempt": 1,
        "prompt": "A crack",
        "checkpoint": "crack-tiny",
        "acceleration": "lcm-lora",
        "width": 64,
        "height": 64,
        "steps": 4,
        "guidance_scale": 1.0,
        "scheduler": "lcm",
        "seed": 7 + number,
        "priority": 0,
        "created_at": "2030-01-01T00:00:00Z",
        "run_at": "2030-01-01T00:00:00Z",
        "image": image if state == "succeeded" else None,
        **more,
    }


def batch_document(total: int = 2, **counts: int) -> dict[str, Any]:
    return {
        "id": str(uuid4()),
        "name": "walls",
        "total": total,
        "priority": 0,
        "paused": False,
        "counts": counts,
        "created_at": "2030-01-01T00:00:00Z",
    }


def upload_document(picture: bytes = PICTURE) -> dict[str, Any]:
    return {
        "hash": hashlib.sha256(picture).hexdigest(),
        "media_type": "image/png",
        "bytes": len(picture),
        "width": 64,
        "height": 32,
        "created_at": "2030-01-01T00:00:00Z",
        "used_at": "2030-01-01T00:00:00Z",
    }


def page(*items: Any, cursor: str | None = None) -> Reply:
    return Reply(body={"items": list(items), "next_cursor": cursor})


def serve_pictures(fake: FakeFarm, *jobs: dict[str, Any], picture: bytes = PICTURE) -> str:
    """Let the fake hold a batch of these succeeded jobs; answers the batch's id."""
    batch_id = str(uuid4())
    fake.on("GET", f"/api/v1/batches/{batch_id}/jobs", page(*jobs))
    for job in jobs:
        link = {
            "url": f"{fake.url}/bucket/{job['id']}?X-Amz-Signature=a%2Fb",
            "expires_at": "2030-01-01T00:00:00Z",
            "sha256": job["image"]["sha256"],
        }
        fake.on("GET", f"/api/v1/jobs/{job['id']}/image", Reply(body=link))
        fake.on("GET", f"/bucket/{job['id']}", Reply(body=picture))
    return batch_id
