"""What tests of the queue start from: a catalogue without files, a project, and verbs with their commits."""

import uuid
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from random import Random
from typing import Any

import pytest

from farm import jobs, keys, submission
from farm.db import Database
from farm.jobs import Claimed, Result, StoredImage, Warm
from farm.queries import claiming
from farm.resolving import Catalogue
from farm.settings import Settings
from farm.states import Outcome
from farm.views import AdapterView, BatchView, CheckpointView, MotionView


def catalogue() -> Catalogue:
    now = datetime.now(UTC)
    profile = {
        "width": 128,
        "height": 128,
        "min_size": 64,
        "max_size": 256,
        "size_multiple": 32,
        "steps": 4,
        "guidance_scale": 1.0,
    }

    def base(name: str, mark: str, family: str) -> CheckpointView:
        return CheckpointView(
            name=name, hash=mark * 64, family=family, state="available", bytes=1, profile=profile, created_at=now
        )

    def lora(name: str, mark: str, family: str, kind: Any) -> AdapterView:
        return AdapterView(
            name=name, hash=mark * 64, family=family, kind=kind, state="available", bytes=1, created_at=now
        )

    return Catalogue(
        {"crack-tiny": base("crack-tiny", "a", "crack-tiny"), "other": base("other", "c", "crack-tiny")},
        {
            "lcm": lora("lcm", "b", "crack-tiny", "acceleration"),
            "moss": lora("moss", "d", "crack-tiny", "style"),
            "night": lora("night", "e", "crack-tiny", "style"),
            "big": lora("big", "f", "sdxl", "style"),
        },
        motions={
            "wind": MotionView(
                name="wind", hash="1" * 64, family="crack-tiny", state="available", bytes=1, created_at=now,
                max_frames=16, acceleration=None,
            )
        },
    )  # fmt: skip


class Queue:
    """The verbs as a worker and a producer use them, each in a transaction of its own."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self.database = database
        self.settings = settings
        # Always the same: what a worker prefers among equals comes from its id.
        self.worker = uuid.UUID(int=7)
        with database.transaction() as conn:
            made = keys.create_key(conn, project="cracks", name="test", scopes=["admin"])
            assert made.key is not None
            self.project = keys.authenticate(conn, made.key).project_id

    def do(self, verb: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.database.transaction() as conn:
            return verb(conn, *args, **kwargs)

    def submit(
        self, rows: Iterable[dict[str, Any]] | int, *, stop_at_failed_share: float | None = None, **defaults: Any
    ) -> BatchView:
        if isinstance(rows, int):
            rows = [{"prompt": f"crack {n}", "seed": n} for n in range(rows)]
        now = self.do(claiming.database_now)
        with submission.prepare(
            rows, defaults=defaults, catalogue=catalogue(), settings=self.settings, name="test", now=now,
            stop_at_failed_share=stop_at_failed_share,
        ) as prepared:  # fmt: skip
            return self.do(jobs.submit, prepared, project_id=self.project, pool="default")

    def claim(self, limit: int = 8, warm: Warm | None = None, **more: Any) -> Claimed | None:
        return self.do(
            jobs.claim,
            claim_id=more.pop("claim_id", None) or uuid.uuid4(),
            worker=more.pop("worker", self.worker),
            pool="default",
            warm=warm or Warm(),
            limit=limit,
            settings=self.settings,
            random=more.pop("random", None) or Random(1),
            **more,
        )

    def finish(self, claimed: Claimed, outcome: Outcome = Outcome.SUCCEEDED, code: str = "") -> dict[Any, str]:
        results = [
            Result(job.id, job.attempt, outcome, stored(job) if outcome is Outcome.SUCCEEDED else None, code, code)
            for job in claimed.jobs
        ]
        return self.do(jobs.finish, claim_id=claimed.claim_id, results=results, settings=self.settings)

    def batch(self, batch: BatchView) -> BatchView:
        return self.do(jobs.get_batch, self.project, batch.id)

    def counts(self, batch: BatchView) -> dict[str, int]:
        return {name: n for name, n in self.batch(batch).counts.model_dump().items() if n}


def stored(job: Any) -> StoredImage:
    key = f"p/{job.id}/{job.attempt}"
    return StoredImage(key, key + ".webp", "0" * 64, 100, 128, 128, 10)


@pytest.fixture
def queue(database: Database, settings: Settings) -> Queue:
    return Queue(database, settings)
