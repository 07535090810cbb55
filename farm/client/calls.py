"""Every request the client makes, described without making it: `Farm` and `AsyncFarm` only carry these out."""

import math
from collections.abc import AsyncIterable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypedDict, TypeVar
from urllib.parse import quote
from uuid import UUID, uuid4

import orjson
from pydantic import TypeAdapter

from farm.errors import FarmError, InvalidRequest
from farm.modelkinds import ADAPTERS, ModelKind, collection
from farm.states import JobState
from farm.views import (
    AdapterView,
    BatchView,
    CheckpointView,
    ControlNetView,
    DryRun,
    ImageLink,
    JobView,
    KeyView,
    LaneView,
    MotionView,
    Page,
    RegistrationView,
    UploadView,
    VaeView,
    WorkerView,
)

T = TypeVar("T")

API = "/api/v1"
CHUNK_BYTES = 64 * 1024
"""NDJSON lines are sent in pieces of about this size."""

Row = str | Mapping[str, Any]
"""One job to submit: a prompt alone, or the fields of a job."""
Rows = Iterable[Row]
AsyncRows = Rows | AsyncIterable[Row]
Id = UUID | str
Registered = ModelKind | Literal["adapter"]
"""What a model is registered as; an `adapter` is a style unless the farm knows its repository for an acceleration."""
States = JobState | str | Sequence[JobState | str]


class JobFields(TypedDict, total=False):
    """What a job may say besides its prompt; whatever is absent comes from the checkpoint's profile."""

    negative_prompt: str
    checkpoint: str
    adapters: Sequence[Mapping[str, Any]]
    acceleration: Literal["lcm-lora", "none"]
    vae: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    scheduler: str
    image: str
    strength: float
    mask: str
    composite: bool
    controls: Sequence[Mapping[str, Any]]
    motion: str
    frames: int
    fps: int
    format: Literal["png", "webp", "jpeg"]
    quality: int
    seed: int
    priority: int
    labels: Mapping[str, str]
    run_at: str
    metadata: bool


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request and how to read its answer.

    `repeatable`: sending it twice does what sending it once does, so it may be retried. `rows` is the body of an
    NDJSON upload. `storage`: the path is a whole presigned URL, and our key must not go there.
    """

    method: str
    path: str
    read: Callable[[bytes], T]
    params: Sequence[tuple[str, str]] = ()
    body: bytes | None = None
    rows: AsyncRows | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = True
    storage: bool = False


def view(kind: Any) -> Callable[[bytes], Any]:
    """Reads an answer as this view, ignoring fields it does not know."""
    return TypeAdapter(kind).validate_json


JSON = {"Content-Type": "application/json"}
JOB: Callable[[bytes], JobView] = view(JobView)
BATCH: Callable[[bytes], BatchView] = view(BatchView)
JOBS: Callable[[bytes], Page[JobView]] = view(Page[JobView])
BATCHES: Callable[[bytes], Page[BatchView]] = view(Page[BatchView])
KEY: Callable[[bytes], KeyView] = view(KeyView)


def job_or_batch(body: bytes) -> JobView | BatchView:
    """Only a job has a `batch_id`."""
    document = orjson.loads(body)
    return JobView.model_validate(document) if "batch_id" in document else BatchView.model_validate(document)


def batch_or_dry_run(body: bytes) -> BatchView | DryRun:
    """Only a batch has an `id`."""
    document = orjson.loads(body)
    return BatchView.model_validate(document) if "id" in document else DryRun.model_validate(document)


def nothing(_: bytes) -> None:
    """The answer says nothing more."""


def submit(prompt: Row, count: int | None, key: str | None, fields: Mapping[str, Any]) -> Call[JobView | BatchView]:
    job = as_fields({**({"prompt": prompt} if isinstance(prompt, str) else prompt), **fields})
    if count is not None:
        job["count"] = count
    return Call("POST", f"{API}/jobs", job_or_batch, body=orjson.dumps(job, default=str), headers=JSON | once(key))


def submit_many(
    rows: AsyncRows,
    name: str,
    defaults: Mapping[str, Any],
    key: str | None = None,
    stop_at_failed_share: float | None = None,
    *,
    dry_run: bool,
) -> Call[BatchView | DryRun]:
    """Defaults travel as query parameters, structured ones (labels, adapters) as JSON."""
    params = [("name", name)] if name else []
    params += [(name, value if isinstance(value, str) else _compact(value)) for name, value in defaults.items()]
    if stop_at_failed_share is not None:
        params.append(("stop_at_failed_share", str(stop_at_failed_share)))
    if dry_run:
        params.append(("dry_run", "true"))
    # A generator can be walked once; a list, or an object that makes a fresh iterator each time, can be sent again.
    again = isinstance(rows, Iterable) and iter(rows) is not rows
    headers = {"Content-Type": "application/x-ndjson"} | once(key)
    return Call("POST", f"{API}/batches", batch_or_dry_run, params, rows=rows, headers=headers, repeatable=again)


def accepted(answer: BatchView | DryRun) -> BatchView:
    if not isinstance(answer, BatchView):
        raise FarmError("the farm answered a submission as if it had been a dry run")
    return answer


def rehearsed(answer: BatchView | DryRun) -> DryRun:
    if not isinstance(answer, DryRun):
        raise FarmError("the farm answered a dry run as if it had been a submission")
    return answer


def segment(what: Id) -> str:
    """An id as one segment of a path, whatever a person typed."""
    return quote(str(what), safe="")


def bytes_of(picture: Path | str | bytes) -> bytes:
    """A picture as a person hands it over: a file's path, or what is in it."""
    return picture if isinstance(picture, bytes) else Path(picture).read_bytes()


