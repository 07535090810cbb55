"""Projects and API keys."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, RowMapping, text

_COLUMNS = "k.id, k.name, k.prefix, k.scopes, k.created_at, k.expires_at, k.revoked_at"

_ENSURE = text("""
    WITH made AS (INSERT INTO projects (id, name) VALUES (:id, :name) ON CONFLICT (name) DO NOTHING RETURNING id)
    SELECT id FROM made UNION ALL SELECT id FROM projects WHERE name = :name LIMIT 1
""")

_INSERT = text("""
    INSERT INTO api_keys AS k (id, project_id, name, prefix, digest, scopes, expires_at)
    VALUES (:id, :project_id, :name, :prefix, :digest, :scopes, :expires_at)
    RETURNING k.id, k.name, k.prefix, k.scopes, k.created_at, k.expires_at, k.revoked_at
""")

_LIVE = text("""
    SELECT k.id, k.digest, k.scopes, k.project_id, p.name AS project,
           p.max_requests_per_second AS requests_per_second,
           extract(epoch FROM k.expires_at - clock_timestamp()) AS seconds_left
    FROM api_keys k JOIN projects p ON p.id = k.project_id
    WHERE k.prefix = :prefix AND k.revoked_at IS NULL
      AND (k.expires_at IS NULL OR k.expires_at > clock_timestamp())
""")

_EVERY = text(f"""
    SELECT {_COLUMNS}, p.name AS project FROM api_keys k JOIN projects p ON p.id = k.project_id ORDER BY k.id
""")

_REVOKE = text(f"""
    UPDATE api_keys k SET revoked_at = coalesce(k.revoked_at, clock_timestamp()) FROM projects p
    WHERE k.id = :id AND p.id = k.project_id RETURNING {_COLUMNS}, p.name AS project
""")


def ensure_project(conn: Connection, new_id: UUID, name: str) -> UUID:
    """The project of this name, made now if there is none."""
    found: UUID = conn.execute(_ENSURE, {"id": new_id, "name": name}).scalar_one()
    return found


def projects(conn: Connection) -> Sequence[RowMapping]:
    """Id and name of each project."""
    return conn.execute(text("SELECT id, name FROM projects ORDER BY name")).mappings().all()


def insert(conn: Connection, **key: Any) -> RowMapping:
    """Store a key's digest."""
    return conn.execute(_INSERT, key).mappings().one()


def live(conn: Connection, prefix: str) -> Sequence[RowMapping]:
    """Keys with this prefix that are neither revoked nor expired."""
    return conn.execute(_LIVE, {"prefix": prefix}).mappings().all()


def every(conn: Connection) -> Sequence[RowMapping]:
    """All keys of all projects."""
    return conn.execute(_EVERY).mappings().all()


def revoke(conn: Connection, key_id: UUID) -> RowMapping | None:
    """End a key now, or leave it ended."""
    return conn.execute(_REVOKE, {"id": key_id}).mappings().one_or_none()
