"""Cancel, pause, resume, retry, reprioritise, delete: on segments, with rows following."""

import pytest
from sqlalchemy import text

from farm import jobs
from farm.errors import Conflict, NotFound
from farm.ids import new_id
from farm.jobs.changing import turn_cancelled, turn_retried
from farm.queries import changing, maintaining
from farm.states import JobState, Outcome
from tests.farm.conftest import Queue


def test_cancelling_a_batch_cancels_what_is_queued_and_stops_what_runs(queue: Queue) -> None:
    batch = queue.submit(12)
    claimed = queue.claim(limit=4)
    assert claimed is not None
    answer = queue.do(jobs.cancel_batch, queue.project, batch.id)
    assert (answer.counts.running, answer.counts.cancelled, answer.counts.queued) == (4, 8, 0)
    assert queue.claim() is None
    renewal = queue.do(jobs.renew, worker=queue.worker, claims=[claimed.claim_id], settings=queue.settings)
    assert renewal.cancelled == {job.id for job in claimed.jobs}
    queue.finish(claimed, Outcome.GIVEN_BACK)
    assert queue.counts(batch) == {"cancelled": 12}, "every way back to queued becomes cancelled"


def test_a_finished_upload_wins_over_a_late_cancel(queue: Queue) -> None:
    batch = queue.submit(1)
    claimed = queue.claim()
    assert claimed is not None
    queue.do(jobs.cancel_job, queue.project, claimed.jobs[0].id)
    queue.finish(claimed)
    assert queue.counts(batch) == {"succeeded": 1}


def test_a_rescue_of_a_cancelled_job_cancels_it(queue: Queue) -> None:
    batch = queue.submit(1)
    claimed = queue.claim()
    assert claimed is not None
    queue.do(jobs.cancel_job, queue.project, claimed.jobs[0].id)
    queue.do(jobs.rescue, settings=queue.settings, worker=queue.worker)
    assert queue.counts(batch) == {"cancelled": 1}


