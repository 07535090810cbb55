"""Claims, leases, fences, rescues: the promises of a running job."""

import threading
import time
import uuid
from datetime import datetime, timedelta
from random import Random
from typing import Any

import pytest
from sqlalchemy import event, text

from farm import jobs
from farm.db import Database
from farm.errors import Unavailable
from farm.jobs import Warm
from farm.objects import attempt_prefix
from farm.queries import claiming, finishing
from farm.recipe import Recipe
from farm.states import JobState, Outcome
from tests.farm.conftest import Queue


class ByAge(Random):
    """Draws of a claim in which age decides."""

    def random(self) -> float:
        return 0.0


def later(queue: Queue, seconds: float) -> datetime:
    return queue.do(claiming.database_now) + timedelta(seconds=seconds)


def old_server(queue: Queue) -> None:
    """Leases only count once the server has been up for one lease; the test server may be younger."""
    started = queue.do(lambda conn: conn.scalar(text("SELECT pg_postmaster_start_time()")))
    queue.settings = queue.settings.model_copy(update={"lease": timedelta(seconds=0.3), "heartbeat": timedelta(0.1)})
    while queue.do(claiming.database_now) < started + queue.settings.lease:
        queue.do(lambda conn: conn.execute(text("SELECT pg_sleep(0.05)")))


def test_a_job_goes_from_queued_to_succeeded(queue: Queue) -> None:
    batch = queue.submit(3)
    assert queue.counts(batch) == {"queued": 3}
    claimed = queue.claim()
    assert claimed is not None
    assert [job.recipe.seed for job in claimed.jobs] == [0, 1, 2]
    assert queue.counts(batch) == {"running": 3}
    assert set(queue.finish(claimed).values()) == {"done"}
    assert queue.counts(batch) == {"succeeded": 3}
    assert queue.claim() is None
    job = queue.do(jobs.get_job, queue.project, claimed.jobs[0].id)
    assert job.state is JobState.SUCCEEDED
    assert job.finished_at is not None
    assert job.image is not None


def test_a_recipe_comes_back_as_it_was_accepted(queue: Queue) -> None:
    queue.submit([{"prompt": "brick \\ \t 'x' \n ü", "seed": 2**53 - 1, "adapters": [{"name": "moss", "weight": 0.5}]}])
    claimed = queue.claim()
    assert claimed is not None
    recipe = claimed.jobs[0].recipe
    assert (recipe.prompt, recipe.seed) == ("brick \\ \t 'x' \n ü", 2**53 - 1)
    stored_hash = queue.do(lambda conn: conn.scalar(text("SELECT encode(hash, 'hex') FROM recipes")))
    assert recipe.hash == stored_hash
    assert Recipe.parse(recipe.canonical()) == recipe
    assert recipe.lane == claimed.lane


def test_eight_workers_take_each_job_exactly_once(queue: Queue) -> None:
    queue.submit(200)
    taken: list[uuid.UUID] = []
    lock, barrier = threading.Lock(), threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        misses = 0
        while misses < 3:
            claimed = queue.claim(limit=5, worker=uuid.uuid4())
            if claimed is None:
                misses += 1
                continue
            with lock:
                taken.extend(job.id for job in claimed.jobs)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == len(set(taken)) == 200


def test_a_zombie_changes_nothing(queue: Queue) -> None:
    """A worker that was thought dead comes back: its finish is refused and its objects are doomed."""
    batch = queue.submit(1)
    first = queue.claim()
    assert first is not None
    assert queue.do(jobs.rescue, settings=queue.settings, worker=queue.worker) == 1
    second = queue.claim(worker=uuid.uuid4())
    assert second is not None
    assert second.jobs[0].attempt == 2
    assert set(queue.finish(first).values()) == {"lost"}
    assert queue.counts(batch) == {"running": 1}
    assert set(queue.finish(second).values()) == {"done"}
    assert set(queue.finish(first).values()) == {"lost"}
    doomed = queue.do(lambda conn: set(conn.scalars(text("SELECT key FROM doomed_objects"))))
    job = first.jobs[0]
    assert doomed == {f"p/{job.id}/1", f"p/{job.id}/1.webp", attempt_prefix(queue.project, job.id, 1)}
    assert queue.do(lambda conn: conn.scalar(text("SELECT count(*) FROM images"))) == 1


