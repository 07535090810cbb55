"""Whether this process lives and can serve. The only routes without a key; they name no address and no version."""

import time
from collections.abc import Callable
from threading import Lock
from typing import Any, Literal

import redis
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from api.deps import Farm, FarmDep
from api.schemas import Alive, Readiness
from farm.errors import FarmError, SchemaMismatch
from farm.logs import get_logger

router = APIRouter(prefix="/health", tags=["health"])

REMEMBER_SECONDS = 1.0
"""However often it is asked, the servers behind us are asked no more than once in this time."""
REDIS_SECONDS = 1.0

NOT_READY: dict[int | str, dict[str, Any]] = {
    503: {"model": Readiness, "description": "Postgres or S3 does not answer"}
}

log = get_logger(__name__)


@router.get("/live")
async def get_liveness() -> Alive:
    """The process answers requests."""
    return Alive()


@router.get("/ready", response_model=Readiness, responses=NOT_READY)
async def get_readiness(farm: FarmDep, request: Request) -> Response:
    """Requests can be served: Postgres with the right schema and S3 answer. Redis is reported and never decides."""
    found = await farm.waiting(request.app.state.readiness.look)
    return JSONResponse(found.model_dump(), 200 if found.status == "ready" else 503, {"Cache-Control": "no-store"})


class Probe:
    """Looks at the servers behind the API, and remembers for a moment what it saw."""

    def __init__(self, farm: Farm, clock: Callable[[], float] = time.monotonic) -> None:
        self._farm = farm
        self._clock = clock
        self._lock = Lock()
        self._seen: tuple[float, Readiness] | None = None
        self._redis = redis.Redis.from_url(
            farm.settings.redis_url.get_secret_value(),
            socket_timeout=REDIS_SECONDS,
            socket_connect_timeout=REDIS_SECONDS,
        )

    def look(self) -> Readiness:
        with self._lock:
            if self._seen is None or self._clock() - self._seen[0] >= REMEMBER_SECONDS:
                seen = self._look()
                self._seen = (self._clock(), seen)
            return self._seen[1]

    def close(self) -> None:
        self._redis.close()

    def _look(self) -> Readiness:
        postgres = self._postgres()
        s3 = _answers("s3", self._farm.store.check)
        broker = _answers("redis", self._redis.ping)
        ready = postgres == "ok" and s3 == "ok"
        return Readiness(status="ready" if ready else "not ready", postgres=postgres, s3=s3, redis=broker)

    def _postgres(self) -> Literal["ok", "down", "other schema"]:
        try:
            self._farm.database.check_schema()
        except SchemaMismatch as error:
            log.warning("not ready", server="postgres", reason=str(error))
            return "other schema"
        except FarmError as error:
            log.warning("not ready", server="postgres", reason=str(error))
            return "down"
        return "ok"


def _answers(server: str, ask: Callable[[], object]) -> Literal["ok", "down"]:
    try:
        ask()
    except (FarmError, redis.RedisError, OSError) as error:
        log.warning("not ready", server=server, reason=str(error))
        return "down"
    return "ok"
