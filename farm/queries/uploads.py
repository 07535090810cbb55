"""Statements about uploads. A row exists only while its object does; `doomed_objects` remembers an object without a row
from before it is written, so that whatever is killed in between, the sweeper finds it."""

from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, RowMapping, text

COPY = "COPY job_uploads (job_id, project_id, hash) FROM STDIN"

_COLUMNS = "hash, media_type, width, height, bytes, created_at, used_at"

_ANNOUNCE = text("""
    INSERT INTO doomed_objects (key, delete_after) VALUES (:key, clock_timestamp() + CAST(:patience AS interval))
    ON CONFLICT (key) DO UPDATE SET delete_after = greatest(doomed_objects.delete_after, excluded.delete_after)
""")

# Waits for a sweeper that deletes the object right now.
_WRITTEN = text("DELETE FROM doomed_objects WHERE key = :key")

_INSERT = text(f"""
    INSERT INTO uploads (project_id, hash, key, media_type, width, height, bytes)
    VALUES (:project, :hash, :key, :media_type, :width, :height, :bytes)
    ON CONFLICT (project_id, hash) DO UPDATE SET used_at = clock_timestamp() RETURNING {_COLUMNS}
""")

_TOUCH = text(f"""
    UPDATE uploads SET used_at = clock_timestamp() WHERE project_id = :project AND hash = ANY(:hashes)
    RETURNING {_COLUMNS}
""")

# What a submission or another sweeper holds is passed over: nobody waits for anybody.
_DUE = text("""
    SELECT project_id, hash FROM uploads WHERE used_at < clock_timestamp() - CAST(:keep AS interval)
    ORDER BY used_at LIMIT :limit FOR UPDATE SKIP LOCKED
""")

_NAMED = "EXISTS (SELECT FROM job_uploads j WHERE j.hash = u.hash AND j.project_id = u.project_id)"

# A statement of its own, now that the rows are locked: its snapshot sees every job that named one before that. Those
# in use count as used now, so that each is looked at once a retention time and not at every round.
_FORGET = text(f"""
    WITH given AS (
        SELECT * FROM unnest(CAST(:projects AS uuid[]), CAST(:hashes AS text[])) AS g(project_id, hash)
    ), kept AS (
        UPDATE uploads u SET used_at = clock_timestamp() FROM given g
        WHERE u.project_id = g.project_id AND u.hash = g.hash AND {_NAMED}
    ), gone AS (
        DELETE FROM uploads u USING given g WHERE u.project_id = g.project_id AND u.hash = g.hash AND NOT {_NAMED}
        RETURNING u.key
    ), doomed AS (
        INSERT INTO doomed_objects (key, delete_after)
        SELECT key, clock_timestamp() + CAST(:grace AS interval) FROM gone
        ON CONFLICT (key) DO UPDATE SET delete_after = excluded.delete_after
    )
    SELECT count(*) FROM gone
""")


def announce(conn: Connection, key: str, patience: timedelta) -> None:
    """An object is about to be written that no row knows yet; without a row after `patience` it is deleted."""
    conn.execute(_ANNOUNCE, {"key": key, "patience": patience})


def written(conn: Connection, key: str) -> bool:
    """The announced object is there and is kept from now on. False when a sweeper has deleted it meanwhile."""
    return conn.execute(_WRITTEN, {"key": key}).rowcount > 0


def insert(conn: Connection, **upload: Any) -> RowMapping:
    """The row of an upload: project, hash, key, media_type, width, height, bytes; one that is there counts as used."""
    return conn.execute(_INSERT, upload).mappings().one()


def touch(conn: Connection, project: UUID, hashes: Collection[str]) -> Sequence[RowMapping]:
    """Those of these uploads that a project has, which count as used now."""
    return conn.execute(_TOUCH, {"project": project, "hashes": sorted(hashes)}).mappings().all()


def get(conn: Connection, project: UUID, hash_: str) -> RowMapping | None:
    statement = text(f"SELECT {_COLUMNS} FROM uploads WHERE project_id = :project AND hash = :hash")
    return conn.execute(statement, {"project": project, "hash": hash_}).mappings().one_or_none()


def page(conn: Connection, project: UUID, *, after: str, limit: int) -> Sequence[RowMapping]:
    """Uploads of a project in order of their hashes, from the one after `after` on."""
    statement = text(f"""
        SELECT {_COLUMNS} FROM uploads WHERE project_id = :project AND hash > :after ORDER BY hash LIMIT :limit
    """)
    return conn.execute(statement, {"project": project, "after": after, "limit": limit}).mappings().all()


def lock(conn: Connection, project: UUID, hash_: str) -> bool:
    """Keep jobs from naming it until the transaction ends; False when there is no such upload."""
    statement = text("SELECT FROM uploads WHERE project_id = :project AND hash = :hash FOR UPDATE")
    return conn.execute(statement, {"project": project, "hash": hash_}).first() is not None


def due(conn: Connection, keep: timedelta, limit: int) -> list[tuple[UUID, str]]:
    """Uploads last used longer ago than `keep`, locked: project and hash."""
    found = conn.execute(_DUE, {"keep": keep, "limit": limit})
    return [(row.project_id, row.hash) for row in found]


def forget(conn: Connection, some: Sequence[tuple[UUID, str]], grace: timedelta) -> int:
    """Remove locked uploads that no job names; their objects go after `grace`. Answers how many went."""
    projects, hashes = [project for project, _ in some], [hash_ for _, hash_ in some]
    gone: int = conn.execute(_FORGET, {"projects": projects, "hashes": hashes, "grace": grace}).scalar_one()
    return gone