def test_a_repeated_finish_or_claim_is_recognised(queue: Queue) -> None:
    queue.submit(2)
    claim_id = uuid.uuid4()
    first = queue.claim(claim_id=claim_id)
    again = queue.claim(claim_id=claim_id)
    assert first is not None
    assert again is not None
    assert [job.id for job in first.jobs] == [job.id for job in again.jobs]
    assert queue.finish(first) == queue.finish(first)
    assert set(queue.finish(first).values()) == {"done"}


def test_an_expired_lease_is_rescued_and_a_renewed_one_is_not(queue: Queue) -> None:
    old_server(queue)
    lease = queue.settings.lease
    batch = queue.submit(2)
    start = later(queue, 0)
    claimed = queue.claim(now=start)
    assert claimed is not None
    assert queue.do(jobs.rescue, settings=queue.settings, now=start + lease * 0.9) == 0
    again = {"worker": queue.worker, "claims": [claimed.claim_id], "settings": queue.settings}
    assert not queue.do(jobs.renew, **again, now=start + lease * 0.9).lost
    assert queue.do(jobs.rescue, settings=queue.settings, now=start + lease * 1.8) == 0
    assert queue.do(jobs.rescue, settings=queue.settings, now=start + lease * 2) == 2
    assert queue.counts(batch) == {"queued": 2}
    assert queue.do(jobs.renew, **again, now=start + lease * 2).lost == {claimed.claim_id}


def test_a_rescue_waits_for_nobody(queue: Queue) -> None:
    """A worker frozen inside a transaction keeps its own jobs for a while, and nobody else's."""
    batch = queue.submit(4)
    frozen, dead = queue.claim(limit=2), queue.claim(limit=2)
    assert frozen is not None
    assert dead is not None
    with queue.database.transaction() as conn:
        finishing.lock_jobs(conn, [frozen.jobs[0].id])
        queue.do(lambda conn: conn.execute(text("SET LOCAL lock_timeout = '1s'")))
        assert queue.do(jobs.rescue, settings=queue.settings, worker=queue.worker) == 2
        assert queue.counts(batch) == {"running": 2, "queued": 2}
    assert queue.do(jobs.rescue, settings=queue.settings, worker=queue.worker) == 2
    assert queue.counts(batch) == {"queued": 4}


def test_a_transaction_that_lies_idle_is_ended(queue: Queue) -> None:
    """So a worker frozen inside one gives its locks back long before its lease is over."""
    impatient = Database(queue.settings, pool_size=1, idle_limit=timedelta(seconds=0.2))
    queue.submit(1)

    def freeze() -> None:
        with impatient.transaction() as conn:
            conn.execute(text("SELECT id FROM jobs FOR UPDATE"))
            while queue.claim() is None:
                time.sleep(0.05)
            conn.execute(text("SELECT 1"))

    with pytest.raises(Unavailable):
        freeze()
    impatient.dispose()


def test_after_a_crash_a_job_is_claimed_alone_and_only_lonely_crashes_quarantine(queue: Queue) -> None:
    batch = queue.submit(3)
    assert queue.claim() is not None
    queue.do(jobs.rescue, settings=queue.settings, worker=queue.worker)
    poison = None
    for _ in range(queue.settings.max_crashes):
        claimed = queue.claim()
        assert claimed is not None
        assert len(claimed.jobs) == 1
        poison = poison or claimed.jobs[0].id
        assert claimed.jobs[0].id == poison
        queue.do(jobs.rescue, settings=queue.settings, worker=queue.worker)
    assert queue.counts(batch) == {"queued": 2, "failed": 1}
    failed = queue.do(jobs.get_job, queue.project, poison)
    assert failed.error is not None
    assert failed.error.code == "quarantined"
    for _ in range(2):
        claimed = queue.claim()
        assert claimed is not None
        queue.finish(claimed)
    assert queue.counts(batch) == {"succeeded": 2, "failed": 1}


def test_failures_back_off_and_end(queue: Queue) -> None:
    batch = queue.submit(1)
    for failure in range(1, queue.settings.max_failures + 1):
        claimed = queue.claim(now=later(queue, 3600 * failure))
        assert claimed is not None
        queue.finish(claimed, Outcome.RETRY, "render-failed")
        if failure < queue.settings.max_failures:
            assert queue.counts(batch) == {"queued": 1}
            assert queue.claim() is None, "backoff keeps it from being claimed at once"
    assert queue.counts(batch) == {"failed": 1}


