"""Registrations: models on their way into the farm, as rows that survive whoever works on them.

A worker claims one by a lease, fetches, checks, stores and tests the model, and every word it says names its attempt: a
worker that lost its lease changes nothing. A lease that runs out is found by the next claim. A failure that may pass
(the hub, S3, memory) is tried again later; a crash of the worker counts apart; what is wrong with the files ends it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, RowMapping

from farm import catalogue, keys
from farm.errors import Conflict, FarmError, InvalidModel, InvalidRequest, NotFound
from farm.families import WELL_KNOWN
from farm.ids import new_id
from farm.modelfiles import FoundModel
from farm.modelkinds import ModelKind
from farm.queries import models as model_rows
from farm.queries import registrations as rows
from farm.resolving import OWN, TINY
from farm.settings import Settings
from farm.sources import parse
from farm.views import RegistrationView

MOST_FAILURES = 5
"""Tries that may fail for reasons that pass; the last one's reason refuses the model."""
MOST_CRASHES = 2
"""Workers that may vanish over one model before it is held to be the cause."""
PAUSES = (5.0, 20.0, 60.0, 180.0)
"""Seconds before the next try, by failures so far; the last one repeats."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
RESERVED = (OWN, TINY)


Row = RowMapping | Mapping[str, Any]


class Lost(FarmError):
    """The registration is no longer this worker's: its lease ran out, or somebody cancelled it."""

    code = "conflict"


@dataclass(frozen=True, slots=True)
class Claim:
    """One attempt at a registration. `wanted` holds what a person said: family, variant, profile, path.

    `raw` is the content hash of files that are in the store already, as somebody sent them.
    """

    id: UUID
    attempt: int
    name: str
    kind: ModelKind
    source: str
    wanted: Mapping[str, Any]
    raw: str | None


def ask(
    conn: Connection,
    *,
    name: str,
    kind: ModelKind | None,
    source: str,
    wanted: Mapping[str, Any],
    pool: str,
    project: str | None = None,
) -> RegistrationView:
    """Ask for a model from the hub or from S3. An adapter without a kind is a style, unless the farm knows its
    repository for something else.

    Raises InvalidRequest for a source or a project that is none, Conflict if the name is taken or being registered.
    """
    try:
        place = parse(source).place
    except ValueError as error:
        raise InvalidRequest(str(error), problems=[{"field": "source", "problem": str(error)}]) from error
    known = WELL_KNOWN.get(place)
    chosen: ModelKind = kind or (known[0] if known else "style")
    family = known[1] if known and known[0] == chosen else None
    given = {**wanted, "family": wanted.get("family") or family}
    return submit(conn, name=name, kind=chosen, source=source, wanted=given, pool=pool, project=project)


def submit(
    conn: Connection,
    *,
    name: str,
    kind: ModelKind,
    source: str,
    wanted: Mapping[str, Any],
    pool: str,
    project: str | None = None,
    raw: FoundModel | None = None,
    uploader: UUID | None = None,
    lease: timedelta | None = None,
) -> RegistrationView:
    """Ask for a model under a name, for jobs of one project alone if its name is given.

    `raw` are files that the caller uploads next, as `uploader` and holding a lease; then it gives the registration
    back, and a worker goes on. Raises Conflict if the name is taken or being registered, InvalidRequest for a project
    that is none."""
    if not NAME.fullmatch(name):
        problem = (
            "a name begins with a letter or digit and goes on with those, dots, dashes and underscores, 100 at most"
        )
        raise InvalidRequest(f"{name!r}: {problem}", problems=[{"field": "name", "problem": problem}])
    if kind == "vae" and name in RESERVED:
        raise Conflict(f"{name} is a word that jobs use for their VAE; choose another name")
    if catalogue.is_taken(conn, name):
        raise Conflict(f"the name {name} is taken; remove it first or choose another")
    owner = None if project is None else keys.project_named(conn, project)
    given = {key: value for key, value in wanted.items() if value not in (None, {})}
    content = raw.hash if raw else None
    fresh = [raw.hash] if raw and catalogue.put_files(conn, raw) else []
    row = rows.insert(
        conn, registration=new_id(), name=name, kind=kind, source=source, wanted=given, pool=pool, raw=content,
        fresh=fresh, worker=uploader, lease=lease, project_id=owner,
    )  # fmt: skip
    if row is None:
        raise Conflict(f"{name} is being registered right now; wait for it, or cancel that registration")
    return _view(row)


def get(conn: Connection, registration: UUID) -> RegistrationView:
    """One registration. Raises NotFound."""
    return _view(row_of(conn, registration))


def row_of(conn: Connection, registration: UUID) -> RowMapping:
    """Its row. Raises NotFound."""
    row = rows.get(conn, registration)
    if row is None:
        raise NotFound("there is no such registration")
    return row


