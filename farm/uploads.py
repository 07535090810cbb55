"""Uploads: pictures that a project sent for its jobs, stored once by the sha256 of their bytes.

They belong to one project, which names them by that hash. A job keeps the uploads it names as long as it is there; what
no job names goes after `keep_uploads`.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol
from uuid import UUID

from sqlalchemy import Connection

from farm import imagefile, limits
from farm.db import Database
from farm.errors import Conflict, InvalidRequest, NotFound, Unavailable
from farm.objects import upload_key
from farm.queries import uploads as rows
from farm.settings import Settings
from farm.views import Page, UploadView

PATIENCE = timedelta(hours=1)
"""How long an object without a row is left alone: far longer than sending one takes."""
TRIES = 3
LOOKED_UP = 20_000
"""Uploads of one submission that are remembered, so that a mask of a million jobs is looked up a few times."""


class ObjectStore(Protocol):
    """The part of `farm.storage.Store` that uploads need."""

    def put(self, key: str, data: bytes, content_type: str, sha256: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Size:
    """A picture's size in pixels."""

    width: int
    height: int


def add(
    database: Database, store: ObjectStore, settings: Settings, project: UUID, data: bytes, media_type: str
) -> tuple[UploadView, bool]:
    """Check and store a picture; answers it and whether it is new. One that is there already counts as used.

    Raises what `imagefile.check` raises, InvalidRequest when it is something else than `media_type` says, LimitReached
    or TooLarge past the project's limit of bytes, Unavailable when Postgres or S3 is away. Whatever ends this halfway,
    nothing is left behind for good.
    """
    found = imagefile.check(data, settings.max_image_pixels)
    if media_type != found.media_type:
        raise InvalidRequest(f"this is {found.media_type}, but the request says {media_type}")
    hash_ = hashlib.sha256(data).hexdigest()
    key = upload_key(project, hash_)
    for _ in range(TRIES):
        with database.transaction() as conn:
            known = rows.touch(conn, project, [hash_])
            if known:
                return UploadView(**known[0]), False
            limits.refuse_upload(conn, project, len(data))
            rows.announce(conn, key, PATIENCE)
        store.put(key, data, found.media_type, hash_)
        with database.transaction() as conn:
            # Neither a mark nor a row: a sweeper took the object away between the two transactions.
            if rows.written(conn, key) or rows.get(conn, project, hash_):
                row = rows.insert(
                    conn,
                    project=project,
                    hash=hash_,
                    key=key,
                    media_type=found.media_type,
                    width=found.width,
                    height=found.height,
                    bytes=len(data),
                )
                limits.hold_upload(conn, project, len(data))
                return UploadView(**row), True
    raise Unavailable("the picture was deleted as fast as it was stored; send it again")


def get(conn: Connection, project: UUID, hash_: str) -> UploadView:
    """One upload. Raises NotFound, also for another project's."""
    row = rows.get(conn, project, hash_)
    if row is None:
        raise NotFound(f"there is no upload {hash_}")
    return UploadView(**row)


def page(conn: Connection, project: UUID, *, cursor: str | None, limit: int) -> Page[UploadView]:
    """Uploads of a project in order of their hashes."""
    found = rows.page(conn, project, after=cursor or "", limit=limit + 1)
    items = [UploadView(**row) for row in found[:limit]]
    return Page(items=items, next_cursor=items[-1].hash if len(found) > limit else None)


def delete(conn: Connection, project: UUID, hash_: str, settings: Settings) -> None:
    """Forget an upload; its object goes a little later. Raises NotFound, and Conflict while a job names it."""
    if not rows.lock(conn, project, hash_):
        raise NotFound(f"there is no upload {hash_}")
    if not rows.forget(conn, [(project, hash_)], settings.keep_deleted):
        raise Conflict(
            "jobs name this upload, and may be retried or replayed; delete them first (those of a deleted batch let go "
            "of it a little later)"
        )


def forget_unused(conn: Connection, settings: Settings, limit: int) -> int:
    """Let go of uploads that no job names and nobody has used for long. Answers how many were looked at."""
    due = rows.due(conn, settings.keep_uploads, limit)
    if due:
        rows.forget(conn, due, settings.keep_deleted)
    return len(due)


class Known:
    """The uploads that a submission may name, asked for in pieces."""

    def __init__(self, ask: Callable[[Collection[str]], Mapping[str, Size]]) -> None:
        self._ask = ask
        self._kept: OrderedDict[str, Size] = OrderedDict()

    def __call__(self, hashes: Collection[str]) -> dict[str, Size]:
        """The sizes of those that exist."""
        found = {hash_: self._kept[hash_] for hash_ in hashes if hash_ in self._kept}
        missing = [hash_ for hash_ in hashes if hash_ not in found]
        if missing:
            found |= self._ask(missing)
        for hash_, size in found.items():
            self._kept[hash_] = size
            self._kept.move_to_end(hash_)
        while len(self._kept) > LOOKED_UP:
            self._kept.popitem(last=False)
        return found


def sizes(conn: Connection, project: UUID, hashes: Collection[str]) -> dict[str, Size]:
    """Those of these uploads that the project has; they count as used now, so none goes while a batch is checked."""
    return {row["hash"]: Size(row["width"], row["height"]) for row in rows.touch(conn, project, hashes)}