def test_an_outage_is_no_failure_of_the_job(queue: Queue) -> None:
    batch = queue.submit(1)
    for number in range(1, 2 * queue.settings.max_failures):
        claimed = queue.claim(now=later(queue, 3600 * number))
        assert claimed is not None
        queue.finish(claimed, Outcome.RETRY, "unavailable")
        assert queue.claim() is None, "backoff keeps it from being claimed at once"
    assert queue.counts(batch) == {"queued": 1}
    assert queue.do(lambda conn: conn.execute(text("SELECT failures FROM jobs")).scalar_one()) == 0


def test_an_animation_counts_as_its_frames(queue: Queue) -> None:
    batch = queue.submit([{"prompt": "a", "motion": "wind", "frames": 4, "seed": n} for n in range(5)])
    for number in (2, 2, 1):
        claimed = queue.claim(limit=8)
        assert claimed is not None
        assert (len(claimed.jobs), claimed.more) == (number, number == 2)
    assert queue.counts(batch) == {"running": 5}
    queue.submit([{"prompt": "a", "motion": "wind", "frames": 4}])
    claimed = queue.claim(limit=3)
    assert claimed is not None
    assert len(claimed.jobs) == 1, "one at least"


def test_giving_back_spends_nothing(queue: Queue) -> None:
    batch = queue.submit(1)
    for _ in range(10):
        claimed = queue.claim()
        assert claimed is not None
        queue.finish(claimed, Outcome.GIVEN_BACK)
    assert queue.counts(batch) == {"queued": 1}
    row = queue.do(lambda conn: conn.execute(text("SELECT failures, crashes, attempt FROM jobs")).one())
    assert tuple(row) == (0, 0, 10)


def test_a_micro_batch_has_one_lane_and_one_adapter_set(queue: Queue) -> None:
    rows = [
        {"prompt": "a", "adapters": [{"name": "moss" if n % 2 else "night"}], "steps": 4 if n % 4 < 2 else 8}
        for n in range(16)
    ]
    queue.submit(rows)
    seen = 0
    while claimed := queue.claim():
        assert len({job.recipe.lane for job in claimed.jobs}) == 1
        assert len({job.recipe.adapter_set for job in claimed.jobs}) == 1
        assert len(claimed.jobs) == 4
        seen += len(claimed.jobs)
    assert seen == 16


def styled(count: int) -> list[dict[str, Any]]:
    """Jobs with a different adapter set each."""
    return [
        {"prompt": f"crack {n}", "seed": n, "adapters": [{"name": "moss", "weight": n % 99 / 10 + 0.1}]}
        for n in range(count)
    ]


def test_a_worker_with_slots_takes_several_adapter_sets_of_one_lane(queue: Queue) -> None:
    queue.submit([*styled(3), {"prompt": "bare", "seed": 9}])
    queue.submit(styled(6))
    queue.submit(styled(4), steps=8)
    claimed = queue.claim(warm=Warm(mixes=True))
    assert claimed is not None
    assert len(claimed.jobs) == 8, "two segments of a lane fill one micro-batch"
    assert len({job.recipe.lane for job in claimed.jobs}) == 1
    assert len({job.recipe.adapter_set for job in claimed.jobs}) == 5
    first = [job for job in claimed.jobs if job.batch_id == claimed.jobs[0].batch_id]
    assert [job.number for job in first] == [0, 1, 2, 3], "in the order of the queue"
    rest = queue.claim(warm=Warm(mixes=True))
    assert rest is not None
    assert len(rest.jobs) == 2
    other = queue.claim(warm=Warm(mixes=True))
    assert other is not None
    assert {job.recipe.steps for job in other.jobs} == {8}
    assert len(other.jobs) == 4
    assert queue.claim(warm=Warm(mixes=True)) is None


@pytest.mark.parametrize("mixes", [False, True])
def test_segments_that_were_just_emptied_hide_nothing(queue: Queue, mixes: bool) -> None:
    """A claim that took all of a segment exactly does not know that; the next one finds the segment behind it."""
    for _ in range(3):
        queue.submit(8)
    sizes = []
    while claimed := queue.claim(warm=Warm(mixes=mixes)):
        sizes.append(len(claimed.jobs))
    assert sizes == [8, 8, 8]


