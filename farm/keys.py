"""Projects and their API keys: 256 random bits, shown once, stored hashed, compared in constant time."""

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection

from farm.errors import InvalidRequest, NotFound, Unauthorized
from farm.ids import new_id
from farm.queries import keys as rows
from farm.resolving import unknown
from farm.views import KeyView

SCOPES = frozenset({"jobs:read", "jobs:submit", "jobs:manage", "jobs:write", "admin"})
"""Look; submit; cancel, pause, retry, delete and set webhooks; both of these; keys, models and limits of the farm."""
WIDER = {"jobs:write": frozenset({"jobs:submit", "jobs:manage"})}
"""Scopes that hold others."""

PREFIX_LENGTH = 12
"""Characters of a key that may be shown and by which it is found: `farm_` and seven more."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request. `seconds_left`: how long the key was still valid when it was looked up; None for ever."""

    project_id: UUID
    project: str
    key_id: UUID
    scopes: frozenset[str]
    requests_per_second: int | None = None
    seconds_left: float | None = None

    @property
    def sees(self) -> UUID | None:
        """The project whose models it is told of beside the shared ones; None for an admin, who is told of all."""
        return None if "admin" in self.scopes else self.project_id


def create_key(
    conn: Connection, *, project: str, name: str, scopes: Iterable[str], expires_at: datetime | None = None
) -> KeyView:
    """Make a key, and its project if there is none of this name. The answer is the only place that holds the secret.

    Raises InvalidRequest on a scope that does not exist or an empty name.
    """
    wanted = sorted(set(scopes))
    unknown = [scope for scope in wanted if scope not in SCOPES]
    if unknown or not wanted:
        raise InvalidRequest(f"scopes are some of {', '.join(sorted(SCOPES))}; got {', '.join(unknown) or 'none'}")
    if not project.strip() or not name.strip():
        raise InvalidRequest("a key needs a project and a name")
    key = "farm_" + secrets.token_urlsafe(32)
    project_id = rows.ensure_project(conn, new_id(), project.strip())
    row = rows.insert(
        conn,
        id=new_id(),
        project_id=project_id,
        name=name.strip(),
        prefix=key[:PREFIX_LENGTH],
        digest=_digest(key),
        scopes=wanted,
        expires_at=expires_at,
    )
    return KeyView(**{**row, "project": project.strip()}, key=key)


def authenticate(conn: Connection, key: str) -> Caller:
    """The caller behind a key. Raises Unauthorized when it is unknown, revoked or expired."""
    digest = _digest(key)
    found = None
    for row in rows.live(conn, key[:PREFIX_LENGTH]):
        if hmac.compare_digest(bytes(row["digest"]), digest):
            found = row
    if found is None:
        raise Unauthorized
    scopes = frozenset(found["scopes"]).union(*(WIDER.get(scope, ()) for scope in found["scopes"]))
    left = found["seconds_left"]
    return Caller(
        found["project_id"],
        found["project"],
        found["id"],
        scopes,
        found["requests_per_second"],
        None if left is None else float(left),
    )


def project_named(conn: Connection, name: str) -> UUID:
    """The project of this name. Raises InvalidRequest with those that are named nearly so."""
    projects = {row["name"]: row["id"] for row in rows.projects(conn)}
    if name not in projects:
        problem = unknown("project", name, projects)
        raise InvalidRequest(problem, problems=[{"field": "project", "problem": problem}])
    found: UUID = projects[name]
    return found


def list_keys(conn: Connection) -> list[KeyView]:
    """Every key, newest last, without secrets."""
    return [KeyView(**row) for row in rows.every(conn)]


def revoke_key(conn: Connection, key_id: UUID) -> KeyView:
    """End a key. Raises NotFound; revoking twice changes nothing."""
    row = rows.revoke(conn, key_id)
    if row is None:
        raise NotFound(f"there is no key {key_id}")
    return KeyView(**row)


def _digest(key: str) -> bytes:
    # The key has 256 bits of its own: a slow password hash would add nothing but load.
    return hashlib.sha256(key.encode()).digest()
