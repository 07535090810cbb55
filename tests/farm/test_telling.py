"""What webhooks are told: with the change it tells of, once, and to nobody else."""

import threading

from farm import jobs
from farm.jobs import Claimed
from farm.maintenance import Sweeper
from farm.states import Outcome
from tests.farm.conftest import Queue
from tests.farm.hooks import add, fold, neighbour, render, settings, told

__all__ = ["settings"]


def test_a_batch_finishes_once_however_it_is_folded_and_again_after_a_retry(queue: Queue) -> None:
    made = add(queue, "http://127.0.0.1:1/", "batch.finished")
    batch = queue.submit(6)
    duties = [Sweeper(queue.settings, queue.database) for _ in range(2)]
    while (claimed := queue.claim(limit=1)) is not None:
        queue.finish(claimed, Outcome.FAILED, "render-failed")
        for sweeper in duties:
            sweeper.fold()
    assert len(told(queue, made)) == 1
    queue.do(jobs.retry_batch, queue.project, batch.id)
    while queue.claim(limit=4) is not None:
        pass
    fold(queue)
    assert len(told(queue, made)) == 1
    queue.do(jobs.rescue, settings=queue.settings, worker=queue.worker)
    queue.do(jobs.cancel_batch, queue.project, batch.id)
    fold(queue)
    assert [delivery.body["data"]["counts"]["cancelled"] for delivery in told(queue, made)] == [0, 6]


def test_batches_that_finish_at_once_in_many_threads_are_told_once_each(queue: Queue) -> None:
    made = add(queue, "http://127.0.0.1:1/", "batch.finished")
    batches = [queue.submit(4) for _ in range(5)]
    claims: list[Claimed] = []
    while len(claims) < 20:  # a claim that finds its first choice empty answers None
        if (claimed := queue.claim(limit=1)) is not None:
            claims.append(claimed)
    stop = threading.Event()

    def sweep() -> None:
        sweeper = Sweeper(queue.settings, queue.database)
        while not stop.is_set():
            sweeper.fold()

    sweepers = [threading.Thread(target=sweep) for _ in range(2)]
    finishers = [threading.Thread(target=queue.finish, args=(claimed,)) for claimed in claims]
    for thread in (*sweepers, *finishers):
        thread.start()
    for thread in finishers:
        thread.join()
    stop.set()
    for thread in sweepers:
        thread.join()
    fold(queue)
    assert sorted(delivery.body["data"]["id"] for delivery in told(queue, made)) == sorted(str(b.id) for b in batches)


def test_jobs_that_fail_for_good_are_told_in_the_transaction_that_fails_them(queue: Queue) -> None:
    made = add(queue, "http://127.0.0.1:1/", "job.failed")
    batch = queue.submit([{"prompt": "x", "labels": {"site": "bridge"}}, {"prompt": "y"}])
    claimed = queue.claim()
    assert claimed is not None
    one, other = claimed.jobs
    results = [jobs.Result(one.id, one.attempt, Outcome.FAILED, None, "bad-recipe", "no such thing"),
               jobs.Result(other.id, other.attempt, Outcome.RETRY, None, "render-failed", "again")]  # fmt: skip

    with queue.database.engine.connect() as conn:
        jobs.finish(conn, claim_id=claimed.claim_id, results=results, settings=queue.settings)
        conn.rollback()  # the worker died before COMMIT
    assert told(queue, made) == []
    for _ in range(2):
        queue.do(jobs.finish, claim_id=claimed.claim_id, results=results, settings=queue.settings)
    (delivery,) = told(queue, made)
    assert delivery.body["type"] == "job.failed"
    assert delivery.body["data"] == {
        "id": str(one.id), "batch_id": str(batch.id), "number": 0, "attempt": 1, "labels": {"site": "bridge"},
        "error": {"code": "bad-recipe", "message": "no such thing"},
    }  # fmt: skip


def test_a_quarantined_job_is_told_too(queue: Queue) -> None:
    made = add(queue, "http://127.0.0.1:1/", "job.failed")
    queue.submit(1)
    while queue.claim() is not None:
        queue.do(jobs.rescue, settings=queue.settings, worker=queue.worker)
    (delivery,) = told(queue, made)
    assert delivery.body["data"]["error"]["code"] == "quarantined"


def test_the_failed_share_is_told_once_when_it_is_reached(queue: Queue) -> None:
    made = add(queue, "http://127.0.0.1:1/", "batch.failed_share", failed_share=0.7)
    batch = queue.submit(10)
    for failed in range(1, 11):
        render(queue, Outcome.FAILED, limit=1)
        fold(queue)
        assert len(told(queue, made)) == (failed >= 7)
    (delivery,) = told(queue, made)
    assert delivery.body["data"]["counts"]["failed"] == 7
    assert delivery.body["data"]["failed_share"] == 0.7
    queue.do(jobs.retry_batch, queue.project, batch.id)
    render(queue, Outcome.FAILED, limit=64)
    fold(queue)
    assert len(told(queue, made)) == 1


def test_nothing_is_told_of_other_projects_or_deleted_batches(queue: Queue) -> None:
    made = add(queue, "http://127.0.0.1:1/")
    mine = queue.project
    queue.project = neighbour(queue)
    queue.submit(1)
    render(queue, Outcome.FAILED)
    fold(queue)
    queue.project = mine
    batch = queue.submit(1)
    claimed = queue.claim()
    assert claimed is not None
    queue.do(jobs.delete_batch, mine, batch.id)
    queue.finish(claimed, Outcome.FAILED)
    fold(queue)
    assert told(queue, made) == []


def test_a_batch_view_is_what_the_message_says(queue: Queue) -> None:
    made = add(queue, "https://receiver.example/", "batch.finished")
    batch = queue.submit(2)
    render(queue)
    fold(queue)
    (delivery,) = told(queue, made)
    assert delivery.body["data"]["counts"] == queue.batch(batch).counts.model_dump()
