"""The rows of worker processes."""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, RowMapping, bindparam, text
from sqlalchemy.dialects.postgresql import JSONB

from farm.queries.suspects import PLACE

_HELLO = text("""
    INSERT INTO workers (id, pool, name, host, pid, device, version, state)
    VALUES (:worker, :pool, :name, :host, :pid, :device, :version, 'starting')
    ON CONFLICT (id) DO UPDATE SET pool = :pool, name = :name, host = :host, pid = :pid, device = :device,
        version = :version, resting = '[]', state = 'starting', started_at = clock_timestamp(),
        heartbeat_at = clock_timestamp(), left_at = NULL
""")

_TELL = text("""
    UPDATE workers SET state = :state, warm = :warm, cache = :cache, heartbeat_at = clock_timestamp()
    WHERE id = :worker
""").bindparams(bindparam("warm", type_=JSONB), bindparam("cache", type_=JSONB))

_GOODBYE = text(
    "UPDATE workers SET state = 'leaving', warm = '[]', cache = '{}', left_at = clock_timestamp() WHERE id = :worker"
)

_ALL = text(f"""
    SELECT w.*, {PLACE.format("w")} AS place,
           (SELECT count(*) FROM claims c JOIN attempts a ON a.claim_id = c.id AND a.outcome IS NULL
                 WHERE c.worker_id = w.id AND c.closed_at IS NULL) AS running,
           w.heartbeat_at < clock_timestamp() - CAST(:lost_after AS interval) AS lost
    FROM workers w WHERE w.left_at IS NULL ORDER BY w.id
""")


def hello(conn: Connection, **worker: Any) -> None:
    """A worker process starts: worker, pool, name, host, pid, device, version."""
    conn.execute(_HELLO, worker)


def tell(
    conn: Connection, *, worker: UUID, state: str, warm: Sequence[dict[str, Any]], cache: Mapping[str, Any]
) -> None:
    """A worker's heartbeat: what it does, what it keeps warm and how well its cache serves."""
    conn.execute(_TELL, {"worker": worker, "state": state, "warm": list(warm), "cache": dict(cache)})


def goodbye(conn: Connection, *, worker: UUID) -> None:
    """A worker process leaves in order."""
    conn.execute(_GOODBYE, {"worker": worker})


def present(conn: Connection, lost_after: str) -> Sequence[RowMapping]:
    """Workers that did not say goodbye; `lost` where the heartbeat is older than `lost_after` (a Postgres interval)."""
    return conn.execute(_ALL, {"lost_after": lost_after}).mappings().all()


def prune(conn: Connection) -> None:
    """Forget workers that left or fell silent a day ago."""
    conn.execute(
        text("DELETE FROM workers WHERE coalesce(left_at, heartbeat_at) < clock_timestamp() - interval '1 day'")
    )
