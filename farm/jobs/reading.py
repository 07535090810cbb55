"""Looking at jobs, batches, lanes and workers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import Connection, RowMapping

from farm.cursors import decode, next_cursor
from farm.errors import InvalidRequest, NotFound
from farm.formats import format_of
from farm.jobs.running import StoredImage
from farm.queries import models as model_rows
from farm.queries import reading as rows
from farm.queries import workers as worker_rows
from farm.states import JobState
from farm.views import (
    BatchView,
    ControlChoice,
    Counts,
    Event,
    ImageView,
    JobError,
    JobView,
    LaneView,
    Page,
    ReplayView,
    WorkerView,
)

EVENTS_AT_ONCE = 200
LOST_AFTER = "20 seconds"
"""A worker whose heartbeat is older is shown as lost."""

START = ("0", UUID(int=0))


def get_job(conn: Connection, project_id: UUID, job_id: UUID) -> JobView:
    """One job. Raises NotFound, also for another project's."""
    row = rows.job(conn, project_id, job_id)
    if row is None:
        raise NotFound(f"there is no job {job_id}")
    return job_view(row)


def image_of(conn: Connection, project_id: UUID, job_id: UUID) -> StoredImage:
    """Where a job's picture lies. Raises NotFound, with the job's state where there is no picture yet."""
    row = rows.job(conn, project_id, job_id)
    if row is None:
        raise NotFound(f"there is no job {job_id}")
    if row["key"] is None:
        raise NotFound(f"job {job_id} is {row['state']} and has no image", state=row["state"])
    names = ("key", "thumbnail_key", "sha256", "bytes", "width", "height", "thumbnail_bytes")
    return StoredImage(**{name: row[name] for name in names})


