"""From a request to a stored batch and its answer: what both submitting routes share."""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

import orjson
from fastapi import Header, Request
from pydantic import BaseModel
from sqlalchemy import Connection
from starlette.responses import Response

from api.deps import Farm
from farm import jobs
from farm.queries.claiming import database_now
from farm.resolving import Catalogue
from farm.submission import Prepared, prepare
from farm.uploads import Known, Size, sizes
from farm.views import BatchView, JobView

JSON = "application/json"
REPLAYED = "Idempotency-Replayed"

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[\x20-\x7e]+$",
        description="Sent again with the same key and body, a submission counts once: its first answer is repeated.",
        examples=["0b7c8a52-4d0e-4f1c-9d8e-1f0a8c3f2b11"],
    ),
]


@dataclass(frozen=True)
class Once:
    """What makes a submission count once: its Idempotency-Key, if it has one, and the hash of all it asks for."""

    project_id: UUID
    key: str | None
    request_hash: bytes

    @classmethod
    def of(cls, request: Request, project_id: UUID, key: str | None, body_hash: bytes) -> "Once":
        """`body_hash` is the sha256 of the body. Query parameters count too: an NDJSON body has its defaults there."""
        asked = f"{request.method} {request.url.path}?{request.url.query}\n".encode()
        return cls(project_id, key, hashlib.sha256(asked + body_hash).digest())

    def answered(self, conn: Connection, farm: Farm) -> Response | None:
        """The answer given before, or None; then the key is held until the transaction ends.

        Raises InFlight while a twin holds the key, IdempotencyMismatch when it stands for another request.
        """
        if self.key is None:
            return None
        answer = jobs.idempotent(conn, self.project_id, self.key, self.request_hash, farm.settings)
        return None if answer is None else _response(answer.status, answer.body, {REPLAYED: "true"})

    def created(self, conn: Connection, view: BaseModel) -> Response:
        """The answer for what was just stored, remembered under the key in the same transaction."""
        body = view.model_dump(mode="json")
        if self.key is not None:
            jobs.remember(conn, self.project_id, self.key, self.request_hash, 201, body)
        return _response(201, body)


@dataclass(frozen=True)
class Submission:
    """What a request asks for: rows (dicts, or NDJSON lines) and what they have in common."""

    rows: Iterable[Mapping[str, Any] | bytes]
    name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    stop_at_failed_share: float | None = None


@dataclass(frozen=True)
class Moment:
    """What a submission is checked against: models that the project may name, its uploads, the database's clock."""

    known: Catalogue
    now: datetime
    uploads: Known

    @classmethod
    def of(cls, conn: Connection, farm: Farm, project_id: UUID, *, lasting: bool) -> "Moment":
        """`lasting`: the check goes on after this transaction, so uploads are looked up in others."""

        def ask(hashes: Collection[str]) -> dict[str, Size]:
            if not lasting:
                return sizes(conn, project_id, hashes)
            with farm.database.transaction() as own:
                return sizes(own, project_id, hashes)

        return cls(farm.catalogue.load(conn, project_id), database_now(conn), Known(ask))

    def check(self, submission: Submission, farm: Farm) -> Prepared:
        """Everything checked, and spooled for COPY. Raises InvalidRequest with the first hundred problems."""
        return prepare(
            submission.rows,
            defaults=submission.defaults,
            catalogue=self.known,
            settings=farm.settings,
            name=submission.name,
            now=self.now,
            labels=submission.labels,
            uploads=self.uploads,
            stop_at_failed_share=submission.stop_at_failed_share,
        )


def store(conn: Connection, prepared: Prepared, farm: Farm, project_id: UUID) -> BatchView:
    """Write it: COPY, a few rows, nothing that waits for anybody."""
    return jobs.submit(conn, prepared, project_id=project_id, pool=farm.settings.pool)


def answer(view: BaseModel) -> Response:
    """An answer that stored nothing."""
    return _response(200, view.model_dump(mode="json"))


def only_job(conn: Connection, batch: BatchView, project_id: UUID) -> JobView:
    """The job of a batch that has one."""
    return jobs.list_jobs(conn, project_id, batch=batch.id, limit=1).items[0]


def _response(status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    where = {}
    if status == 201:
        noun = "jobs" if "batch_id" in body else "batches"
        where["Location"] = f"/api/v1/{noun}/{body['id']}"
    return Response(orjson.dumps(body), status, {**where, **(headers or {})}, JSON)
