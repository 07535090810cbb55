"""The rows of worker processes."""

from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
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
    UPDATE workers SET state = :state, warm = :warm, cache = :cache, resting = :resting,
        heartbeat_at = clock_timestamp()
    WHERE id = :worker
""").bindparams(*(bindparam(name, type_=JSONB) for name in ("warm", "cache", "resting")))

_GOODBYE = text("""
    UPDATE workers SET state = 'leaving', warm = '[]', cache = '{}', resting = '[]', left_at = clock_timestamp()
    WHERE id = :worker
""")

# Another process on the same device may serve well what ours does not, so ids tell workers apart here.
_LEFT_TO_OTHERS = text("""
    SELECT k.hash FROM unnest(CAST(:hashes AS text[])) AS k(hash) WHERE EXISTS (
        SELECT 1 FROM workers o
        WHERE o.pool = :pool AND o.id <> :worker AND o.state IN ('idle', 'busy') AND o.left_at IS NULL
          AND o.heartbeat_at > clock_timestamp() - CAST(:lease AS interval)
          AND NOT o.resting @> jsonb_build_array(jsonb_build_object('hash', k.hash)))
""")

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
    conn: Connection,
    *,
    worker: UUID,
    state: str,
    warm: Sequence[dict[str, Any]],
    cache: Mapping[str, Any],
    resting: Sequence[Mapping[str, Any]],
) -> None:
    """A worker's heartbeat: what it does, what it keeps warm, how well its cache serves, and what it rests from."""
    told = {"warm": list(warm), "cache": dict(cache), "resting": [dict(one) for one in resting]}
    conn.execute(_TELL, {"worker": worker, "state": state, **told})


def goodbye(conn: Connection, *, worker: UUID) -> None:
    """A worker process leaves in order."""
    conn.execute(_GOODBYE, {"worker": worker})


def left_to_others(
    conn: Connection, *, worker: UUID, pool: str, hashes: Collection[str], lease: timedelta
) -> list[str]:
    """Of these checkpoints and lanes: which another live worker of the pool does not rest from."""
    parameters = {"worker": worker, "pool": pool, "hashes": list(hashes), "lease": lease}
    return list(conn.execute(_LEFT_TO_OTHERS, parameters).scalars())


def present(conn: Connection, lost_after: str) -> Sequence[RowMapping]:
    """Workers that did not say goodbye; `lost` where the heartbeat is older than `lost_after` (a Postgres interval)."""
    return conn.execute(_ALL, {"lost_after": lost_after}).mappings().all()


def prune(conn: Connection) -> None:
    """Forget workers that left or fell silent a day ago."""
    conn.execute(
        text("DELETE FROM workers WHERE coalesce(left_at, heartbeat_at) < clock_timestamp() - interval '1 day'")
    )
