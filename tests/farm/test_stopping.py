"""A batch that stops itself at a failed share: once, with the cause, and never by failures that a retry took back."""

import threading
from typing import Any

import pytest
from sqlalchemy import text

from farm import jobs
from farm.errors import Conflict
from farm.maintenance import Sweeper
from farm.queries import maintaining
from farm.states import Outcome
from farm.stopping import stop_batches
from farm.views import BatchView
from tests.farm.conftest import Queue
from tests.farm.hooks import add, settings, told

__all__ = ["settings"]


def end(queue: Queue, failed: int = 0, succeeded: int = 0) -> None:
    """So many jobs fail for good, and so many succeed."""
    for outcome, code, count in ((Outcome.FAILED, "render-failed", failed), (Outcome.SUCCEEDED, "", succeeded)):
        left = count
        while left:
            claimed = queue.claim(limit=min(left, 64))
            assert claimed is not None
            queue.finish(claimed, outcome, code)
            left -= len(claimed.jobs)


def sweep(queue: Queue) -> None:
    sweeper = Sweeper(queue.settings, queue.database)
    sweeper.fold()
    sweeper.turn()


def reason(queue: Queue, batch: BatchView) -> str | None:
    return queue.batch(batch).stop_reason


def test_it_stops_at_the_share_and_says_so(queue: Queue) -> None:
    made = add(queue, "http://127.0.0.1:1/", "batch.stopped", "batch.finished")
    batch = queue.submit(100, stop_at_failed_share=0.2)
    assert batch.stop_at_failed_share == 0.2
    end(queue, failed=4, succeeded=17)
    sweep(queue)
    assert reason(queue, batch) is None, "4 of 21 are less than a fifth"
    end(queue, failed=2)
    sweep(queue)
    why = "6 of 23 jobs failed, and the batch was to stop at a share of 0.2"
    assert reason(queue, batch) == why
    assert queue.counts(batch) == {"succeeded": 17, "failed": 6, "cancelled": 77}
    assert queue.claim() is None
    cancelled = queue.do(jobs.list_jobs, queue.project, states=["cancelled"], limit=100).items
    assert {(job.error.code, job.error.message) for job in cancelled if job.error} == {("batch-stopped", why)}
    assert len(cancelled) == 77
    sweep(queue)
    stopped, finished = sorted(told(queue, made), key=lambda one: one.event, reverse=True)
    assert (stopped.event, finished.event) == ("batch.stopped", "batch.finished")
    assert stopped.body["data"]["reason"] == why
    assert stopped.body["data"]["id"] == str(batch.id)


@pytest.mark.parametrize(("total", "first"), [(2, 2), (4, 2), (10, 5), (60, 20)])
def test_it_is_not_judged_by_its_first_jobs(queue: Queue, total: int, first: int) -> None:
    batch = queue.submit(total, stop_at_failed_share=0.1)
    end(queue, failed=first - 1)
    sweep(queue)
    assert reason(queue, batch) is None
    end(queue, failed=1)
    sweep(queue)
    assert (reason(queue, batch) is not None) is (total > first), "of two jobs none is left to stop"
    assert queue.counts(batch).get("cancelled", 0) == total - first


def test_without_a_share_and_below_it_nothing_stops(queue: Queue) -> None:
    plain = queue.submit(30)
    end(queue, failed=30)
    batch = queue.submit(30, stop_at_failed_share=1)
    end(queue, succeeded=1, failed=28)
    sweep(queue)
    assert (reason(queue, plain), reason(queue, batch)) == (None, None)
    assert queue.counts(batch) == {"failed": 28, "succeeded": 1, "queued": 1}


def test_what_runs_finishes_and_what_would_come_back_does_not(queue: Queue) -> None:
    batch = queue.submit(30, stop_at_failed_share=0.5)
    running, fails, crashes = queue.claim(limit=2), queue.claim(limit=1), queue.claim(limit=1)
    assert running is not None
    assert fails is not None
    assert crashes is not None
    end(queue, failed=20)
    sweep(queue)
    assert queue.counts(batch) == {"running": 4, "failed": 20, "cancelled": 6}
    claims = [one.claim_id for one in (running, fails, crashes)]
    renewal = queue.do(jobs.renew, worker=queue.worker, claims=claims, settings=queue.settings)
    assert (renewal.lost, renewal.cancelled) == (frozenset(), frozenset()), "nobody is told to drop what it renders"
    with pytest.raises(Conflict, match="still being cancelled"):
        queue.do(jobs.retry_batch, queue.project, batch.id)
    assert set(queue.finish(running).values()) == {"done"}
    queue.finish(fails, Outcome.RETRY, "render-failed")
    queue.do(jobs.rescue, settings=queue.settings, worker=queue.worker)
    sweep(queue)
    assert queue.counts(batch) == {"succeeded": 2, "failed": 20, "cancelled": 8}


def test_a_person_who_cancels_it_meanwhile_stops_what_runs_too(queue: Queue) -> None:
    batch = queue.submit(30, stop_at_failed_share=0.5)
    running = queue.claim(limit=1)
    assert running is not None
    end(queue, failed=20)
    sweep(queue)
    queue.do(jobs.cancel_batch, queue.project, batch.id)
    renewal = queue.do(jobs.renew, worker=queue.worker, claims=[running.claim_id], settings=queue.settings)
    assert renewal.cancelled == {running.jobs[0].id}


