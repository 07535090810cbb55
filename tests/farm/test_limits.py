"""Limits of projects: exactly the limit is accepted, whoever asks at once, and nothing else is held up by it."""

import threading
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from farm import jobs, limits
from farm.errors import LimitReached, NotFound, TooLarge
from farm.maintenance import Sweeper
from farm.states import Outcome
from farm.views_tenants import ProjectView
from tests.farm.conftest import Queue
from tests.farm.hooks import neighbour

STEPS = 128 * 128 * 4
"""Pixel steps of one job with nothing said."""


def limit(queue: Queue, **wanted: int | None) -> ProjectView:
    return queue.do(limits.change, queue.project, wanted)


def use(queue: Queue, project: UUID | None = None) -> dict[str, int]:
    found: ProjectView = queue.do(limits.get, project or queue.project)
    return found.use.model_dump()


def open_jobs(queue: Queue, project: UUID) -> dict[str, int]:
    statement = text("""
        SELECT count(*) FILTER (WHERE state = 'queued') AS queued_jobs,
               count(*) FILTER (WHERE state = 'running') AS running_jobs FROM jobs WHERE project_id = :project
    """)
    return dict(queue.do(lambda conn: conn.execute(statement, {"project": project}).mappings().one()))


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """Run calls in threads that begin together; what they answered, or the limit they met."""
    ready = threading.Barrier(len(calls))
    answers: list[Any] = [None] * len(calls)

    def run(number: int, call: Callable[[], Any]) -> None:
        ready.wait(20)
        try:
            answers[number] = call()
        except LimitReached as error:
            answers[number] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_exactly_the_limit_is_accepted_of_ten_times_as_much_at_once(queue: Queue) -> None:
    limit(queue, queued_jobs=12)
    stop = threading.Event()

    def sweep() -> None:
        sweeper = Sweeper(queue.settings, queue.database)
        while not stop.is_set():
            sweeper.fold()

    sweeping = threading.Thread(target=sweep)
    sweeping.start()
    try:
        for _ in range(4):
            answers = at_once([lambda: queue.submit(3)] * 10)
        assert open_jobs(queue, queue.project)["queued_jobs"] == 12
    finally:
        stop.set()
        sweeping.join()
    refused = [answer for answer in answers if isinstance(answer, LimitReached)]
    assert len(refused) == 10
    assert refused[0].details["limit"] == "queued_jobs"
    assert (refused[0].details["value"], refused[0].details["used"]) == (12, 12)
    assert refused[0].details["retry_after"] >= 1
    assert queue.claim(limit=3) is not None
    queue.submit(3)
    with pytest.raises(LimitReached, match="limit of 12 queued jobs is reached: 12 are in use, 1 were asked for"):
        queue.submit(1)


def test_a_day_holds_exactly_so_many_pixel_steps(queue: Queue) -> None:
    limit(queue, pixel_steps_per_day=4 * STEPS)
    answers = at_once([lambda: queue.submit(1)] * 40)
    assert sum(isinstance(answer, LimitReached) for answer in answers) == 36
    assert use(queue)["pixel_steps_today"] == 4 * STEPS
    with pytest.raises(LimitReached) as refused:
        queue.submit(1)
    assert 1 <= refused.value.details["retry_after"] <= 86_400
    assert refused.value.details["frees_at"].endswith("T00:00:00+00:00")
    queue.do(lambda conn: conn.execute(text("UPDATE projects SET spent_on = spent_on - 1")))
    assert use(queue)["pixel_steps_today"] == 0
    queue.submit(2, steps=8)
    assert use(queue)["pixel_steps_today"] == 4 * STEPS


def test_what_could_never_be_accepted_is_too_large(queue: Queue) -> None:
    limit(queue, queued_jobs=2, pixel_steps_per_day=100 * STEPS)
    with pytest.raises(TooLarge, match="asks for 3 queued jobs, and the project's limit is 2"):
        queue.submit(3)
    with pytest.raises(TooLarge, match="pixel steps per day"):
        queue.submit(2, steps=100, width=256, height=256)
    assert open_jobs(queue, queue.project)["queued_jobs"] == 0
    assert use(queue) == {"queued_jobs": 0, "running_jobs": 0, "pixel_steps_today": 0, "upload_bytes": 0}


