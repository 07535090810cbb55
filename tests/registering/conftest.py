"""What tests of registering start from: toy models, a hub of paper, one worker's registrar with the real engine."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from PIL import Image

from farm import catalogue, holding, jobs, keys, registrations, submission, uploads
from farm.db import Database
from farm.ids import new_id
from farm.modelfiles import read_raw
from farm.queries import claiming
from farm.settings import Settings
from farm.storage import Store
from farm.views import RegistrationView
from tests.pipelines import toys
from tests.registering.hub import Hub, serving
from workers import formats
from workers.executor import Executor
from workers.leaving import Leaving
from workers.modelstore import ModelStore
from workers.pipelines.engine import Engine
from workers.registering.registrar import Registrar

PROFILE = {"width": 64, "height": 64, "min_size": 64, "max_size": 128}


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def style_layers() -> dict[str, tuple[int, ...]]:
    """A layer of the toy checkpoint, with its weight's shape."""
    return {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (16, 16)}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def noise(seed: int) -> np.ndarray:
    """A picture of nothing, 64 x 64 pixels."""
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)


@dataclass
class Bench:
    """A worker's registrar, and what a person asks of it."""

    database: Database
    store: Store
    settings: Settings
    registrar: Registrar
    engine: Engine
    executor: Executor
    leaving: Leaving

    def do(self, verb: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        with self.database.transaction() as conn:
            return verb(conn, *arguments, **more)

    def ask(self, name: str, source: str, kind: Any = "checkpoint", **wanted: Any) -> RegistrationView:
        """A model from afar."""
        return self.do(registrations.ask, name=name, kind=kind, source=source, wanted=wanted, pool=self.settings.pool)

    def send(self, name: str, path: Path, kind: Any = "checkpoint", **wanted: Any) -> RegistrationView:
        """A model of this machine."""
        raw = read_raw(path, kind, wanted.get("variant"))
        begun = self.do(
            registrations.submit, name=name, kind=kind, source=f"local:{path.name}", wanted=wanted,
            pool=self.settings.pool, raw=raw, uploader=new_id(), lease=self.settings.lease,
        )  # fmt: skip
        claim = registrations.held_by(self.do(registrations.row_of, begun.id))
        holding.upload(self.database, self.settings, claim, lambda: catalogue.upload_files(self.store, raw))
        return begun

    def end(self, begun: RegistrationView) -> RegistrationView:
        """Let the worker see it through; how it ended."""
        assert self.registrar.once()
        return self.look(begun)

    def look(self, begun: RegistrationView) -> RegistrationView:
        return self.do(registrations.get, begun.id)

    def add(self, name: str, path: Path, kind: Any = "checkpoint", **wanted: Any) -> RegistrationView:
        ended = self.end(self.send(name, path, kind, **wanted))
        assert ended.state == "available", ended.reason
        return ended

    def refused(self, name: str, path: Path, kind: Any = "style", **wanted: Any) -> str:
        ended = self.end(self.send(name, path, kind, **wanted))
        assert ended.state == "refused"
        return ended.reason or ""

    @property
    def project(self) -> UUID:
        made = self.do(keys.create_key, project="cracks", name="test", scopes=["admin"])
        found: UUID = self.do(keys.authenticate, made.key).project_id
        return found

    def picture(self, seed: int) -> str:
        """A picture of noise, sent; its hash."""
        out = io.BytesIO()
        Image.fromarray(noise(seed)).save(out, "PNG")
        return uploads.add(self.database, self.store, self.settings, self.project, out.getvalue(), "image/png")[0].hash

    def submit(self, *rows: dict[str, Any]) -> list[Any]:
        """Jobs of one batch, queued; seeds count up from 1 unless a row has its own."""
        mine = self.project
        known, now = self.do(catalogue.load, self.store), self.do(claiming.database_now)
        sent = uploads.Known(lambda hashes: self.do(uploads.sizes, mine, hashes))
        full = [
            {"prompt": "A single split crack on a concrete wall", "seed": number, "steps": 2, **row}
            for number, row in enumerate(rows, 1)
        ]
        with submission.prepare(
            full, defaults={}, catalogue=known, settings=self.settings, name="some", now=now, uploads=sent
        ) as prepared:
            batch = self.do(jobs.submit, prepared, project_id=mine, pool=self.settings.pool)
        found: list[Any] = self.do(jobs.list_jobs, mine, batch=batch.id).items
        return found

    def job(self, job: Any) -> Any:
        """The job as it is now."""
        return self.do(jobs.get_job, self.project, job.id)

    def stored(self, job: Any) -> bytes:
        """The file of a job that succeeded."""
        now = self.job(job)
        assert now.state == "succeeded", now.error
        return self.store.get(self.do(jobs.image_of, self.project, job.id).key)

    def pixels(self, job: Any) -> np.ndarray:
        with Image.open(io.BytesIO(self.stored(job))) as image:
            return np.asarray(image)


@pytest.fixture
def bench(database: Database, store: Store, settings: Settings, tmp_path: Path) -> Bench:
    own = settings.model_copy(update={"cache_dir": tmp_path / "cache", "device": "cpu"})
    models = ModelStore(database, store, own)
    engine = Engine(own, models.fetch)
    leaving = Leaving(5, end=_never)
    executor = Executor(database, store, engine, own, new_id(), leaving=leaving, end=_never)
    registrar = Registrar(database, store, models, own, new_id(), leaving, executor.try_out, end=_never)
    yield_bench = Bench(database, store, own, registrar, engine, executor, leaving)
    shutil.rmtree(tmp_path / "cache" / "registering", ignore_errors=True)
    return yield_bench


def render(bench: Bench, **fields: Any) -> tuple[Any, dict[str, Any]]:
    """Render a job through queue, worker and store; the job and what its picture says of itself."""
    (job,) = bench.submit(fields)
    assert bench.executor.work_once()
    with Image.open(io.BytesIO(bench.stored(job))) as image:
        image.load()
        told = image.info.get("farm") or image.getexif()[formats.DESCRIPTION]
        return bench.job(job), json.loads(told)


def _never(status: object, why: str) -> None:
    raise AssertionError(f"the process would end: {status} {why}")