def list_jobs(
    conn: Connection,
    project_id: UUID,
    *,
    states: Sequence[JobState | str] = (),
    labels: Mapping[str, str] | None = None,
    batch: UUID | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> Page[JobView]:
    """Jobs of a batch in their order, or of the project newest first; `labels` must all match.

    Raises InvalidRequest for a cursor that no page gave, NotFound for an unknown batch.
    """
    if batch is not None:
        get_batch(conn, project_id, batch)
    found = rows.jobs(
        conn,
        project_id,
        states=[str(state) for state in states],
        labels=labels or {},
        batch=batch,
        after=decode(cursor),
        limit=limit + 1,
    )
    return Page(items=[job_view(row) for row in found[:limit]], next_cursor=next_cursor(found, limit))


def get_batch(conn: Connection, project_id: UUID, batch_id: UUID) -> BatchView:
    """One batch with its counts. Raises NotFound, also for another project's."""
    row = rows.batch(conn, project_id, batch_id)
    if row is None:
        raise NotFound(f"there is no batch {batch_id}")
    return batch_view(row)


def list_batches(
    conn: Connection,
    project_id: UUID,
    *,
    state: Literal["active", "done", "paused"] | None = None,
    labels: Mapping[str, str] | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> Page[BatchView]:
    """Batches of the project, newest first."""
    found = rows.batches(conn, project_id, state=state, labels=labels or {}, after=decode(cursor), limit=limit + 1)
    return Page(items=[batch_view(row) for row in found[:limit]], next_cursor=next_cursor(found, limit))


def queue(conn: Connection, seen_by: UUID | None = None) -> list[LaneView]:
    """Every lane with open jobs, deepest first, at most a thousand. Names of models as for `workers`."""
    return [
        LaneView(
            lane=row["lane"],
            pool=row["pool"],
            checkpoint=row["checkpoint"],
            depth=row["depth"],
            running=row["running"],
            oldest_age_seconds=None if row["age"] is None else float(row["age"]),
            images_per_second=round(float(row["rate"]), 3),
        )
        for row in rows.queue(conn, seen_by)
    ]


def workers(conn: Connection, seen_by: UUID | None = None) -> list[WorkerView]:
    """Every worker that has not left. What is warm is told by name, or by hash where the name is gone or not for the
    project that looks; None sees all."""
    names = model_rows.names(conn, seen_by)
    return [
        WorkerView(
            **{
                **row,
                "name": row["place"],
                "state": "lost" if row["lost"] else row["state"],
                "warm": [_warm_view(pipeline, names) for pipeline in row["warm"]],
                "cache": _cache_view(row["cache"], names),
                "resting": [
                    {**one, "checkpoint": names.get(one["checkpoint"], one["checkpoint"])} for one in row["resting"]
                ],
            }
        )
        for row in worker_rows.present(conn, LOST_AFTER)
    ]


def _cache_view(cache: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    waiting = [
        {**one, "hash": one["checkpoint"], "checkpoint": names.get(one["checkpoint"], one["checkpoint"])}
        for one in cache.get("waiting", [])
    ]
    return {**cache, "waiting": waiting} if cache else {}


def _warm_view(pipeline: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    checkpoint = pipeline.get("checkpoint", "")

    def named(kind: str) -> list[dict[str, Any]]:
        return [{**use, "name": names.get(use.get("hash", ""), use.get("hash", ""))} for use in pipeline.get(kind, [])]

    return {
        **pipeline,
        "hash": checkpoint,
        "checkpoint": names.get(checkpoint, checkpoint),
        "adapters": named("adapters"),
        "slots": named("slots"),
        "controlnets": named("controlnets"),
        "motions": named("motions"),
    }


def events(conn: Connection, project_id: UUID, batch_id: UUID, after: str | None) -> list[Event]:
    """What happened in a batch since event `after`: jobs that became terminal in commit order, then its progress.

    The last event is `done` once every terminal job was reported and none is open. Raises NotFound; InvalidRequest for
    an id that no event had.
    """
    cursor = _event_cursor(after)
    batch = get_batch(conn, project_id, batch_id)
    found = rows.finished(conn, project_id, batch_id, xid=cursor[0], job_id=cursor[1], limit=EVENTS_AT_ONCE)
    out = [
        Event(id=f"{row['xid']}.{row['id']}", event="job", data=job_view(row).model_dump(mode="json")) for row in found
    ]
    last = out[-1].id if out else f"{cursor[0]}.{cursor[1]}"
    progress = batch.model_dump(mode="json")
    out.append(Event(id=last, event="progress", data=progress))
    if batch.done and not found and not rows.unseen(conn, batch_id, xid=cursor[0], job_id=cursor[1]):
        out.append(Event(id=last, event="done", data=progress))
    return out


def job_view(row: RowMapping) -> JobView:
    """The view of a job's row."""
    body, names = row["body"], row["names"]
    image = None
    if row["sha256"] is not None:
        image = ImageView(sha256=row["sha256"], bytes=row["bytes"], width=row["width"], height=row["height"])
    error = None
    if row["error_code"] is not None:
        error = JobError(code=row["error_code"], message=row["error_message"] or "")
    replay = None
    if row["original_id"] is not None:
        apart = {name: row[name] for name in ("levels", "mean_levels", "differing")}
        replay = ReplayView(of=row["original_id"], **apart)
    wanted = ("prompt", "negative_prompt", "width", "height", "steps", "guidance_scale", "scheduler", "seed", "task")
    recipe: dict[str, Any] = {name: body[name] for name in wanted}
    recipe |= {name: body.get(name) for name in ("strength", "mask", "composite", "frames", "fps", "quality")}
    same = ("id", "batch_id", "number", "state", "attempt", "priority", "labels", "warnings")
    moments = ("created_at", "run_at", "started_at", "finished_at")
    return JobView(
        **{name: row[name] for name in (*same, *moments)},
        **recipe,
        checkpoint=names["checkpoint"],
        adapters=names["adapters"],
        acceleration=names["acceleration"],
        vae=names.get("vae"),
        source=body.get("image"),
        motion=names.get("motion"),
        format=format_of(body),
        controls=[ControlChoice(**use, name=names["controlnets"][use["hash"]]) for use in body.get("controls", ())],
        error=error,
        image=image,
        replay=replay,
    )


def batch_view(row: RowMapping) -> BatchView:
    """The view of a batch's row."""
    counts = Counts(**{name: int(row[name] or 0) for name in Counts.model_fields})
    rate = float(row["rate"])
    left = counts.queued + counts.running
    eta = 0.0 if left == 0 else (left / rate if rate > 0 and not row["paused"] else None)
    same = ("id", "name", "total", "priority", "paused", "labels", "warnings", "created_at")
    stop = ("stop_at_failed_share", "stop_reason")
    return BatchView(
        **{name: row[name] for name in (*same, *stop)},
        counts=counts,
        images_per_second=round(rate, 3),
        eta_seconds=None if eta is None else round(eta, 1),
    )


def _event_cursor(after: str | None) -> tuple[str, UUID]:
    if not after:
        return START
    xid, _, job = after.partition(".")
    try:
        return _xid(xid), UUID(job)
    except ValueError as error:
        raise InvalidRequest("Last-Event-ID is not the id of an event of this stream") from error


def _xid(text: str) -> str:
    """A transaction id as Postgres reads it, 64 bits without a sign. Raises ValueError."""
    if not re.fullmatch(r"[0-9]{1,20}", text) or int(text) >= 2**64:
        raise ValueError(f"{text} is no transaction id")
    return text
