"""What routes ask for, as typed aliases. One transaction per request, committed before its answer is sent."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import anyio
import anyio.to_thread
from anyio import CapacityLimiter
from fastapi import Depends, Request
from sqlalchemy import Connection
from starlette.types import Scope

from api.auth import Authenticator
from api.limiting import RequestLimit
from farm import catalogue, doorbell
from farm.db import Database
from farm.errors import Forbidden, InvalidRequest, Problem, Unauthorized
from farm.keys import Caller
from farm.settings import Settings
from farm.storage import Store

T = TypeVar("T")

SMALL_BYTES = 1024 * 1024
SMALL_AT_ONCE = 8
LARGE_AT_ONCE = 2
WATCHING_AT_ONCE = 2
LOOKING_AT_ONCE = 2
"""Submissions checked at once. Checking is bound by the interpreter lock: more large ones would only take turns, and
small ones must not wait behind them."""


@dataclass
class Notices:
    """What one request will have to tell once it is committed."""

    work: bool = False
    """There are jobs to claim."""
    cancel: bool = False
    """Jobs that may be running were cancelled."""
    revoked: bool = False
    """A key was revoked."""


@dataclass
class Farm:
    """What one API process holds. Made inside its event loop.

    Threads of the default limiter serve routes and never wait for a database connection: whoever does waits in a
    limiter of its own. Otherwise requests that wait for a connection could take every thread from those holding one.
    """

    settings: Settings
    database: Database
    store: Store
    keys: Authenticator
    catalogue: catalogue.Kept
    closing: anyio.Event = field(default_factory=anyio.Event)

    def __post_init__(self) -> None:
        self.requests = RequestLimit(self.settings)
        self._loop = asyncio.get_running_loop()
        size = self.settings.database_pool_size
        self._waiting = CapacityLimiter(size)
        self._watching = CapacityLimiter(WATCHING_AT_ONCE)
        self._leaving = CapacityLimiter(size)
        self._small = CapacityLimiter(SMALL_AT_ONCE)
        self._large = CapacityLimiter(LARGE_AT_ONCE)
        self._looking = CapacityLimiter(LOOKING_AT_ONCE)

    def close_streams(self) -> None:
        """Let event streams end, from any thread or signal handler; clients come back by Last-Event-ID."""
        self._loop.call_soon_threadsafe(self.closing.set)

    async def waiting(self, call: Callable[[], T]) -> T:
        """Run something short that waits for a connection."""
        return await anyio.to_thread.run_sync(call, limiter=self._waiting)

    async def watching(self, call: Callable[[], T]) -> T:
        """The same for event streams, which may be many and must not keep requests waiting."""
        return await anyio.to_thread.run_sync(call, limiter=self._watching)

    async def leaving(self, call: Callable[[], bool | None]) -> bool:
        """Run the end of a transaction, also when the request was cancelled: the connection must go back."""
        swallowed: bool | None = False
        with anyio.CancelScope(shield=True):
            swallowed = await anyio.to_thread.run_sync(call, limiter=self._leaving)
        return bool(swallowed)

    async def checking(self, call: Callable[[], T], size: int) -> T:
        """Run the check of a submission of `size` bytes."""
        return await anyio.to_thread.run_sync(call, limiter=self._small if size <= SMALL_BYTES else self._large)

    async def looking(self, call: Callable[[], T]) -> T:
        """Look at an uploaded picture: each takes as much memory as its pixels."""
        return await anyio.to_thread.run_sync(call, limiter=self._looking)

    def tell(self, notices: Notices) -> None:
        """After a commit: what others must learn. Never blocks, never raises."""
        if notices.revoked:
            self.keys.forget()
        if notices.cancel:
            doorbell.hint_cancel(self.settings)
        if notices.work:
            doorbell.ring(self.settings, self.settings.pool)


def farm_of(scope: Scope) -> Farm:
    farm = scope["app"].state.farm
    if not isinstance(farm, Farm):
        raise TypeError("the app was not started: run its lifespan first")
    return farm


async def get_farm(request: Request) -> Farm:
    return farm_of(request.scope)


async def get_settings(request: Request) -> Settings:
    return farm_of(request.scope).settings


async def get_store(request: Request) -> Store:
    return farm_of(request.scope).store


async def get_notices() -> Notices:
    return Notices()


async def get_caller(request: Request) -> Caller:
    caller = request.scope.get("farm.caller")
    if not isinstance(caller, Caller):
        raise Unauthorized
    return caller


FarmDep = Annotated[Farm, Depends(get_farm)]
SettingsDep = Annotated[Settings, Depends(get_settings)]
StoreDep = Annotated[Store, Depends(get_store)]
NoticesDep = Annotated[Notices, Depends(get_notices)]
CallerDep = Annotated[Caller, Depends(get_caller)]
"""Whoever calls, whatever the key may do."""


async def transaction(farm: FarmDep, notices: NoticesDep) -> AsyncIterator[Connection]:
    """The request's one transaction: committed once the answer is made and before it is sent, then others are told."""
    context = farm.database.transaction()
    conn = await farm.waiting(context.__enter__)
    try:
        yield conn
    except BaseException as error:
        caught = error
        if not await farm.leaving(lambda: context.__exit__(type(caught), caught, caught.__traceback__)):
            raise
    else:
        await farm.leaving(lambda: context.__exit__(None, None, None))
        farm.tell(notices)


ConnDep = Annotated[Connection, Depends(transaction, scope="function")]
"""Ask for it after the body: a body that trickles in must not hold a transaction open."""


async def refuse_unknown_query(request: Request) -> None:
    """Raises InvalidRequest for query parameters on a route that has none: whoever sends them expects something."""
    route = request.scope["route"]
    if route.dependant.query_params or "parameters" in (route.openapi_extra or {}):
        return  # it refuses those that it does not know itself
    if request.query_params:
        problems = [Problem(field=name, problem="unknown parameter") for name in request.query_params]
        raise InvalidRequest("this route has no query parameters", problems=problems[:100])


class Needs:
    """The caller, if its key has this scope. Raises Forbidden."""

    def __init__(self, scope: str) -> None:
        self.scope = scope

    async def __call__(self, caller: CallerDep) -> Caller:
        if self.scope not in caller.scopes:
            raise Forbidden(f"this API key lacks the scope {self.scope}", scope=self.scope)
        return caller


ReaderDep = Annotated[Caller, Depends(Needs("jobs:read"))]
SubmitterDep = Annotated[Caller, Depends(Needs("jobs:submit"))]
ManagerDep = Annotated[Caller, Depends(Needs("jobs:manage"))]
AdminDep = Annotated[Caller, Depends(Needs("admin"))]
