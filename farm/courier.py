"""The courier: carries messages from their rows to the webhooks they are for, in the sweeper process.

One event loop in a thread of its own, with connections to Postgres and to resolvers of its own, so that nothing it
waits for keeps the sweeping waiting. Each webhook is served by one task at a time and each project by a few, so a
receiver that is slow is slow for itself. A message is delivered at least once under one id: a try is written down
before it is made, and one that nobody came back from is made again.
"""

import asyncio
import random
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from http import HTTPStatus
from threading import Lock, Thread
from typing import Any, TypeVar
from uuid import UUID

import httpx
import orjson
import structlog
from sqlalchemy import RowMapping

from farm import __version__
from farm.addresses import Destination, destination, networks_of
from farm.addresses import check_url as parts_of
from farm.db import Database
from farm.errors import FarmError
from farm.queries import webhooks as rows
from farm.settings import Settings
from farm.webhooks import message_id, signature

T = TypeVar("T")

SECOND, HOUR = timedelta(seconds=1), timedelta(hours=1)
PAUSES = (5 * SECOND, 300 * SECOND, HOUR / 2, 2 * HOUR, 5 * HOUR, 10 * HOUR, 14 * HOUR, 18 * HOUR, 24 * HOUR)
"""Between the tries, about three days in all; each is stretched or shortened by up to a tenth."""
JITTER = 0.1
SERVED_AT_ONCE = 128
"""Webhooks served by this process at a time, and of one project."""
SERVED_OF_A_PROJECT = 8
CARRIED_AT_ONCE = 4
"""Messages on their way to one webhook at a time."""
LEASE_MARGIN = timedelta(seconds=45)
RESOLVERS = 64
LEAVE_SECONDS = 5.0

log = structlog.get_logger(__name__)


def pause(attempt: int, draw: Callable[[], float] = random.random) -> timedelta | None:
    """What to wait after try number `attempt` (from 1) failed; None after the last. `draw` answers 0..1.

    >>> pause(1, lambda: 0.5), pause(10)
    (datetime.timedelta(seconds=5), None)
    """
    if attempt > len(PAUSES):
        return None
    return PAUSES[attempt - 1] * (1 + JITTER * (2 * draw() - 1))


