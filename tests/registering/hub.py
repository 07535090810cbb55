"""A Hugging Face hub of paper: the few endpoints that fetching uses, served from folders."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import orjson

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by name, each at one commit. `asked` holds every request line; `broken` files answer half of it."""

    def __init__(self) -> None:
        self.repositories: dict[str, Path] = {}
        self.asked: list[str] = []
        self.lying: set[str] = set()
        """Files whose announced sha256 is not theirs."""
        self.gated: set[str] = set()
        """Repositories that tell what they hold and give it only to those who accepted their terms."""
        self.down = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            def do_HEAD(self) -> None:
                hub.answer(self)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path)
        self.asked.append(f"{handler.command} {path}")
        if self.down:
            self.send(handler, 503, b"{}")
            return
        for name, folder in self.repositories.items():
            if path == f"/api/models/{name}/revision/{COMMIT}":
                self.send(handler, 200, orjson.dumps(self.information(name, folder)))
                return
            front = f"/{name}/resolve/{COMMIT}/"
            if path.startswith(front) and name in self.gated:
                self.send(handler, 401, b"{}", {"X-Error-Code": "GatedRepo"})
                return
            if path.startswith(front) and (folder / path.removeprefix(front)).is_file():
                data = (folder / path.removeprefix(front)).read_bytes()
                etag = hashlib.sha256(data).hexdigest()
                self.send(handler, 200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
                return
            if path.startswith(f"/api/models/{name}/"):
                self.send(handler, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return
        self.send(handler, 404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def information(self, name: str, folder: Path) -> dict[str, object]:
        siblings = []
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                inside, data = path.relative_to(folder).as_posix(), path.read_bytes()
                sha256 = hashlib.sha256(data + (b"!" if inside in self.lying else b"")).hexdigest()
                lfs = {"sha256": sha256, "size": len(data), "pointerSize": 130}
                large = inside.endswith((".safetensors", ".bin"))
                siblings.append({"rfilename": inside, "size": len(data), **({"lfs": lfs} if large else {})})
        return {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}

    @staticmethod
    def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        handler.send_response(status)
        for key, value in {"Content-Length": str(len(body)), "Content-Type": "text/plain", **(headers or {})}.items():
            handler.send_header(key, value)
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body)


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, args=[0.02], daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()
