"""A worker that lives and does not work: it ends itself, and nobody ends who has a reason to take nothing."""

from collections.abc import Callable
from uuid import UUID

import pytest
from pydantic import SecretStr
from sqlalchemy import text

from farm import jobs, limits
from farm.db import Database
from farm.settings import Settings
from farm.storage import Store
from tests.farm.conftest import Queue
from tests.stub_worker import StubRenderer
from workers.executor import Executor
from workers.exits import Exit
from workers.idling import Idling

Looking = tuple[Executor, Callable[[float], list[Exit]]]


@pytest.fixture
def looking(database: Database, store: Store, settings: Settings, farm: Queue) -> Looking:
    """An executor that nobody lets work, and a look at it at a moment (seconds): how the process was ended so far."""
    executor = Executor(database, store, StubRenderer(), settings, farm.worker)
    now, ended = [0.0], list[Exit]()
    idling = Idling(executor, end=lambda status, _why: ended.append(status), clock=lambda: now[0])

    def look(moment: float) -> list[Exit]:
        now[0] = moment
        idling.look()
        return ended

    return executor, look


def test_work_that_lies_there_for_a_minute_ends_the_worker_and_is_not_touched(looking: Looking, farm: Queue) -> None:
    _, look = looking
    batch = farm.submit(2)
    assert [look(moment) for moment in (0.0, 15.0, 30.0, 45.0, 59.0)][-1] == []
    assert look(60.0) == [Exit.IDLE]
    assert farm.counts(batch) == {"queued": 2}
    assert farm.do(lambda conn: conn.scalar(text("SELECT count(*) FROM claims"))) == 0


def test_who_has_nothing_to_take_goes_on(looking: Looking, farm: Queue) -> None:
    _, look = looking
    assert look(0.0) == look(100.0) == []
    batch = farm.submit(2)
    farm.do(jobs.pause_batch, farm.project, batch.id)
    assert look(200.0) == look(300.0) == []
    farm.do(jobs.resume_batch, farm.project, batch.id)
    assert look(400.0) == look(459.0) == []
    # Somebody else took it meanwhile: the minute begins anew with the next job.
    assert farm.claim() is not None
    assert look(461.0) == []
    farm.submit(1)
    assert look(500.0) == look(559.0) == []


def test_who_took_something_in_between_goes_on(looking: Looking, farm: Queue) -> None:
    executor, look = looking
    farm.submit({"prompt": "x", "seed": n, "steps": 4 + n} for n in range(3))
    assert look(0.0) == look(59.0) == []
    assert executor.work_once()
    assert executor.claims == 1
    assert look(61.0) == look(62.0) == look(121.0) == []
    assert look(122.0) == [Exit.IDLE]


def test_a_project_at_its_limit_of_running_jobs_ends_nobody(looking: Looking, farm: Queue) -> None:
    _, look = looking
    farm.do(limits.change, farm.project, {"running_jobs": 2})
    farm.submit(5)
    elsewhere = farm.claim(2, worker=UUID(int=8))
    assert elsewhere is not None
    assert len(elsewhere.jobs) == 2
    assert [look(moment) for moment in (0.0, 30.0, 61.0, 200.0)][-1] == []
    # Where the limit leaves room again, taking nothing is a fault again, counted from then on.
    farm.finish(elsewhere)
    assert look(300.0) == look(359.0) == []
    assert look(360.0) == [Exit.IDLE]


def test_a_broker_that_is_away_ends_nobody(database: Database, store: Store, settings: Settings, farm: Queue) -> None:
    """Nobody rings and nobody is heard: whoever asks Postgres now and then, as every worker does, is well."""
    now, ended = [0.0], list[Exit]()
    away = settings.model_copy(update={"redis_url": SecretStr("redis://:nobody@127.0.0.1:9/0")})
    executor = Executor(database, store, StubRenderer(), away, farm.worker)
    idling = Idling(executor, end=lambda status, _why: ended.append(status), clock=lambda: now[0])

    def look_after(*waits: float) -> None:
        for wait in waits:
            now[0] += wait
            idling.look()

    for _ in range(3):
        # Nothing to take for longer than the limit, then work that no doorbell announced.
        look_after(30.0, 61.0, 200.0)
        farm.submit(1)
        look_after(0.0, 30.0)
        executor.work()
        look_after(0.0)
    assert executor.claims == 3
    assert ended == []
    # It is not the broker that is looked at: work that nobody asks for ends the worker with and without it.
    farm.submit(1)
    look_after(1.0, 61.0)
    assert ended == [Exit.IDLE]


def test_without_postgres_nobody_knows_and_nobody_ends(
    looking: Looking, farm: Queue, monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    executor, look = looking
    farm.submit(1)
    assert look(0.0) == []
    away = Database(settings.model_copy(update={"database_url": type(settings.database_url)(
        "postgresql://nobody:nobody@127.0.0.1:9/none")}), pool_size=1)  # fmt: skip
    monkeypatch.setattr(executor, "database", away)
    assert look(100.0) == look(200.0) == []
