"""Requests per second of a project, counted in Redis over all API processes, and here alone while Redis is away.

A frozen Redis costs one request a second a few hundredths of a second; the others do not ask it.
"""

import asyncio
import time
from collections.abc import Callable
from uuid import UUID

import structlog
from limits import RateLimitItemPerSecond
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis import RedisError
from redis.asyncio import ConnectionPool

from farm.errors import LimitReached
from farm.settings import Settings

PATIENCE_SECONDS = 0.02
"""How long one request may wait for Redis."""
ALONE_SECONDS = 1.0
"""How long Redis is not asked after it did not answer."""

log = structlog.get_logger(__name__)


class RequestLimit:
    """Counts requests by project. Used within one event loop."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._alone_until = 0.0
        url = settings.redis_url.get_secret_value()
        self._connections = ConnectionPool.from_url(
            url, socket_timeout=PATIENCE_SECONDS, socket_connect_timeout=PATIENCE_SECONDS
        )
        shared = RedisStorage(
            f"async+{url}",
            implementation="redispy",
            key_prefix=f"{settings.redis_prefix}requests",
            connection_pool=self._connections,  # type: ignore[arg-type]  # as documented; the annotation forgets it
        )
        self._shared = SlidingWindowCounterRateLimiter(shared)
        self._local = SlidingWindowCounterRateLimiter(MemoryStorage())

    async def admit(self, project: UUID, per_second: int | None) -> None:
        """Count one request. Raises LimitReached; what fails to be counted is let through by the local count."""
        if per_second is None:
            return
        item = RateLimitItemPerSecond(per_second)
        if not await self._counted(item, str(project)):
            raise LimitReached(
                f"the project's limit of {per_second} requests per second is reached",
                limit="requests_per_second",
                value=per_second,
                retry_after=1,
            )

    async def close(self) -> None:
        """Let go of the connections."""
        await self._connections.aclose()

    async def _counted(self, item: RateLimitItemPerSecond, project: str) -> bool:
        if self._clock() >= self._alone_until:
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    return await self._shared.hit(item, project)
            except (RedisError, OSError, TimeoutError) as error:
                self._alone_until = self._clock() + ALONE_SECONDS
                log.warning("requests are counted by this process alone", reason=repr(error)[:200])
        return await self._local.hit(item, project)