def test_a_stopped_batch_can_be_retried_and_stops_again(queue: Queue) -> None:
    made = add(queue, "http://127.0.0.1:1/", "batch.stopped")
    batch = queue.submit(50, stop_at_failed_share=0.5)
    for round_ in (1, 2):
        end(queue, failed=20)
        sweep(queue)
        assert queue.counts(batch) == {"failed": 20, "cancelled": 30}
        assert len(told(queue, made)) == round_
        queue.do(jobs.retry_batch, queue.project, batch.id)
        sweep(queue)
        assert reason(queue, batch) is None
        assert queue.counts(batch) == {"queued": 50}
        errors = queue.do(lambda conn: conn.scalar(text("SELECT count(error_code) FROM jobs")))
        assert errors == 0
    end(queue, succeeded=50)
    sweep(queue)
    assert queue.counts(batch) == {"succeeded": 50}


def test_jobs_that_are_retried_one_by_one_are_not_stopped_by_the_old_failures(queue: Queue) -> None:
    batch = queue.submit(50, stop_at_failed_share=0.5)
    end(queue, failed=20)
    sweep(queue)
    for job in queue.do(jobs.list_jobs, queue.project, states=["failed"], limit=3).items:
        queue.do(jobs.retry_job, queue.project, job.id)
    end(queue, succeeded=1)
    sweep(queue)
    assert queue.counts(batch) == {"queued": 2, "succeeded": 1, "failed": 17, "cancelled": 30}


def test_a_retry_that_is_not_folded_yet_counts(queue: Queue) -> None:
    """The sweeper is behind: the counters still hold failures that were taken back."""
    batch = queue.submit(50, stop_at_failed_share=0.5)
    end(queue, failed=25)
    queue.do(maintaining.fold, 1000)
    queue.do(jobs.retry_batch, queue.project, batch.id)
    assert queue.do(stop_batches, [batch.id]) == []


def test_a_retry_that_goes_on_in_the_background_is_not_judged(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farm.jobs.changing.TURNED_AT_ONCE", 10)
    rows = [{"prompt": "x", "steps": steps, "seed": n} for steps, many in ((4, 8), (5, 40)) for n in range(many)]
    batch = queue.submit(rows, stop_at_failed_share=0.5)
    end(queue, failed=40)
    end(queue, succeeded=1)
    queue.do(jobs.retry_batch, queue.project, batch.id)
    failed = queue.counts(batch).get("failed", 0)
    assert queue.do(stop_batches, [batch.id]) == []
    sweep(queue)
    assert failed > 0
    assert queue.counts(batch) == {"queued": 47, "succeeded": 1}
    assert reason(queue, batch) is None


def test_a_stop_and_a_retry_at_once_come_one_after_the_other(queue: Queue) -> None:
    batch = queue.submit(50, stop_at_failed_share=0.5)
    end(queue, failed=25)
    queue.do(maintaining.fold, 1000)
    with queue.database.transaction() as conn:
        jobs.retry_batch(conn, queue.project, batch.id)
        assert queue.do(stop_batches, [batch.id]) == [], "a retry is under way that it cannot see"
    assert queue.do(stop_batches, [batch.id]) == []
    end(queue, failed=25)
    answers: list[Any] = []
    with queue.database.transaction() as conn:
        assert stop_batches(conn, [batch.id]) == [batch.id]

        def retry() -> None:
            try:
                queue.do(jobs.retry_batch, queue.project, batch.id)
            except Conflict as error:
                answers.append(error.message)

        thread = threading.Thread(target=retry)
        thread.start()
        waiting = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
        while not queue.do(lambda conn: conn.scalar(waiting)):
            pass
    thread.join()
    assert "still being cancelled" in answers[0]


def test_two_sweepers_stop_it_once(queue: Queue) -> None:
    made = add(queue, "http://127.0.0.1:1/", "batch.stopped")
    batches = [queue.submit(40, stop_at_failed_share=0.5, steps=3 + n) for n in range(4)]
    end(queue, failed=4 * 20 - 20, succeeded=0)
    queue.do(maintaining.fold, 1000)
    stopped: list[Any] = []
    ids = [batch.id for batch in batches]
    threads = [threading.Thread(target=lambda: stopped.extend(queue.do(stop_batches, ids))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stopped) == len(set(stopped)) == len(told(queue, made)) > 0


def test_a_pause_and_a_resume_change_nothing_of_it(queue: Queue) -> None:
    batch = queue.submit(50, stop_at_failed_share=0.5)
    end(queue, failed=20)
    queue.do(jobs.pause_batch, queue.project, batch.id)
    sweep(queue)
    queue.do(jobs.resume_batch, queue.project, batch.id)
    assert queue.claim() is None
    assert queue.counts(batch) == {"failed": 20, "cancelled": 30}
    queue.do(jobs.retry_batch, queue.project, batch.id)
    assert queue.claim() is not None