class Courier:
    """Delivers messages until closed. `turn` is called again and again, from one thread, and never waits."""

    def __init__(self, settings: Settings, database: Database | None = None) -> None:
        self.settings = settings
        self._own = database is None
        self._database = database or Database(settings, pool_size=2)
        self._also = networks_of(settings.webhook_networks)
        self._lease = settings.webhook_timeout + LEASE_MARGIN
        self._rows = ThreadPoolExecutor(2, thread_name_prefix="courier-rows")
        self._names = ThreadPoolExecutor(RESOLVERS, thread_name_prefix="courier-names")
        self._serving: dict[UUID, tuple[UUID, Future[None]]] = {}
        self._lock = Lock()
        self._loop = asyncio.new_event_loop()
        self._client: httpx.AsyncClient | None = None
        self._thread = Thread(target=self._loop.run_forever, name="courier", daemon=True)
        self._thread.start()

    def turn(self) -> bool:
        """Begin to serve webhooks that have something to hear and are not being served. Never asks to go on at once:
        whoever is served is served until nothing is due."""
        with self._lock:
            projects = Counter(project for project, _ in self._serving.values())
            busy = set(self._serving)
        free = SERVED_AT_ONCE - len(busy)
        full = {project for project, served in projects.items() if served >= SERVED_OF_A_PROJECT}
        if free <= 0:
            return False
        with self._database.transaction() as conn:
            found = rows.due(conn, busy=busy, full=full, limit=free)
        for row in found:
            if projects[row["project_id"]] < SERVED_OF_A_PROJECT:
                projects[row["project_id"]] += 1
                self._begin(row["id"], row["project_id"])
        return False

    def wait(self, seconds: float) -> bool:
        """Wait until nobody is being served; answers whether that came true in time."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            with self._lock:
                serving = [future for _, future in self._serving.values()]
            if not serving:
                return True
            time.sleep(0.01)
        return False

    def close(self) -> None:
        """Let tries under way end, for a few seconds; what is cut off then is tried again by whoever comes next."""
        self.wait(LEAVE_SECONDS)
        with self._lock:
            serving = [future for _, future in self._serving.values()]
        for future in serving:
            future.cancel()
        asyncio.run_coroutine_threadsafe(self._leave(), self._loop).result(LEAVE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(LEAVE_SECONDS)
        self._rows.shutdown(wait=False, cancel_futures=True)
        self._names.shutdown(wait=False, cancel_futures=True)
        if self._own:
            self._database.dispose()

    async def _leave(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    def _begin(self, webhook: UUID, project: UUID) -> None:
        with self._lock:
            future = asyncio.run_coroutine_threadsafe(self._serve(webhook), self._loop)
            self._serving[webhook] = (project, future)
        future.add_done_callback(lambda _: self._forget(webhook))

    def _forget(self, webhook: UUID) -> None:
        with self._lock:
            self._serving.pop(webhook, None)

    async def _serve(self, webhook: UUID) -> None:
        """Deliver what is due to one webhook, some messages at a time, until nothing is."""
        try:
            while messages := await self._asking(self._take, webhook):
                target = await self._look_up(messages[0]["url"])
                await asyncio.gather(*(self._deliver(message, target) for message in messages))
        except FarmError as error:
            log.warning("webhook not served, will try again", webhook=str(webhook), error=error.message)
        except Exception:
            log.exception("webhook not served, will try again", webhook=str(webhook))

    def _take(self, webhook: UUID) -> list[RowMapping]:
        with self._database.transaction() as conn:
            return list(rows.take(conn, webhook, limit=CARRIED_AT_ONCE, lease=self._lease))

    async def _look_up(self, url: str) -> Destination | str:
        """Where to connect to, looked up and checked now; or why nothing is sent there."""
        try:
            parts = parts_of(url, self._also)
            asked = self._loop.run_in_executor(self._names, resolve, parts.hostname or "", parts.port or 0)
            async with asyncio.timeout(self.settings.webhook_timeout.total_seconds()):
                return destination(url, await asked, self._also)
        except ValueError as error:
            return f"the URL {error}"
        except TimeoutError:
            return "the host's name was not resolved in time"
        except OSError:
            return "the host's name cannot be resolved"

    async def _deliver(self, message: RowMapping, target: Destination | str) -> None:
        status: int | None = None
        if isinstance(target, str):
            error: str | None = target
        else:
            status, error = await self._post(message, target)
        await self._asking(self._record, message, status, error)

    async def _post(self, message: RowMapping, target: Destination) -> tuple[int | None, str | None]:
        """One try: the status of the answer, and why it does not count as delivered."""
        body = orjson.dumps(message["body"])
        headers = {**signed(message, body, int(time.time())), "Host": target.host}
        try:
            async with (
                asyncio.timeout(self.settings.webhook_timeout.total_seconds()),
                self._http().stream(
                    "POST", target.url, content=body, headers=headers, extensions={"sni_hostname": target.name}
                ) as answer,
            ):
                return answer.status_code, _verdict(answer.status_code)
        except TimeoutError:
            return None, f"no answer within {self.settings.webhook_timeout.total_seconds():g} s"
        except (httpx.HTTPError, ssl.SSLError, OSError) as error:
            return None, f"{type(error).__name__}: {error}"[:200]

    def _record(self, message: RowMapping, status: int | None, error: str | None) -> None:
        with self._database.transaction() as conn:
            gone = status == HTTPStatus.GONE
            wait = None if error is None or gone else pause(message["attempts"])
            rows.record(conn, message["id"], message["attempts"], status=status, error=error, pause=wait)
            if gone:
                rows.change(conn, message["webhook_id"], project=None, enabled=False, reason="it answered 410")
        log.info(
            "webhook tried",
            webhook=str(message["webhook_id"]),
            message=message_id(message["id"]),
            attempt=message["attempts"],
            status=status,
            delivered=error is None,
        )

    async def _asking(self, call: Callable[..., T], *arguments: Any) -> T:
        return await self._loop.run_in_executor(self._rows, call, *arguments)

    def _http(self) -> httpx.AsyncClient:
        """No proxy, no redirects, and no connection used twice: one made for a name must not serve another."""
        if self._client is None:
            self._client = httpx.AsyncClient(
                trust_env=False,
                follow_redirects=False,
                timeout=self.settings.webhook_timeout.total_seconds(),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
                headers={"User-Agent": f"lcm-farm/{__version__}", "Content-Type": "application/json"},
            )
        return self._client


def resolve(name: str, port: int) -> list[str]:
    """The addresses of a host, as text. Raises OSError."""
    return [str(found[4][0]) for found in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)]


def signed(message: Any, body: bytes, now: int) -> dict[str, str]:
    """The three headers of the specification for one try at `now` (seconds since 1970)."""
    sent_as = message_id(message["id"])
    secrets = [secret for secret in (message["secret"], message["previous"]) if secret]
    signatures = " ".join(signature(secret, sent_as, now, body) for secret in secrets)
    return {"webhook-id": sent_as, "webhook-timestamp": str(now), "webhook-signature": signatures}


def _verdict(status: int) -> str | None:
    if 200 <= status < 300:
        return None
    if 300 <= status < 400:
        return f"answered {status}: redirects are not followed"
    return f"answered {status}"
