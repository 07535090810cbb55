"""A worker that fails one pipeline repeatedly stops claiming it while others still may."""

import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text

from farm import jobs
from farm.db import Database
from farm.errors import InvalidModel, NotFound, OutOfMemory, RenderFailed, Unavailable
from farm.jobs import Claimed, ClaimedJob, Result
from farm.settings import Settings
from farm.states import JobState, Outcome
from farm.storage import Store
from tests.farm.conftest import Queue, stored
from tests.stub_worker import StubRenderer
from tests.workers.conftest import until
from workers.executor import Executor
from workers.idling import Idling
from workers.resting import MOST, Rests


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def failed(claimed: Claimed, code: str, outcome: Outcome = Outcome.RETRY) -> list[Result]:
    return [Result(job.id, job.attempt, outcome, error_code=code) for job in claimed.jobs]


def succeeded(job: ClaimedJob) -> Result:
    return Result(job.id, job.attempt, Outcome.SUCCEEDED, stored(job))


@pytest.fixture
def claimed(farm: Queue) -> Claimed:
    """Some micro-batch of two jobs."""
    farm.submit(2)
    found = farm.claim()
    assert found is not None
    return found


def test_three_failures_in_a_row_rest_and_the_rests_grow(claimed: Claimed, settings: Settings) -> None:
    clock = Clock()
    settings = settings.model_copy(update={"rest_max": timedelta(seconds=100)})
    rests = Rests(settings, clock)
    pauses = []
    for failures in range(1, 8):
        told = rests.learn(claimed, failed(claimed, "render-failed"))
        assert told is (failures >= 3)
        if failures < 3:
            assert rests.keys == frozenset()
            continue
        recipe = claimed.jobs[0].recipe
        assert rests.keys == {recipe.checkpoint, claimed.lane}
        whole, lane = sorted(rests.told(), key=lambda one: one["of"])
        assert (whole["of"], whole["hash"], lane["of"]) == ("checkpoint", recipe.checkpoint, "lane")
        assert (whole["failures"], whole["code"]) == (failures, "render-failed")
        pauses.append(whole["seconds"])
        clock.seconds += 1000
        assert rests.keys == frozenset(), "then it tries again"
    # Half of each is drawn.
    assert all(most / 2 <= pause <= most for pause, most in zip(pauses, (30, 60, 100, 100, 100), strict=True))
    assert rests.learn(claimed, [*failed(claimed, "render-failed")[:1], succeeded(claimed.jobs[1])])
    assert not rests.learn(claimed, failed(claimed, "render-failed")), "one picture ended the row"


@pytest.mark.parametrize(
    ("error", "counts"),
    [(OutOfMemory, True), (RenderFailed, True), (InvalidModel, True), (Unavailable, False), (NotFound, False)],
)
def test_only_the_engines_failures_count(claimed: Claimed, settings: Settings, error: Any, counts: bool) -> None:
    rests = Rests(settings)
    for _ in range(3):
        rests.learn(claimed, failed(claimed, error.code, Outcome.FAILED))
    assert bool(rests.keys) is counts


@pytest.mark.parametrize("outcome", [Outcome.CANCELLED, Outcome.GIVEN_BACK])
def test_what_was_stopped_says_nothing(claimed: Claimed, settings: Settings, outcome: Outcome) -> None:
    rests = Rests(settings)
    for _ in range(2):
        rests.learn(claimed, failed(claimed, "render-failed"))
    assert not rests.learn(claimed, failed(claimed, "", outcome))
    assert rests.learn(claimed, failed(claimed, "render-failed")), "neither a failure nor the end of the row"


def test_a_lane_may_rest_while_others_of_its_checkpoint_go_on(claimed: Claimed, settings: Settings) -> None:
    rests = Rests(settings)
    fine = replace(claimed, lane="fine")
    for _ in range(3):
        rests.learn(claimed, failed(claimed, "out-of-memory"))
        rests.learn(fine, [succeeded(job) for job in fine.jobs])
    assert rests.keys == {claimed.lane}