def test_no_more_jobs_run_than_may_and_others_are_not_held_up(queue: Queue) -> None:
    limit(queue, running_jobs=5)
    mine = queue.project
    for _ in range(20):
        queue.submit(2)
    queue.project = other = neighbour(queue)
    queue.submit(6)

    def claim() -> Any:
        return queue.claim(limit=2)

    # Fifty places are asked for, where there are five beside the neighbour's six.
    at_once([claim] * 25)
    for _ in range(5):
        at_once([claim] * 8)
    assert open_jobs(queue, mine) == {"queued_jobs": 35, "running_jobs": 5}
    assert open_jobs(queue, other) == {"queued_jobs": 0, "running_jobs": 6}
    assert queue.claim() is None
    queue.do(jobs.rescue, settings=queue.settings, worker=queue.worker)
    queue.do(limits.change, mine, {"running_jobs": None})
    claimed = 0
    for _ in range(60):
        found = queue.claim(limit=64)
        claimed += len(found.jobs) if found else 0
    assert claimed == 46


def test_open_jobs_of_a_project_are_counted_right_whatever_happens(queue: Queue) -> None:
    sweeper = Sweeper(queue.settings, queue.database)

    def agree() -> None:
        counted = {name: n for name, n in use(queue).items() if name in {"queued_jobs", "running_jobs"}}
        assert counted == open_jobs(queue, queue.project)

    batches = [queue.submit(4) for _ in range(4)]
    agree()
    sweeper.fold()
    claimed = queue.claim(limit=3)
    assert claimed is not None
    agree()
    queue.finish(claimed, Outcome.FAILED)
    queue.do(jobs.cancel_batch, queue.project, batches[1].id)
    agree()
    sweeper.fold()
    queue.do(jobs.retry_batch, queue.project, batches[0].id)
    agree()
    assert queue.claim(limit=1) is not None
    queue.do(jobs.rescue, settings=queue.settings, worker=queue.worker)
    agree()
    queue.do(jobs.delete_batch, queue.project, batches[2].id)
    for duty in (sweeper.delete, sweeper.turn, sweeper.delete, sweeper.delete):
        duty()
    agree()
    while sweeper.fold():
        pass
    agree()
    queue.do(lambda conn: conn.execute(text("UPDATE projects SET queued = 99, running = 7")))
    sweeper.recount()
    agree()


def test_retrying_counts_as_queueing(queue: Queue) -> None:
    batch = queue.submit(4)
    claimed = queue.claim()
    assert claimed is not None
    queue.finish(claimed, Outcome.FAILED)
    limit(queue, queued_jobs=3)
    with pytest.raises(TooLarge):
        queue.do(jobs.retry_batch, queue.project, batch.id)
    assert queue.counts(batch) == {"failed": 4}
    for job in claimed.jobs[:3]:
        queue.do(jobs.retry_job, queue.project, job.id)
    with pytest.raises(LimitReached):
        queue.do(jobs.retry_job, queue.project, claimed.jobs[3].id)
    assert queue.counts(batch) == {"queued": 3, "failed": 1}


def test_limits_are_set_and_taken_away(queue: Queue) -> None:
    limit(queue, queued_jobs=0, running_jobs=4)
    with pytest.raises(LimitReached):
        queue.do(limits.refuse_full, queue.project)
    changed = limit(queue, queued_jobs=None)
    assert changed.limits.model_dump(exclude_none=True) == {"running_jobs": 4}
    queue.do(limits.refuse_full, queue.project)
    queue.submit(1)
    with pytest.raises(NotFound):
        queue.do(limits.change, UUID(int=0), {"queued_jobs": 1})
    assert [project.name for project in queue.do(limits.every)] == ["cracks"]
