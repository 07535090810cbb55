"""Rows of checkpoints, adapters and their files."""

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, Protocol
from uuid import UUID

from sqlalchemy import Connection, RowMapping, bindparam, text
from sqlalchemy.dialects.postgresql import JSONB

SEEN = "(CAST(:seen_by AS uuid) IS NULL OR m.project_id IS NULL OR m.project_id = :seen_by)"
"""Whether a project may see the model `m`: all share it, or it is its own. Without a project, everything is seen."""

_MODEL = """
    SELECT m.name, m.hash, m.kind, m.family, m.state, m.bytes, m.profile, m.source, m.created_at, m.project_id,
           p.name AS project
    FROM models m LEFT JOIN projects p ON p.id = m.project_id
"""

_INSERT = text("""
    INSERT INTO models (name, hash, kind, family, state, bytes, profile, source, project_id)
    VALUES (:name, :hash, :kind, :family, 'available', :bytes, :profile, :source, :project)
    ON CONFLICT (name) DO NOTHING RETURNING name
""").bindparams(bindparam("profile", type_=JSONB), bindparam("source", type_=JSONB))


class Content(Protocol):
    """A model that passed the checks, as `farm.modelfiles` finds it."""

    @property
    def hash(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def profile(self) -> dict[str, Any]: ...
    @property
    def source(self) -> dict[str, Any]: ...


class File(Protocol):
    @property
    def path(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def bytes(self) -> int: ...


def stamp(conn: Connection) -> UUID | None:
    """What changes with every change of the models; None before the first."""
    found: UUID | None = conn.execute(text("SELECT stamp FROM catalogue_stamp")).scalar_one_or_none()
    return found


def available(conn: Connection) -> Sequence[RowMapping]:
    """Models that jobs may name, each with its project if it has one."""
    statement = text(f"{_MODEL} WHERE m.state = 'available' ORDER BY m.name")
    return conn.execute(statement).mappings().all()


def every(conn: Connection, kinds: Iterable[str], seen_by: UUID | None = None) -> Sequence[RowMapping]:
    """Models of these kinds in any state, as far as a project may see them."""
    statement = text(f"{_MODEL} WHERE m.kind = ANY(:kinds) AND {SEEN} ORDER BY m.name")
    return conn.execute(statement, {"kinds": list(kinds), "seen_by": seen_by}).mappings().all()


def files(conn: Connection, content_hash: str) -> Sequence[RowMapping]:
    """The files behind a content hash."""
    statement = text("SELECT path, key, sha256, bytes FROM model_files WHERE hash = :hash ORDER BY path")
    return conn.execute(statement, {"hash": content_hash}).mappings().all()


def tokenizer_files(conn: Connection, hashes: Sequence[str]) -> Sequence[RowMapping]:
    """Where the tokenizers of these checkpoints lie."""
    statement = text("SELECT hash, path, key FROM model_files WHERE hash = ANY(:hashes) AND path LIKE 'tokenizer/%'")
    return conn.execute(statement, {"hashes": list(hashes)}).mappings().all()


def insert_files(conn: Connection, content_hash: str, listed: Sequence[File]) -> bool:
    """Remember where the files of a content lie, and keep objects that were about to be deleted. Answers whether the
    content is new. Written before the files are uploaded, so that nobody deletes what is about to be needed."""
    known = conn.execute(text("SELECT count(*) FROM model_files WHERE hash = :hash"), {"hash": content_hash})
    new: bool = known.scalar_one() == 0
    # Waits for a sweeper that is deleting one of them right now; it is then uploaded again.
    conn.execute(text("DELETE FROM doomed_objects WHERE key = ANY(:keys)"), {"keys": [file.key for file in listed]})
    if not listed:
        return new
    conn.execute(
        text("""
            INSERT INTO model_files (hash, path, key, sha256, bytes)
            VALUES (:hash, :path, :key, :sha256, :bytes) ON CONFLICT DO NOTHING
        """),
        [
            {"hash": content_hash, "path": file.path, "key": file.key, "sha256": file.sha256, "bytes": file.bytes}
            for file in listed
        ],
    )
    return new


def forget_files(conn: Connection, content_hash: str, keep: timedelta) -> None:
    """Forget a content that nothing refers to; objects that no other content shares will be deleted."""
    conn.execute(
        text("""
            WITH gone AS (DELETE FROM model_files WHERE hash = :hash RETURNING key)
            INSERT INTO doomed_objects (key, delete_after)
            SELECT DISTINCT key, clock_timestamp() + CAST(:keep AS interval) FROM gone
            WHERE NOT EXISTS (SELECT FROM model_files f WHERE f.key = gone.key AND f.hash <> :hash)
            ON CONFLICT DO NOTHING
        """),
        {"hash": content_hash, "keep": keep},
    )


def insert(
    conn: Connection, *, name: str, kind: str, found: Content, project_id: UUID | None = None
) -> RowMapping | None:
    """Give a content a name, for one project or for all; None when the name is taken."""
    parameters = {
        "name": name,
        "hash": found.hash,
        "kind": kind,
        "family": found.family,
        "bytes": found.bytes,
        "profile": found.profile,
        "source": found.source,
        "project": project_id,
    }
    return conn.execute(_INSERT, parameters).mappings().one_or_none()


def names(conn: Connection, seen_by: UUID | None = None) -> dict[str, str]:
    """The name of each content hash that has one, as far as a project may see them."""
    statement = text(f"SELECT m.hash, min(m.name) AS name FROM models m WHERE {SEEN} GROUP BY m.hash")
    found = conn.execute(statement, {"seen_by": seen_by})
    return {row.hash: row.name for row in found}


def remove(conn: Connection, name: str) -> bool:
    """Forget a name; its content stays for the recipes that hold its hash."""
    return conn.execute(text("DELETE FROM models WHERE name = :name"), {"name": name}).rowcount > 0
