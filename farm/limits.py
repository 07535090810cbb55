"""Limits of a project: what a submission may add, how many of its jobs may run, how much a day, how much it may keep.

Requests per second are the API's own business (`api/limiting.py`); everything here is exact, in the transaction that
adds.
"""

import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from uuid import UUID

from sqlalchemy import Connection, RowMapping

from farm.errors import LimitReached, NotFound, TooLarge
from farm.queries import limits as rows
from farm.views_tenants import LimitsView, ProjectView, UseView

UNKNOWN_WAIT = timedelta(minutes=1)
"""When a place in the queue frees if nothing of the project was rendered lately."""
LONGEST_WAIT = timedelta(hours=1)


def get(conn: Connection, project: UUID) -> ProjectView:
    """A project with its limits and use. Raises NotFound."""
    return _view(_found(rows.shown(conn, project)))


def every(conn: Connection) -> list[ProjectView]:
    """All projects by name."""
    return [_view(row) for row in rows.every(conn)]


def change(conn: Connection, project: UUID, wanted: Mapping[str, int | None]) -> ProjectView:
    """Set some limits; None takes one away. What is accepted already stays. Raises NotFound."""
    rows.change(conn, project, wanted)
    return get(conn, project)


def hold(conn: Connection, project: UUID, *, coming: int = 0, pixel_steps: int = 0, asked: int) -> None:
    """To be called last in a transaction that queued jobs: all of them count, and none is stored if they are too many.

    `coming` are jobs that will be queued later, `pixel_steps` what was just added to the day, `asked` the jobs of this
    request. Whoever passes holds the project until the commit, so two requests never pass by the same place. Raises
    LimitReached; TooLarge for what would never be accepted.
    """
    if not rows.limited(conn, project):
        return
    rows.lock(conn, [project])
    use = _found(rows.use(conn, project))
    queued, spent = int(use["queued"]) + coming, int(use["pixel_steps"]) + pixel_steps
    most, daily = use["queued_jobs"], use["pixel_steps_per_day"]
    if daily is not None and pixel_steps and spent > daily:
        _refuse("pixel_steps_per_day", daily, spent - pixel_steps, pixel_steps, use["tomorrow"] - use["now"], use)
    if most is not None and queued > most:
        _refuse("queued_jobs", most, queued - asked, asked, _until(conn, project, queued - most), use)
    if daily is not None and pixel_steps:
        rows.spend(conn, project, pixel_steps=spent, now=use["now"])


def hold_upload(conn: Connection, project: UUID, size: int) -> None:
    """To be called last in the transaction that stored an upload of `size` bytes: it counts too. As `hold`."""
    if rows.uploaded(conn, project) is not None:
        rows.lock(conn, [project])
        _check_upload(conn, project, size, stored=size)


def refuse_upload(conn: Connection, project: UUID, size: int) -> None:
    """Refuse an upload of `size` bytes before it is sent anywhere. Raises LimitReached, TooLarge."""
    _check_upload(conn, project, size, stored=0)


def _check_upload(conn: Connection, project: UUID, size: int, *, stored: int) -> None:
    found = rows.uploaded(conn, project)
    if found is not None and (used := int(found["used"]) - stored) + size > found["most"]:
        # Nobody knows when: somebody deletes some, or they go after their time.
        _refuse("upload_bytes", found["most"], used, size, LONGEST_WAIT, found)


def refuse_full(conn: Connection, project: UUID) -> None:
    """Refuse before any work was done what could not be accepted however small it is. Raises LimitReached."""
    if not rows.limited(conn, project):
        return
    use = _found(rows.use(conn, project))
    queued, spent = int(use["queued"]), int(use["pixel_steps"])
    most, daily = use["queued_jobs"], use["pixel_steps_per_day"]
    if daily is not None and spent >= daily:
        _refuse("pixel_steps_per_day", daily, spent, None, use["tomorrow"] - use["now"], use)
    if most is not None and queued >= most:
        _refuse("queued_jobs", most, queued, None, _until(conn, project, queued + 1 - most), use)


def room(conn: Connection) -> dict[UUID, int]:
    """How many more jobs may run now of each project that has such a limit; mostly there is none."""
    return rows.running_left(conn)


def startable(conn: Connection, jobs: Sequence[UUID]) -> list[UUID]:
    """Those of these locked jobs that may start now, in their order, without going past a limit of running jobs.

    Their projects are held until the commit, so two workers never start the same last one.
    """
    owners = rows.owners(conn, jobs)
    if not owners:
        return list(jobs)
    rows.lock(conn, set(owners.values()))
    left = rows.running_left(conn, set(owners.values()))
    kept = []
    for job in jobs:
        project = owners.get(job)
        if project is not None:
            left[project] -= 1
            if left[project] < 0:
                continue
        kept.append(job)
    return kept


def _until(conn: Connection, project: UUID, places: int) -> timedelta:
    """When so many places will have become free, by what was rendered in the last minute."""
    rate = rows.rate(conn, project)
    return min(timedelta(seconds=places / rate), LONGEST_WAIT) if rate > 0 else UNKNOWN_WAIT


def _refuse(name: str, most: int, used: int, asked: int | None, wait: timedelta, use: RowMapping) -> None:
    words = name.replace("_", " ")
    if asked is not None and asked > most:
        raise TooLarge(
            f"this alone asks for {asked} {words}, and the project's limit is {most}: send less at a time",
            limit=name,
            value=most,
            asked=asked,
        )
    raise LimitReached(
        f"the project's limit of {most} {words} is reached: {used} are in use"
        + (f", {asked} were asked for" if asked else ""),
        limit=name,
        value=most,
        used=used,
        retry_after=max(1, math.ceil(wait.total_seconds())),
        frees_at=(use["now"] + wait).isoformat(),
    )


def _found(row: RowMapping | None) -> RowMapping:
    if row is None:
        raise NotFound("there is no such project")
    return row


def _view(row: RowMapping) -> ProjectView:
    return ProjectView(
        id=row["id"],
        name=row["name"],
        created_at=row["created_at"],
        limits=LimitsView(**{name: row[name] for name in rows.NAMES}),
        use=UseView(
            queued_jobs=row["queued"],
            running_jobs=row["running"],
            pixel_steps_today=row["pixel_steps"],
            upload_bytes=row["uploaded"],
        ),
    )
