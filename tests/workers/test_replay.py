"""A job rendered again beside itself: compared, crash-safe, and never a second picture of the original."""

from typing import Any

import numpy as np
import pytest
from sqlalchemy import text

from farm import jobs, limits
from farm.db import Database
from farm.errors import Conflict, LimitReached, NotFound
from farm.jobs import Difference
from farm.recipe import Recipe
from farm.settings import Settings
from farm.states import JobState
from farm.storage import Store
from tests import stub_worker
from tests.farm.conftest import Queue
from tests.stub_worker import StubRenderer
from workers.executor import Executor
from workers.pictures import difference


@pytest.fixture
def executor(database: Database, store: Store, settings: Settings, farm: Queue) -> Executor:
    return Executor(database, store, StubRenderer(), settings, farm.worker)


def rendered(farm: Queue, executor: Executor) -> Any:
    """A job that succeeded, with a label."""
    batch = farm.submit([{"prompt": "a crack", "seed": 7, "labels": {"set": "train"}}])
    assert executor.work_once()
    return farm.do(jobs.list_jobs, farm.project, batch=batch.id).items[0]


def test_the_same_picture_is_no_level_apart(executor: Executor, farm: Queue, store: Store) -> None:
    original = rendered(farm, executor)
    replay = farm.do(jobs.replay_job, farm.project, original.id)
    assert (replay.state, replay.replay.of, replay.replay.levels) == (JobState.QUEUED, original.id, None)
    kept = farm.do(lambda conn: conn.execute(text("SELECT lane, checkpoint, adapter_set FROM segments")).all())
    assert len(kept) == 2
    assert len(set(kept)) == 1, "found by claims as the original was"
    assert replay.labels == {"replay_of": str(original.id)}, "none of the original's, which exports go by"
    assert executor.work_once()
    done = farm.do(jobs.get_job, farm.project, replay.id)
    assert done.state is JobState.SUCCEEDED
    assert (done.replay.levels, done.replay.mean_levels, done.replay.differing) == (0, 0.0, 0.0)
    assert farm.do(jobs.get_job, farm.project, original.id) == original, "untouched"
    pictures = {farm.do(jobs.image_of, farm.project, one.id).key for one in (original, done)}
    assert len(pictures) == 2
    assert all(store.get(key) for key in pictures)


def test_a_replay_is_held_against_the_limits_of_its_project(executor: Executor, farm: Queue) -> None:
    original = rendered(farm, executor)
    steps = original.width * original.height * original.steps
    farm.do(limits.change, farm.project, {"queued_jobs": 2, "pixel_steps_per_day": steps})
    farm.do(jobs.replay_job, farm.project, original.id)
    used = farm.do(limits.get, farm.project).use
    assert (used.queued_jobs, used.pixel_steps_today) == (1, steps)
    with pytest.raises(LimitReached, match="pixel steps per day"):
        farm.do(jobs.replay_job, farm.project, original.id)
    assert farm.do(limits.get, farm.project).use == used


def test_another_picture_is_told_by_how_much(executor: Executor, farm: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    original = rendered(farm, executor)
    real = stub_worker.picture

    def other(recipe: Recipe) -> Any:
        made = real(recipe).copy()
        made[0, 0] = np.where(made[0, 0] > 100, made[0, 0] - 3, made[0, 0] + 3)
        return made

    monkeypatch.setattr(stub_worker, "picture", other)
    replay = farm.do(jobs.replay_job, farm.project, original.id)
    executor.work_once()
    found = farm.do(jobs.get_job, farm.project, replay.id).replay
    assert found.levels == 3
    assert found.differing == pytest.approx(1 / 128**2, abs=1e-6)
    assert 0 < found.mean_levels < 0.001


def test_a_crash_in_between_changes_nothing(executor: Executor, farm: Queue) -> None:
    original = rendered(farm, executor)
    replay = farm.do(jobs.replay_job, farm.project, original.id)
    claimed = farm.claim()
    assert claimed is not None
    assert claimed.jobs[0].original == farm.do(jobs.image_of, farm.project, original.id).key
    assert farm.do(jobs.rescue, settings=farm.settings, worker=farm.worker) == 1
    assert executor.work_once()
    assert farm.do(jobs.get_job, farm.project, replay.id).replay.levels == 0
    assert set(farm.finish(claimed).values()) == {"lost"}
    assert farm.do(jobs.get_job, farm.project, replay.id).replay.levels == 0


def test_without_the_original_it_fails_with_the_reason(executor: Executor, farm: Queue, store: Store) -> None:
    original = rendered(farm, executor)
    replay = farm.do(jobs.replay_job, farm.project, original.id)
    store.delete_many([farm.do(jobs.image_of, farm.project, original.id).key])
    executor.work_once()
    found = farm.do(jobs.get_job, farm.project, replay.id)
    assert found.state is JobState.FAILED
    assert "the picture to compare with is gone" in found.error.message


def test_only_a_job_with_a_picture_can_be_replayed(executor: Executor, farm: Queue) -> None:
    batch = farm.submit(1)
    queued = farm.do(jobs.list_jobs, farm.project, batch=batch.id).items[0]
    with pytest.raises(Conflict, match="is queued; only a job with a picture"):
        farm.do(jobs.replay_job, farm.project, queued.id)
    with pytest.raises(NotFound):
        farm.do(jobs.replay_job, farm.project, batch.id)
    executor.work_once()
    replay = farm.do(jobs.replay_job, farm.project, queued.id)
    executor.work_once()
    farm.do(jobs.delete_job, farm.project, replay.id)
    assert farm.do(lambda conn: conn.scalar(text("SELECT count(*) FROM replays"))) == 0


def test_difference_of_two_pictures() -> None:
    black = np.zeros((2, 4, 3), np.uint8)
    other = black.copy()
    other[0, 0, 1] = 255
    assert difference(black, other) == difference(other, black) == Difference(255, 10.625, 0.125)
    with pytest.raises(ValueError, match="two sizes"):
        difference(black, black[:1])