def newest(conn: Connection, limit: int = 100) -> list[RegistrationView]:
    """Registrations, the newest first."""
    return [_view(row) for row in rows.newest(conn, limit)]


def cancel(conn: Connection, registration: UUID, settings: Settings) -> RegistrationView:
    """End a registration that is under way; one that ended stays as it is. Raises NotFound."""
    row = rows.cancel(conn, registration, "cancelled")
    if row is not None:
        _forget(conn, row, settings)
    return get(conn, registration)


def claim(conn: Connection, *, worker: UUID, settings: Settings) -> Claim | None:
    """Take the oldest registration nobody works on. One that ended too many workers is refused instead."""
    row = rows.claim(conn, worker=worker, pool=settings.pool, lease=settings.lease)
    if row is None:
        return None
    if row["crashes"] > MOST_CRASHES:
        reason = f"{row['crashes']} workers vanished over it, the last one while {row['state']}"
        _end(conn, row, settings, "refused", reason, ())
        return claim(conn, worker=worker, settings=settings)
    return held_by(row)


def held_by(row: Row) -> Claim:
    """The attempt that a row is at."""
    return Claim(row["id"], row["attempt"], row["name"], row["kind"], row["source"], row["wanted"], row["raw"])


def renew(conn: Connection, held: Claim, settings: Settings, bytes_: int | None) -> None:
    """Prolong the lease, and tell how many bytes were fetched, where that is news. Raises Lost."""
    _hold(rows.renew(conn, held.id, held.attempt, lease=settings.lease, bytes_=bytes_))


def enter(conn: Connection, held: Claim, state: str, **known: Any) -> None:
    """A stage begins. Raises Lost."""
    _hold(rows.enter(conn, held.id, held.attempt, state, **known))


def store(conn: Connection, held: Claim, found: FoundModel) -> None:
    """The checked files are about to be uploaded: from now on they are kept. Raises Lost."""
    _hold(
        rows.enter(
            conn,
            held.id,
            held.attempt,
            "storing",
            hash=found.hash,
            family=found.family,
            bytes=found.bytes,
            total_bytes=found.bytes,
        )
    )
    if catalogue.put_files(conn, found):
        rows.brought(conn, held.id, found.hash)


def publish(conn: Connection, held: Claim, found: FoundModel, notes: Sequence[str], settings: Settings) -> None:
    """Jobs may name the model from now on: all, or those of its project. Raises Lost, Conflict if the name was taken
    meanwhile."""
    _hold(rows.finish(conn, held.id, held.attempt, "available", reason=None, notes=notes))
    row = row_of(conn, held.id)
    catalogue.publish(conn, name=held.name, kind=held.kind, found=found, project_id=row["project_id"])
    _forget(conn, row, settings)


def refuse(conn: Connection, held: Claim, reason: str, settings: Settings) -> None:
    """The model cannot be used; what was stored of it will be deleted. Raises Lost."""
    row = row_of(conn, held.id)
    _end(conn, {**row, "attempt": held.attempt}, settings, "refused", reason, ())


def give_back(conn: Connection, held: Claim, settings: Settings, reason: str | None = None) -> None:
    """Let another try have it: with a reason after a failure that may pass, without one because the worker leaves.

    The last failure allowed refuses the model. Raises Lost.
    """
    if reason is None:
        _hold(rows.give_back(conn, held.id, held.attempt, failures=0, reason=None, pause=timedelta(0)))
        return
    failures = row_of(conn, held.id)["failures"]
    if failures + 1 >= MOST_FAILURES:
        refuse(conn, held, f"tried {failures + 1} times; at last: {reason}", settings)
        return
    pause = timedelta(seconds=PAUSES[min(failures, len(PAUSES) - 1)])
    _hold(rows.give_back(conn, held.id, held.attempt, failures=1, reason=reason, pause=pause))


def reason_of(error: Exception) -> str:
    """An error in a person's words, of bounded length."""
    if isinstance(error, FarmError):
        return error.message[:2000]
    return f"{type(error).__name__}: {error}"[:2000]


def is_final(error: Exception) -> bool:
    """Whether trying again cannot help."""
    return isinstance(error, InvalidModel | Conflict | NotFound)


def _end(conn: Connection, row: Row, settings: Settings, state: str, reason: str, notes: Sequence[str]) -> None:
    _hold(rows.finish(conn, row["id"], row["attempt"], state, reason=reason[:2000], notes=notes))
    _forget(conn, row, settings)


def _forget(conn: Connection, row: Row, settings: Settings) -> None:
    """Let go of what a registration brought and nobody needs. Older contents stay: recipes may hold their hash."""
    for content_hash in row["fresh"]:
        if rows.unneeded(conn, content_hash):
            model_rows.forget_files(conn, content_hash, settings.keep_deleted)


def _hold(held: bool) -> None:  # the answer of a fenced statement
    if not held:
        raise Lost


def _view(row: RowMapping) -> RegistrationView:
    return RegistrationView(**row)