def id_of(what: JobView | BatchView | RegistrationView | Id) -> Id:
    return what.id if isinstance(what, JobView | BatchView | RegistrationView) else what


def as_fields(row: Row) -> dict[str, Any]:
    """A job's fields from a prompt alone or a mapping. Raises InvalidRequest for numbers that JSON cannot say.

    orjson would write NaN as null, and the farm would take it for "not given".
    """
    if isinstance(row, str):
        return {"prompt": row}
    fields = dict(row)
    inner = [
        (name, value)
        for name in ("adapters", "controls")
        for use in fields.get(name) or ()
        if isinstance(use, Mapping)
        for value in use.values()
    ]
    for name, value in [*fields.items(), *inner]:
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidRequest(f"{name} is {value}", problems=[{"field": name, "problem": "must be a finite number"}])
    return fields


def line(row: Row) -> bytes:
    """One NDJSON line. `default=str` writes UUIDs, paths and decimals as text."""
    return orjson.dumps(as_fields(row), default=str, option=orjson.OPT_APPEND_NEWLINE)


def job(job_id: Id) -> Call[JobView]:
    return Call("GET", f"{API}/jobs/{segment(job_id)}", JOB)


def batch(batch_id: Id) -> Call[BatchView]:
    return Call("GET", f"{API}/batches/{segment(batch_id)}", BATCH)


def jobs(
    states: States, labels: Mapping[str, str], batch_id: Id | None, limit: int
) -> Callable[[str | None], Call[Page[JobView]]]:
    """A page of jobs from a cursor on; `None` is the first."""
    path = f"{API}/jobs" if batch_id is None else f"{API}/batches/{segment(batch_id)}/jobs"
    params = [("state", str(state)) for state in ([states] if isinstance(states, str) else states)]
    params += [*_labels(labels), ("limit", str(limit))]
    return lambda cursor: Call("GET", path, JOBS, params + _cursor(cursor))


def batches(state: str | None, labels: Mapping[str, str], limit: int) -> Callable[[str | None], Call[Page[BatchView]]]:
    """A page of batches from a cursor on; `None` is the first."""
    params = ([("state", state)] if state else []) + _labels(labels) + [("limit", str(limit))]
    return lambda cursor: Call("GET", f"{API}/batches", BATCHES, params + _cursor(cursor))


def act_on_job(job_id: Id, verb: Literal["cancel", "retry"]) -> Call[JobView]:
    return Call("POST", f"{API}/jobs/{segment(job_id)}/{verb}", JOB, repeatable=verb != "retry")


def replay(job_id: Id, key: str | None) -> Call[JobView]:
    return Call("POST", f"{API}/jobs/{segment(job_id)}/replay", JOB, headers=once(key))


def act_on_batch(batch_id: Id, verb: Literal["cancel", "pause", "resume", "retry"]) -> Call[BatchView]:
    return Call("POST", f"{API}/batches/{segment(batch_id)}/{verb}", BATCH, repeatable=verb != "retry")


def set_priority(batch_id: Id, priority: int) -> Call[BatchView]:
    body = orjson.dumps({"priority": priority})
    return Call("POST", f"{API}/batches/{segment(batch_id)}/priority", BATCH, body=body, headers=JSON)


def delete(kind: Literal["jobs", "batches", "keys", "uploads"], what: Id) -> Call[None]:
    return Call("DELETE", f"{API}/{kind}/{segment(what)}", nothing)


