"""Statements about models on their way into the farm. Every change by a worker names its attempt: that is the fence."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, RowMapping, bindparam, text
from sqlalchemy.dialects.postgresql import JSONB

_COLUMNS = (
    "id, name, kind, source, wanted, pool, state, reason, notes, raw, fresh, hash, family, bytes, total_bytes, attempt,"
    " failures, crashes, worker_id, created_at, finished_at, project_id,"
    " (SELECT p.name FROM projects p WHERE p.id = registrations.project_id) AS project"
)

_INSERT = text(f"""
    INSERT INTO registrations (id, name, kind, source, wanted, pool, project_id, state, raw, fresh, worker_id, attempt,
        lease_until)
    VALUES (:id, :name, :kind, :source, :wanted, :pool, :project, 'waiting', :raw, :fresh, CAST(:worker AS uuid),
        CASE WHEN CAST(:worker AS uuid) IS NULL THEN 0 ELSE 1 END, clock_timestamp() + CAST(:lease AS interval))
    ON CONFLICT (name) WHERE finished_at IS NULL DO NOTHING RETURNING {_COLUMNS}
""").bindparams(bindparam("wanted", type_=JSONB))

# Few rows are ever open, and ix_registrations_open holds no others. A worker that is still named when the lease is over
# vanished without giving back.
_CLAIM = text(f"""
    UPDATE registrations SET worker_id = :worker, attempt = attempt + 1,
        crashes = crashes + CASE WHEN worker_id IS NULL THEN 0 ELSE 1 END,
        lease_until = clock_timestamp() + CAST(:lease AS interval)
    WHERE id = (
        SELECT id FROM registrations
        WHERE pool = :pool AND finished_at IS NULL AND (lease_until IS NULL OR lease_until < clock_timestamp())
        ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED)
    RETURNING {_COLUMNS}
""")

_HELD = "id = :id AND attempt = :attempt AND finished_at IS NULL"


def insert(
    conn: Connection,
    *,
    registration: UUID,
    name: str,
    kind: str,
    source: str,
    wanted: Mapping[str, Any],
    pool: str,
    raw: str | None,
    fresh: Sequence[str],
    worker: UUID | None,
    lease: timedelta | None,
    project_id: UUID | None,
) -> RowMapping | None:
    """Ask for a model, held by `worker` where its files are still to be uploaded.

    None when another registration of this name is under way.
    """
    parameters = {
        "id": registration, "name": name, "kind": kind, "source": source, "wanted": dict(wanted), "pool": pool,
        "raw": raw, "fresh": list(fresh), "worker": worker, "lease": lease, "project": project_id,
    }  # fmt: skip
    return conn.execute(_INSERT, parameters).mappings().one_or_none()


def get(conn: Connection, registration: UUID) -> RowMapping | None:
    statement = text(f"SELECT {_COLUMNS} FROM registrations WHERE id = :id")
    return conn.execute(statement, {"id": registration}).mappings().one_or_none()


def newest(conn: Connection, limit: int) -> Sequence[RowMapping]:
    """Registrations, the newest first; their ids are ordered by time."""
    statement = text(f"SELECT {_COLUMNS} FROM registrations ORDER BY id DESC LIMIT :limit")
    return conn.execute(statement, {"limit": limit}).mappings().all()


def claim(conn: Connection, *, worker: UUID, pool: str, lease: timedelta) -> RowMapping | None:
    """Take the oldest registration of a pool that nobody works on."""
    return conn.execute(_CLAIM, {"worker": worker, "pool": pool, "lease": lease}).mappings().one_or_none()


def renew(conn: Connection, registration: UUID, attempt: int, *, lease: timedelta, bytes_: int | None) -> bool:
    """Prolong a lease and tell how many bytes are here; False when the registration is no longer ours."""
    statement = text(f"""
        UPDATE registrations SET lease_until = clock_timestamp() + CAST(:lease AS interval),
            bytes = coalesce(CAST(:bytes AS bigint), bytes)
        WHERE {_HELD}
    """)
    parameters = {"id": registration, "attempt": attempt, "lease": lease, "bytes": bytes_}
    return conn.execute(statement, parameters).rowcount > 0


def enter(conn: Connection, registration: UUID, attempt: int, state: str, **known: Any) -> bool:
    """A stage begins; `known` are columns that are known by now. False when the registration is no longer ours."""
    settings = "".join(f", {column} = :{column}" for column in known)
    statement = text(f"UPDATE registrations SET state = :state{settings} WHERE {_HELD}")
    parameters = {"id": registration, "attempt": attempt, "state": state, **known}
    return conn.execute(statement, parameters).rowcount > 0


def brought(conn: Connection, registration: UUID, content_hash: str) -> None:
    """This registration brought a content that was not in the store before."""
    statement = text("UPDATE registrations SET fresh = array_append(fresh, :hash) WHERE id = :id")
    conn.execute(statement, {"id": registration, "hash": content_hash})


def give_back(
    conn: Connection, registration: UUID, attempt: int, *, failures: int, reason: str | None, pause: timedelta
) -> bool:
    """Let another try have it after a pause. False when the registration is no longer ours."""
    statement = text(f"""
        UPDATE registrations SET state = 'waiting', worker_id = NULL, failures = failures + :failures, reason = :reason,
            lease_until = clock_timestamp() + CAST(:pause AS interval)
        WHERE {_HELD}
    """)
    parameters = {"id": registration, "attempt": attempt, "failures": failures, "reason": reason, "pause": pause}
    return conn.execute(statement, parameters).rowcount > 0


def finish(
    conn: Connection, registration: UUID, attempt: int, state: str, *, reason: str | None, notes: Sequence[str]
) -> bool:
    """End it. False when the registration is no longer ours."""
    statement = text(f"""
        UPDATE registrations SET state = :state, reason = :reason, notes = :notes, worker_id = NULL, lease_until = NULL,
            finished_at = clock_timestamp()
        WHERE {_HELD}
    """)
    parameters = {"id": registration, "attempt": attempt, "state": state, "reason": reason, "notes": list(notes)}
    return conn.execute(statement, parameters).rowcount > 0


def cancel(conn: Connection, registration: UUID, reason: str) -> RowMapping | None:
    """End it whoever works on it: the attempt rises, so a worker's next word falls on deaf ears. None if ended."""
    statement = text(f"""
        UPDATE registrations SET state = 'refused', reason = :reason, attempt = attempt + 1, worker_id = NULL,
            lease_until = NULL, finished_at = clock_timestamp()
        WHERE id = :id AND finished_at IS NULL RETURNING {_COLUMNS}
    """)
    return conn.execute(statement, {"id": registration, "reason": reason}).mappings().one_or_none()


def prune(conn: Connection) -> None:
    """Forget registrations that ended a month ago."""
    conn.execute(text("DELETE FROM registrations WHERE finished_at < clock_timestamp() - interval '30 days'"))


def unneeded(conn: Connection, content_hash: str) -> bool:
    """Whether no name and no registration under way needs this content."""
    statement = text("""
        SELECT NOT EXISTS (SELECT FROM models WHERE hash = :hash)
           AND NOT EXISTS (SELECT FROM registrations WHERE finished_at IS NULL AND (hash = :hash OR raw = :hash))
    """)
    found: bool = conn.execute(statement, {"hash": content_hash}).scalar_one()
    return found