def test_a_large_cancel_answers_at_once_and_the_sweeper_turns_the_rows(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farm.jobs.changing.TURNED_AT_ONCE", 5)
    batch = queue.submit(23)
    answer = queue.do(jobs.cancel_batch, queue.project, batch.id)
    assert answer.counts.cancelled == 23
    raw = "SELECT count(*) FROM jobs WHERE state = 'queued'"
    assert queue.do(lambda conn: conn.scalar(text(raw))) == 18
    shown = queue.do(jobs.list_jobs, queue.project, states=["cancelled"], limit=100)
    assert len(shown.items) == 23
    with pytest.raises(Conflict, match="still being cancelled"):
        queue.do(jobs.retry_batch, queue.project, batch.id)
    segment = queue.do(lambda conn: conn.scalar(text("SELECT id FROM segments")))
    for _ in range(5):
        queue.do(turn_cancelled, segment, 5)
    assert queue.do(lambda conn: conn.scalar(text(raw))) == 0
    assert queue.do(jobs.retry_batch, queue.project, batch.id).counts.cancelled == 23, "the sweeper does this one too"
    assert queue.do(lambda conn: conn.scalar(text("SELECT retrying FROM segments")))
    assert queue.do(turn_retried, batch.id, segment) == 23
    assert queue.counts(batch) == {"queued": 23}


def test_retry_takes_failed_and_cancelled_but_never_succeeded(queue: Queue) -> None:
    batch = queue.submit(6)
    good = queue.claim(limit=2)
    bad = queue.claim(limit=2)
    assert good is not None
    assert bad is not None
    queue.finish(good)
    queue.finish(bad, Outcome.FAILED, "broken")
    queue.do(jobs.cancel_batch, queue.project, batch.id)
    assert queue.counts(batch) == {"succeeded": 2, "failed": 2, "cancelled": 2}
    with pytest.raises(Conflict, match="has failed"):
        queue.do(jobs.cancel_job, queue.project, bad.jobs[0].id)
    with pytest.raises(Conflict, match="only failed and cancelled"):
        queue.do(jobs.retry_job, queue.project, good.jobs[0].id)
    assert queue.do(jobs.retry_job, queue.project, bad.jobs[0].id).error is None
    queue.do(jobs.retry_batch, queue.project, batch.id)
    assert queue.counts(batch) == {"succeeded": 2, "queued": 4}
    again = queue.claim()
    assert again is not None
    assert len(again.jobs) == 4
    assert {job.attempt for job in again.jobs} == {1, 2}, "attempt numbers are never used again"


def test_pausing_stops_claims_and_resuming_allows_them(queue: Queue) -> None:
    batch = queue.submit(2)
    assert queue.do(jobs.pause_batch, queue.project, batch.id).paused
    assert queue.claim() is None
    assert not queue.do(jobs.resume_batch, queue.project, batch.id).paused
    assert queue.claim() is not None


def test_priority_of_a_batch_changes_the_order(queue: Queue) -> None:
    first, second = queue.submit(1), queue.submit(1, steps=5)
    queue.do(jobs.set_priority, queue.project, second.id, 7)
    claimed = queue.claim()
    assert claimed is not None
    assert claimed.jobs[0].batch_id == second.id
    assert queue.counts(first) == {"queued": 1}


def test_a_deleted_batch_is_gone_at_once_and_its_objects_later(queue: Queue) -> None:
    batch = queue.submit(3)
    claimed = queue.claim(limit=2)
    assert claimed is not None
    queue.finish(claimed)
    queue.do(jobs.delete_batch, queue.project, batch.id)
    with pytest.raises(NotFound):
        queue.batch(batch)
    with pytest.raises(NotFound):
        queue.do(jobs.get_job, queue.project, claimed.jobs[0].id)
    found = queue.do(changing.deleted_batches, 1)
    assert found == [batch.id]
    ids = queue.do(changing.some_jobs, batch.id, 100)
    queue.do(changing.delete_jobs, ids, queue.settings.keep_deleted)
    queue.do(changing.delete_batch_rows, batch.id)
    for table in ("jobs", "recipes", "attempts", "images", "segments", "batches", "counters", "counter_deltas"):
        left = queue.do(lambda conn, table=table: conn.scalar(text(f"SELECT count(*) FROM {table}")))
        assert left == 0, table
    assert queue.do(lambda conn: conn.scalar(text("SELECT count(*) FROM doomed_objects"))) == 4


def test_a_deleted_job_shrinks_its_batch(queue: Queue) -> None:
    batch = queue.submit(2)
    first = queue.do(jobs.list_jobs, queue.project, batch=batch.id).items[0]
    queue.do(jobs.delete_job, queue.project, first.id)
    assert queue.batch(batch).total == 1
    assert queue.counts(batch) == {"queued": 1}


def test_another_projects_things_do_not_exist(queue: Queue) -> None:
    batch = queue.submit(1)
    job = queue.do(jobs.list_jobs, queue.project, batch=batch.id).items[0]
    stranger = new_id()
    for verb in (jobs.get_job, jobs.cancel_job, jobs.retry_job, jobs.delete_job, jobs.image_of):
        with pytest.raises(NotFound):
            queue.do(verb, stranger, job.id)
    for verb in (jobs.get_batch, jobs.cancel_batch, jobs.pause_batch, jobs.resume_batch, jobs.retry_batch):
        with pytest.raises(NotFound):
            queue.do(verb, stranger, batch.id)
    assert queue.do(jobs.list_jobs, stranger).items == []


def test_folding_changes_no_count(queue: Queue) -> None:
    batch = queue.submit(9)
    claimed = queue.claim(limit=4)
    assert claimed is not None
    queue.finish(claimed)
    assert queue.claim(limit=2) is not None
    before = queue.counts(batch)
    while queue.do(maintaining.fold, 2).deltas:
        assert queue.counts(batch) == before
    assert before == {"queued": 3, "running": 2, "succeeded": 4}
    lane = queue.do(jobs.queue)[0]
    assert (lane.depth, lane.running, lane.checkpoint) == (3, 2, "a" * 64)


def test_pages_cover_everything_once(queue: Queue) -> None:
    batch = queue.submit([{"prompt": "p", "labels": {"set": "train" if n % 2 else "test"}} for n in range(11)])
    numbers, cursor = [], None
    while True:
        page = queue.do(jobs.list_jobs, queue.project, batch=batch.id, cursor=cursor, limit=4)
        numbers += [job.number for job in page.items]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert numbers == list(range(11))
    labelled = queue.do(jobs.list_jobs, queue.project, labels={"set": "train"}, limit=100)
    assert sorted(job.number for job in labelled.items) == [1, 3, 5, 7, 9]


def test_events_resume_where_they_stopped(queue: Queue) -> None:
    batch = queue.submit(5)
    first = queue.claim(limit=2)
    assert first is not None
    queue.finish(first)
    events = queue.do(jobs.events, queue.project, batch.id, None)
    assert [event.event for event in events] == ["job", "job", "progress"]
    rest = queue.claim()
    assert rest is not None
    queue.finish(rest)
    events = queue.do(jobs.events, queue.project, batch.id, events[0].id)
    seen = [event.data["number"] for event in events if event.event == "job"]
    assert sorted(seen) == [1, 2, 3, 4]
    last = queue.do(jobs.events, queue.project, batch.id, events[-1].id)
    assert [event.event for event in last] == ["progress", "done"]
    assert {job.id for job in first.jobs if job.number == 1} | {job.id for job in rest.jobs}
    assert queue.do(jobs.get_job, queue.project, rest.jobs[0].id).state is JobState.SUCCEEDED
