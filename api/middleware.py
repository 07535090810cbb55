"""Around every request, as plain ASGI: its id and log line, its API key, the size of its body."""

import re
import time
from collections.abc import MutableMapping

import anyio
import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.auth import key_of
from api.deps import farm_of
from api.errors import farm_problem, unexpected_problem
from farm.errors import FarmError, TooLarge, TooSlow
from farm.ids import new_id
from farm.logs import get_logger
from farm.settings import Settings

API = "/api/v1"
BATCHES = f"{API}/batches"
UPLOADS = f"{API}/uploads"
OPEN = frozenset({f"{API}/health/live", f"{API}/health/ready"})
"""The only paths that answer without a key. Unknown paths do not: nothing is told apart from outside."""

NDJSON = frozenset({"application/x-ndjson", "application/ndjson", "application/jsonl"})
SMALL_BODY_BYTES = 1024 * 1024
"""Every body but a batch's: one job, one key. A hundred times what a sensible one takes."""
BODIED = frozenset({"POST", "PATCH"})
"""The only methods with bodies that are read."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

log = get_logger(__name__)


def media_type(headers: Headers) -> str:
    """The content type without its parameters, in lower case."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


class RequestLog:
    """Gives every request an id, logs one line for it, and answers 500 for what nobody caught."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = scope["farm.request_id"] = asked if REQUEST_ID.fullmatch(asked) else new_id().hex
        status = 0
        began = time.perf_counter()

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).append("X-Request-Id", request_id)
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self.app(scope, receive, answer)
            except Exception:
                log.exception("request crashed", method=scope["method"], path=scope["path"])
                if status:
                    raise
                await unexpected_problem(scope)(scope, receive, answer)
            finally:
                self._line(scope, status, began)

    @staticmethod
    def _line(scope: MutableMapping[str, object], status: int, began: float) -> None:
        # The query stays out: labels and prompts of a tenant are nobody's log.
        say = log.debug if scope["path"] in OPEN else log.info
        caller = scope.get("farm.caller")
        say(
            "request",
            method=scope["method"],
            path=scope["path"],
            status=status,
            milliseconds=round((time.perf_counter() - began) * 1000, 1),
            project=getattr(caller, "project", None),
        )


class Authentication:
    """Refuses requests without a valid key, and more than their project may send, before anything of them is read."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self.app(scope, receive, send)
            return
        farm = farm_of(scope)
        try:
            key = key_of(Headers(scope=scope))
            caller = farm.keys.remembered(key)
            if caller is None:
                caller = await farm.waiting(lambda: farm.keys.look_up(key))
            scope["farm.caller"] = caller
            await farm.requests.admit(caller.project_id, caller.requests_per_second)
        except FarmError as error:
            await farm_problem(scope, error)(scope, receive, send)
            return
        await self.app(scope, receive, send)


class BodyLimit:
    """Refuses a body over the limit, by its header before it is read, or once the limit is passed while it streams.

    One that stops arriving, or takes too long to, is refused as well: a client that vanished, or never means to end.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # What requests without a body wait for is that the client leaves.
        if scope["type"] != "http" or scope["method"] not in BODIED:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        settings = farm_of(scope).settings
        limit = _limit(scope["path"], headers, settings)
        announced = headers.get("content-length", "")
        # What is no plain number is for the server to refuse; whatever it lets through is counted below.
        if announced.isascii() and announced.isdigit() and (len(announced) > 18 or int(announced) > limit):
            await farm_problem(scope, _over(limit))(scope, receive, send)
            return
        body = _Body(receive, limit, settings)
        await self.app(scope, body.receive, send)


class _Body:
    """One body on its way in."""

    def __init__(self, receive: Receive, limit: int, settings: Settings) -> None:
        self._receive = receive
        self._limit = limit
        self._silence = settings.body_silence.total_seconds()
        self._time = settings.body_time.total_seconds()
        self._ends = anyio.current_time() + self._time
        self._received = 0
        self._complete = False

    async def receive(self) -> Message:
        """The next message. Raises TooLarge, TooSlow."""
        if self._complete:
            return await self._receive()
        left = self._ends - anyio.current_time()
        with anyio.move_on_after(min(self._silence, left)) as waiting:
            message = await self._receive()
        if waiting.cancelled_caught:
            if left <= self._silence:
                raise TooSlow(f"the request body took longer than {self._time:g} seconds; send less at a time")
            raise TooSlow(f"nothing of the request body arrived for {self._silence:g} seconds")
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._received > self._limit:
                raise _over(self._limit)
        return message


def _limit(path: str, headers: Headers, settings: Settings) -> int:
    if path == UPLOADS:
        return settings.max_image_bytes
    if path != BATCHES:
        return min(SMALL_BODY_BYTES, settings.max_body_bytes)
    return settings.max_upload_bytes if media_type(headers) in NDJSON else settings.max_body_bytes


def _over(limit: int) -> TooLarge:
    return TooLarge(f"the request body is over the limit of {limit} bytes", limit=limit)