def image_link(job_id: Id, kind: Literal["image", "thumbnail"] = "image") -> Call[ImageLink]:
    return Call("GET", f"{API}/jobs/{segment(job_id)}/{kind}", view(ImageLink), [("redirect", "false")])


def fetch(url: str) -> Call[bytes]:
    """The bytes behind a presigned URL."""
    return Call("GET", url, lambda body: body, storage=True)


def upload(picture: bytes) -> Call[UploadView]:
    """Repeatable: it is stored under its own hash, once. Its type is told by how it begins; the farm looks closer."""
    kinds = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}
    kind = next((kind for start, kind in kinds.items() if picture.startswith(start)), None)
    if kind is None:
        raise InvalidRequest("this is no PNG, JPEG or WebP picture")
    return Call("POST", f"{API}/uploads", view(UploadView), body=picture, headers={"Content-Type": kind})


def uploaded(hash_: str) -> Call[UploadView]:
    return Call("GET", f"{API}/uploads/{segment(hash_)}", view(UploadView))


def uploads(limit: int) -> Callable[[str | None], Call[Page[UploadView]]]:
    """A page of uploads from a cursor on; `None` is the first."""
    read = view(Page[UploadView])
    return lambda cursor: Call("GET", f"{API}/uploads", read, [("limit", str(limit)), *_cursor(cursor)])


def checkpoints() -> Call[list[CheckpointView]]:
    return Call("GET", f"{API}/checkpoints", items(CheckpointView))


def adapters() -> Call[list[AdapterView]]:
    return Call("GET", f"{API}/adapters", items(AdapterView))


def vaes() -> Call[list[VaeView]]:
    return Call("GET", f"{API}/vaes", items(VaeView))


def controlnets() -> Call[list[ControlNetView]]:
    return Call("GET", f"{API}/controlnets", items(ControlNetView))


def motions() -> Call[list[MotionView]]:
    return Call("GET", f"{API}/motions", items(MotionView))


def register(kind: Registered, name: str, source: str, wanted: Mapping[str, Any]) -> Call[RegistrationView]:
    """Not repeatable: the second would find the name in use."""
    given = {key: value for key, value in wanted.items() if value is not None}
    if kind in ADAPTERS:
        given["kind"] = kind
    body = orjson.dumps({"name": name, "source": source, **given})
    return Call("POST", f"{API}/{collection(kind)}", view(RegistrationView), body=body, headers=JSON, repeatable=False)


def registration(which: Id) -> Call[RegistrationView]:
    return Call("GET", f"{API}/registrations/{segment(which)}", view(RegistrationView))


def registrations() -> Call[list[RegistrationView]]:
    return Call("GET", f"{API}/registrations", items(RegistrationView))


def cancel_registration(which: Id) -> Call[RegistrationView]:
    return Call("POST", f"{API}/registrations/{segment(which)}/cancel", view(RegistrationView))


def workers() -> Call[list[WorkerView]]:
    return Call("GET", f"{API}/workers", items(WorkerView))


def queue() -> Call[list[LaneView]]:
    return Call("GET", f"{API}/queue", items(LaneView))


def keys() -> Call[list[KeyView]]:
    return Call("GET", f"{API}/keys", items(KeyView))


def create_key(project: str, name: str, scopes: Sequence[str], expires_at: str | None) -> Call[KeyView]:
    """Not repeatable: each answer is another key."""
    body = {"project": project, "name": name, "scopes": list(scopes), "expires_at": expires_at}
    return Call("POST", f"{API}/keys", KEY, body=orjson.dumps(body), headers=JSON, repeatable=False)


def version() -> Call[dict[str, Any]]:
    return Call("GET", f"{API}/version", orjson.loads)


def items(kind: Any) -> Callable[[bytes], Any]:
    """Reads a list that the farm answers whole: `{"items": [...]}`."""
    read = view(Page[kind])
    return lambda body: read(body).items


def once(key: str | None) -> dict[str, str]:
    """The header that makes a submission count once however often it is sent; a fresh key unless one is given."""
    return {"Idempotency-Key": key or str(uuid4())}


def _labels(labels: Mapping[str, str]) -> list[tuple[str, str]]:
    return [("label", f"{key}={value}") for key, value in labels.items()]


def _cursor(cursor: str | None) -> list[tuple[str, str]]:
    return [("cursor", cursor)] if cursor else []


def _compact(value: Any) -> str:
    return orjson.dumps(value, default=str).decode()
