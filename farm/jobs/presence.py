"""What worker processes tell of themselves."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import Connection

from farm.queries import workers as rows


def hello(
    conn: Connection,
    *,
    worker: UUID,
    pool: str,
    host: str,
    pid: int,
    device: str,
    version: str,
    name: str | None = None,
) -> None:
    """A worker process starts. The same id after a restart replaces its row.

    `name` stays the same whatever process serves here; where it is None, host and device tell workers apart.
    """
    rows.hello(conn, worker=worker, pool=pool, name=name, host=host, pid=pid, device=device, version=version)


def tell(
    conn: Connection,
    *,
    worker: UUID,
    state: Literal["starting", "idle", "busy", "leaving"],
    warm: Sequence[dict[str, Any]] = (),
    cache: Mapping[str, Any] = MappingProxyType({}),
    resting: Sequence[Mapping[str, Any]] = (),
) -> None:
    """A heartbeat: state, what is warm (`checkpoint`, `adapters`, `bytes`, ...), how well the cache serves, and what it
    rests from (`hash` of a checkpoint or lane, ...)."""
    rows.tell(conn, worker=worker, state=state, warm=warm, cache=cache, resting=resting)


def goodbye(conn: Connection, *, worker: UUID) -> None:
    """A worker process leaves in order."""
    rows.goodbye(conn, worker=worker)
