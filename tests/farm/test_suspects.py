"""Three crashes alone quarantine a job, on different workers where there are several; and nobody waits for ever."""

from datetime import timedelta
from random import Random
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from farm import jobs
from farm.jobs import Claimed
from farm.queries import claiming
from tests.farm.conftest import Queue


class Place:
    """Where a worker runs; each crash brings another process with another id."""

    def __init__(self, queue: Queue, device: str, *, name: str | None = None, pool: str = "default") -> None:
        self.queue, self.device, self.name, self.pool = queue, device, name, pool
        self.start()

    def start(self) -> None:
        self.worker = uuid4()
        self.queue.do(
            jobs.hello, worker=self.worker, pool=self.pool, host="h", pid=1, device=self.device, version="1",
            name=self.name,
        )  # fmt: skip
        self.queue.do(jobs.tell, worker=self.worker, state="idle")

    def claim(self, *, after: float = 0.0) -> Claimed | None:
        now = self.queue.do(claiming.database_now) + timedelta(seconds=after)
        return self.queue.claim(worker=self.worker, now=now, random=Random(1))

    def crash(self, *, after: float = 0.0) -> UUID:
        """Claim a job, which has to come alone, and crash by it; the supervisor starts another process."""
        claimed = self.claim(after=after)
        assert claimed is not None
        (job,) = claimed.jobs
        self.queue.do(jobs.rescue, settings=self.queue.settings, worker=self.worker)
        self.start()
        return job.id


def suspect(queue: Queue) -> UUID:
    """A job that is claimed alone, after a crash in company."""
    queue.submit(1)
    return queue.do(lambda conn: conn.execute(text("UPDATE jobs SET alone = true RETURNING id")).scalar_one())


def state_of(queue: Queue, job: UUID) -> str:
    return str(queue.do(jobs.get_job, queue.project, job).state)


def test_a_job_that_crashed_a_worker_goes_to_others_first(queue: Queue) -> None:
    job = suspect(queue)
    first, second, third = (Place(queue, f"cuda:{n}") for n in range(3))
    assert first.crash() == job
    assert first.claim() is None, "another process at the same place is the same worker"
    assert second.crash() == job
    assert first.claim() is None
    assert second.claim() is None
    assert third.crash() == job
    assert state_of(queue, job) == "failed", "three crashes on three workers"


def test_the_others_work_goes_on_behind_it(queue: Queue) -> None:
    job = suspect(queue)
    batch = queue.submit(2)
    first = Place(queue, "cuda:0")
    Place(queue, "cuda:1")
    assert first.crash() == job
    claimed = first.claim()
    assert claimed is not None
    assert {one.batch_id for one in claimed.jobs} == {batch.id}


def test_who_has_all_crashed_tries_again_at_once(queue: Queue) -> None:
    job = suspect(queue)
    first, second = Place(queue, "cuda:0"), Place(queue, "cuda:1")
    assert first.crash() == job
    assert second.crash() == job
    assert second.crash() == job
    assert state_of(queue, job) == "failed"


def test_an_only_worker_tries_again_at_once(queue: Queue) -> None:
    job = suspect(queue)
    only = Place(queue, "cpu")
    assert [only.crash() for _ in range(3)] == [job] * 3
    assert state_of(queue, job) == "failed"


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("it left", "left_at = now()"),
        ("it fell silent", "heartbeat_at = now() - interval '1 minute'"),
        ("it is only starting", "state = 'starting'"),
        ("it serves another pool", "pool = 'train'"),
        ("it rests from this checkpoint", 'resting = \'[{"hash": "{checkpoint}"}]\''),
        ("it rests from this lane", 'resting = \'[{"hash": "{lane}"}]\''),
        ("it is the same worker by its name", "name = 'one'"),
    ],
)
def test_nobody_waits_for_a_worker_that_could_not(queue: Queue, what: str, change: str) -> None:
    job = suspect(queue)
    first, other = Place(queue, "cuda:0", name="one"), Place(queue, "cuda:1", name="two")
    assert first.crash() == job
    segment = queue.do(lambda conn: conn.execute(text("SELECT lane, checkpoint FROM segments")).one())
    for word in ("lane", "checkpoint"):
        change = change.replace(f"{{{word}}}", getattr(segment, word))
    statement = f"UPDATE workers SET {change.replace(':', chr(92) + ':')} WHERE id = :other"
    queue.do(lambda conn: conn.execute(text(statement), {"other": other.worker}))
    assert first.crash() == job, what


def test_the_wait_for_others_has_an_end(queue: Queue) -> None:
    job = suspect(queue)
    first, other = Place(queue, "cuda:0"), Place(queue, "cuda:1")
    assert first.crash() == job
    wait = queue.settings.suspect_wait.total_seconds()
    assert first.claim(after=wait - 5) is None
    assert first.crash(after=wait + 5) == job, "the other one is busy or does not want it"
    assert state_of(queue, job) == "queued"
    assert other.crash() == job


def test_a_crash_in_company_and_one_before_a_retry_count_for_nothing(queue: Queue) -> None:
    first = Place(queue, "cuda:0")
    Place(queue, "cuda:1")
    queue.submit(1)
    job = first.crash()
    assert first.crash() == job, "the first crash was nobody's fault yet"
    assert first.claim() is None
    with queue.database.transaction() as conn:
        conn.execute(text("UPDATE jobs SET state = 'failed', finished_at = now(), finished_xid = pg_current_xact_id()"))
        jobs.retry_job(conn, queue.project, job)
    assert first.crash() == job
    assert first.crash() == job
    assert first.claim() is None
