"""The product's own entry point with the real engine and the model that comes with the package."""

import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from farm import catalogue, doorbell, jobs, submission
from farm.queries import claiming
from farm.settings import Settings
from farm.storage import Store
from tests.farm.conftest import Queue
from tests.workers.conftest import ROOT, environment_of, until
from workers.exits import Exit


def test_the_real_worker_renders_what_was_asked(farm: Queue, store: Store, settings: Settings, tmp_path: Path) -> None:
    farm.do(catalogue.install_default, store)
    known = farm.do(catalogue.load, store)
    # A style at two weights, and none: one lane, which the worker mixes.
    weights = [[], [{"name": "crack-tiny-night", "weight": 0.4}], [{"name": "crack-tiny-night", "weight": 0.9}]]
    rows: list[dict[str, Any]] = [
        {"prompt": f"A single split crack on a concrete wall {n}", "seed": n, "adapters": weights[n % 3]}
        for n in range(6)
    ]
    now = farm.do(claiming.database_now)
    with submission.prepare(rows, defaults={}, catalogue=known, settings=settings, name="real", now=now) as prepared:
        batch = farm.do(jobs.submit, prepared, project_id=farm.project, pool=settings.pool)
    log = tmp_path / "worker.log"
    with log.open("wb") as file:
        worker = subprocess.Popen(
            [sys.executable, "-m", "workers.main"], env=environment_of(settings), cwd=ROOT, stderr=file
        )
    try:
        doorbell.ring(settings, settings.pool)
        until(lambda: farm.batch(batch).done or worker.poll() is not None, 90)
        assert farm.counts(batch) == {"succeeded": 6}, log.read_text()
        pictures = []
        for job in farm.do(jobs.list_jobs, farm.project, batch=batch.id).items:
            stored = farm.do(jobs.image_of, farm.project, job.id)
            with Image.open(io.BytesIO(store.get(stored.key))) as image:
                image.load()
                told = json.loads(image.info["farm"])
                assert (told["recipe"]["seed"], told["recipe"]["prompt"]) == (job.seed, job.prompt)
                pictures.append(np.asarray(image))
        assert all(picture.std() > 2 for picture in pictures), "a picture shows something"
        assert len({picture.tobytes() for picture in pictures}) == 6
        (told,) = farm.do(jobs.workers)
        assert told.device == "cpu"
        assert [one["hash"] for one in told.warm] == [known.checkpoints["crack-tiny"].hash]
        first = farm.do(jobs.list_jobs, farm.project, batch=batch.id).items[0]
        again = farm.do(jobs.replay_job, farm.project, first.id)
        doorbell.ring(settings, settings.pool)
        until(lambda: farm.do(jobs.get_job, farm.project, again.id).finished_at or worker.poll() is not None, 90)
        assert farm.do(jobs.get_job, farm.project, again.id).replay.levels <= 1, "alone, and merged"

        def served() -> bool:
            (told,) = farm.do(jobs.workers)
            checkpoints, adapters = told.cache["checkpoints"], told.cache["adapters"]
            assert checkpoints["loads"] == 1, "once, whatever adapters came"
            assert checkpoints["load_seconds"] > 0
            assert 0 < told.cache["device_bytes"] < told.cache["device_budget"]
            slots = {one["name"] for pipeline in told.warm for one in pipeline["slots"]}
            return checkpoints["hits"] >= 2 and adapters["hit_rate"] > 0 and slots == {"crack-tiny-night"}

        until(served)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == Exit.LEFT
    finally:
        worker.kill()
        worker.wait()