def test_a_lane_that_is_cheaper_apart_is_claimed_one_set_at_a_time(queue: Queue) -> None:
    queue.submit(styled(2))
    first = queue.claim()
    assert first is not None
    assert len(first.jobs) == 1
    queue.finish(first, Outcome.GIVEN_BACK)
    apart = queue.claim(warm=Warm(mixes=True, apart=frozenset({first.lane})))
    assert apart is not None
    assert len(apart.jobs) == 1


def test_a_job_under_suspicion_comes_alone_among_mixed_ones_too(queue: Queue) -> None:
    queue.submit(styled(4))
    queue.submit(styled(2))
    queue.do(lambda conn: conn.execute(text("UPDATE jobs SET alone = true WHERE number = 1")))
    sizes = []
    while claimed := queue.claim(warm=Warm(mixes=True)):
        sizes.append((len(claimed.jobs), {job.alone for job in claimed.jobs}))
    assert sum(size for size, _ in sizes) == 6
    assert all(size == 1 for size, alone in sizes if alone == {True})
    assert sum(alone == {True} for _, alone in sizes) == 2
    assert {len(alone) for _, alone in sizes} == {1}


def test_a_mixed_claim_costs_the_same_statements_whatever_the_queue_holds(queue: Queue) -> None:
    """Each statement walks an index from the head; so what counts is how many there are and what they step over."""

    def statements() -> int:
        seen: list[str] = []

        def listen(_conn: Any, _cursor: Any, statement: str, *_more: Any) -> None:
            seen.append(statement)

        with queue.database.transaction() as conn:
            event.listen(conn.engine, "before_cursor_execute", listen)
            try:
                jobs.claim(
                    conn, claim_id=uuid.uuid4(), worker=queue.worker, pool="default", warm=Warm(mixes=True), limit=8,
                    settings=queue.settings,
                )  # fmt: skip
            finally:
                event.remove(conn.engine, "before_cursor_execute", listen)
        return len(seen)

    queue.submit(styled(20))
    few = statements()
    assert few <= 16, "at most one for each job, and eight more"
    queue.submit(styled(2000))
    for _ in range(100):
        queue.submit(styled(1))
    assert max(statements() for _ in range(5)) <= few


def test_jobs_of_several_batches_share_a_micro_batch(queue: Queue) -> None:
    for _ in range(5):
        queue.submit(1)
    claimed = queue.claim()
    assert claimed is not None
    assert len({job.batch_id for job in claimed.jobs}) == 5
    assert queue.claim() is None


def test_warm_work_goes_first_but_not_for_ever(queue: Queue) -> None:
    queue.submit(1, checkpoint="other")
    queue.submit(20)
    first = queue.claim()
    assert first is not None
    assert first.jobs[0].recipe.checkpoint == "c" * 64
    queue.finish(first, Outcome.GIVEN_BACK)
    warm = Warm({first.jobs[0].recipe.model_copy(update={"checkpoint": "a" * 64}).lane: ""})
    second = queue.claim(warm=warm)
    assert second is not None
    assert second.jobs[0].recipe.checkpoint == "a" * 64
    overdue = later(queue, queue.settings.affinity_bound.total_seconds() + 5)
    third = queue.claim(warm=warm, now=overdue, random=ByAge())
    assert third is not None
    assert third.jobs[0].recipe.checkpoint == "c" * 64


def test_higher_priority_goes_first_and_the_future_waits(queue: Queue) -> None:
    queue.submit(1, priority=0)
    queue.submit(1, priority=5, steps=5)
    future = later(queue, 60).isoformat()
    queue.submit(1, priority=9, steps=6, run_at=future)
    steps = [queue.claim(), queue.claim()]
    assert [claimed.jobs[0].recipe.steps for claimed in steps if claimed] == [5, 4]
    assert queue.claim() is None
    due = queue.claim(now=later(queue, 61))
    assert due is not None
    assert due.jobs[0].recipe.steps == 6


def test_only_forbidden_rows_are_refused_by_the_database(queue: Queue) -> None:
    queue.submit(1)
    with pytest.raises(Exception, match="finished_iff_terminal"):
        queue.do(lambda conn: conn.execute(text("UPDATE jobs SET state = 'succeeded'")))