def test_lanes_that_fail_do_not_fill_the_memory(claimed: Claimed, settings: Settings) -> None:
    rests = Rests(settings)
    for number in range(2 * MOST):
        rests.learn(replace(claimed, lane=f"lane {number}"), failed(claimed, "render-failed"))
    assert len(rests._rows) == MOST


class Sick(StubRenderer):
    """Fails while it is told to."""

    trouble: Exception | None = RenderFailed("something is wrong with this machine")

    def _misbehave(self, recipes: Any) -> None:
        if self.trouble is not None:
            raise self.trouble


Serve = Callable[[StubRenderer], Executor]


@pytest.fixture
def serve(database: Database, store: Store, settings: Settings, farm: Queue) -> Serve:
    """A worker of this process that takes work, with a row that others see."""

    def serve(renderer: StubRenderer) -> Executor:
        worker = uuid.uuid4()
        farm.do(jobs.hello, worker=worker, pool="default", host="h", pid=1, device=str(worker), version="1")
        renderer.step_seconds = 0.0
        quick = {"max_failures": 10, "retry_backoff_max": timedelta(seconds=0.05)}
        executor = Executor(database, store, renderer, settings.model_copy(update=quick), worker)
        executor.lease._ready = True
        executor.lease.beat()
        return executor

    return serve


def fail(executor: Executor, micro_batches: int) -> None:
    """Claim and fail so many micro-batches, and let everybody know."""
    for _ in range(micro_batches):
        until(executor.work_once)
    executor.lease.beat()


def test_a_sick_worker_leaves_its_pipeline_to_the_others(serve: Serve, farm: Queue) -> None:
    sick, well = serve(Sick()), serve(StubRenderer())
    batch = farm.submit(2)
    fail(sick, 3)
    wait = text("SELECT pg_sleep(extract(epoch FROM max(run_at) - clock_timestamp())) FROM jobs")
    farm.do(lambda conn: conn.execute(wait))
    assert not sick.work_once(), "it rests from this checkpoint"
    assert not Idling(sick)._claimable(), "so it is not to blame for taking nothing"
    farm.submit([{"prompt": "another one", "checkpoint": "other"}])
    assert sick.work_once(), "other checkpoints are claimed as ever"
    (view,) = [one for one in farm.do(jobs.workers) if one.id == sick.worker]
    assert {(rest.of, rest.failures, rest.code) for rest in view.resting} == {
        ("checkpoint", 3, "render-failed"),
        ("lane", 3, "render-failed"),
    }
    until(well.work_once)
    assert farm.counts(batch) == {"succeeded": 2}


def test_success_ends_it(serve: Serve, farm: Queue) -> None:
    renderer = Sick()
    sick, _ = serve(renderer), serve(StubRenderer())
    batch = farm.submit(1)
    fail(sick, 3)
    renderer.trouble = None
    sick.lease.rests._clock = lambda: float("inf")  # the rest is over
    until(sick.work_once)
    assert farm.counts(batch) == {"succeeded": 1}
    sick.lease.beat()
    assert all(not view.resting for view in farm.do(jobs.workers))
    assert sick.lease.rests._rows == {}


def test_an_only_worker_goes_on_until_the_jobs_limit(serve: Serve, farm: Queue) -> None:
    only = serve(Sick())
    batch = farm.submit(1)
    fail(only, 10)
    assert farm.counts(batch) == {"failed": 1}, "nothing waits for a worker that is not there"
    (view,) = farm.do(jobs.workers)
    assert view.resting, "whoever comes next would be asked first"


def test_who_all_rest_all_go_on(serve: Serve, farm: Queue) -> None:
    first, second = serve(Sick()), serve(Sick())
    batch = farm.submit(1)
    fail(first, 3)
    fail(second, 3)
    fail(first, 1)
    assert farm.counts(batch) == {"queued": 1}
    job = farm.do(jobs.list_jobs, farm.project, batch=batch.id).items[0]
    assert (job.state, job.attempt) == (JobState.QUEUED, 7)
