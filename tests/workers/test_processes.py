"""The promises of worker processes, with real servers: what is killed, frozen, emptied or restarted loses no job."""

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from redis import Redis
from sqlalchemy import text

from farm import doorbell, jobs
from farm.settings import Settings
from farm.stack import Servers
from farm.states import JobState
from farm.storage import Store
from tests.farm.conftest import Queue
from tests.workers.conftest import Start, sweeping, until
from workers.exits import Exit


def all_succeeded(farm: Queue, batch: object, count: int) -> bool:
    return farm.counts(batch) == {"succeeded": count}


def test_a_doorbell_wakes_a_worker_and_every_job_succeeds(
    farm: Queue, start: Start, settings: Settings, store: Store
) -> None:
    telling = {"log_format": "json", "log_level": "debug"}
    patient = settings.model_copy(update={"poll": timedelta(seconds=60), **telling})
    worker = start(patient)
    batch = farm.submit(10)
    doorbell.ring(settings, settings.pool)
    until(lambda: all_succeeded(farm, batch, 10))
    found = farm.do(jobs.list_jobs, farm.project, batch=batch.id)
    assert {job.attempt for job in found.items} == {1}
    image = farm.do(jobs.image_of, farm.project, found.items[0].id)
    assert store.exists(image.key)
    assert store.exists(image.thumbnail_key)
    worker.signal(signal.SIGTERM)
    assert worker.wait() == Exit.LEFT
    lines = [json.loads(line) for line in worker.log.read_text().splitlines()]
    ended = [line for line in lines if line["event"] == "job ended"]
    attempts = farm.do(lambda conn: conn.execute(text("SELECT job_id, number, claim_id FROM attempts")).all())
    assert {(line["job"], line["attempt"], line["claim"]) for line in ended} == {
        (str(job), str(number), str(claim)) for job, number, claim in attempts
    }
    workers = farm.do(lambda conn: list(conn.scalars(text("SELECT CAST(id AS text) FROM workers"))))
    assert [line["worker"] for line in ended] == workers * 10


def test_jobs_of_a_killed_worker_run_elsewhere(farm: Queue, start: Start, sweeper: None) -> None:
    batch = farm.submit(4)
    doomed = start(STUB_STEP_SECONDS="30")
    until(lambda: farm.counts(batch) == {"running": 4})
    doomed.signal(signal.SIGKILL)
    start()
    until(lambda: all_succeeded(farm, batch, 4))


def test_a_poison_job_is_quarantined_and_its_neighbour_is_innocent(
    farm: Queue, start: Start, settings: Settings
) -> None:
    batch = farm.submit([{"prompt": "fine", "seed": 1}, {"prompt": "poison", "seed": 2}])
    with sweeping(settings.model_copy(update={"max_crashes": 1})):
        for _ in range(3):
            worker = start(STUB_CRASH="poison")
            until(lambda worker=worker: not worker.alive or farm.batch(batch).done)
            if worker.alive:
                break
        until(lambda: farm.counts(batch) == {"succeeded": 1, "failed": 1})
    failed = farm.do(jobs.list_jobs, farm.project, batch=batch.id, states=[JobState.FAILED]).items[0]
    assert failed.prompt == "poison"
    assert failed.error is not None
    assert failed.error.code == "quarantined"


def test_an_emptied_broker_costs_seconds_and_no_job(
    farm: Queue, start: Start, sweeper: None, redis: Redis, settings: Settings, ring: Callable[[], None]
) -> None:
    start()
    batch = farm.submit(40)
    for _ in range(5):
        ring()
        for key in redis.scan_iter(f"{settings.redis_prefix}*"):
            redis.delete(key)
        time.sleep(0.05)
    until(lambda: all_succeeded(farm, batch, 40))


def test_without_a_broker_the_worker_asks_by_itself(farm: Queue, start: Start, settings: Settings) -> None:
    lonely = settings.model_copy(update={"redis_url": type(settings.redis_url)("redis://:nobody@127.0.0.1:9/0")})
    worker = start(lonely)
    batch = farm.submit(12)
    until(lambda: all_succeeded(farm, batch, 12))
    worker.signal(signal.SIGTERM)
    assert worker.wait() == Exit.LEFT


def test_results_are_held_while_postgres_is_away(farm: Queue, start: Start, sweeper: None, servers: Servers) -> None:
    worker = start(STUB_STEP_SECONDS="0.3")
    batch = farm.submit(4)
    until(lambda: farm.counts(batch) == {"running": 4})
    assert servers.postgres is not None
    servers.postgres.stop()
    until(lambda: worker.said("holding results") or worker.said("no heartbeat"))
    time.sleep(2)
    servers.postgres.start()
    until(lambda: all_succeeded(farm, batch, 4))
    assert worker.alive
    attempts = farm.do(lambda conn: conn.scalar(text("SELECT max(attempt) FROM jobs")))
    assert attempts == 1


def test_a_zombies_finish_changes_nothing(farm: Queue, start: Start, sweeper: None) -> None:
    zombie = start(STUB_STEP_SECONDS="0.3")
    batch = farm.submit(3)
    until(lambda: farm.counts(batch) == {"running": 3})
    zombie.signal(signal.SIGSTOP)
    start()
    until(lambda: all_succeeded(farm, batch, 3))
    before = [job.model_dump() for job in farm.do(jobs.list_jobs, farm.project, batch=batch.id).items]
    zombie.signal(signal.SIGCONT)
    until(lambda: zombie.said("claim lost") or zombie.said("came too late"))
    until(lambda: zombie.said("came too late"))
    assert [job.model_dump() for job in farm.do(jobs.list_jobs, farm.project, batch=batch.id).items] == before
    assert {job["attempt"] for job in before} == {2}


def test_garbage_in_the_queues_ends_no_worker(farm: Queue, start: Start, redis: Redis, settings: Settings) -> None:
    queue = settings.redis_prefix + doorbell.queue_of(settings.pool)
    redis.set(queue, "a string in place of a queue")
    patient = settings.model_copy(update={"poll": timedelta(seconds=60)})
    worker = start(patient)
    until(lambda: worker.said("moved a key aside"))
    pickle = '{"body": "gASVBgAAAAAAAABdlC4=", "content-encoding": "binary", "content-type": "application/x-python-serialize", "headers": {"task": "farm.render", "id": "1"}, "properties": {"delivery_tag": "1", "delivery_info": {"exchange": "", "routing_key": "x"}, "body_encoding": "base64", "correlation_id": "1"}}'  # noqa: E501
    forged = pickle.replace("application/x-python-serialize", "application/json").replace("farm.render", "os.system")
    for garbage in (b"\xff\xfe", "not json", "42", "[]", "null", "{}", '{"body": 1, "properties": {}}', pickle, forged):
        redis.lpush(queue, garbage)
    until(lambda: redis.llen(queue) == 0)
    batch = farm.submit(3)
    doorbell.ring(settings, settings.pool)
    until(lambda: all_succeeded(farm, batch, 3))
    assert worker.alive


def test_a_leaving_worker_gives_back_what_does_not_fit_its_grace(farm: Queue, start: Start) -> None:
    worker = start(STUB_STEP_SECONDS="2")
    batch = farm.submit(6)
    until(lambda: farm.counts(batch) == {"running": 4, "queued": 2})
    worker.signal(signal.SIGTERM)
    assert worker.wait() == Exit.LEFT
    assert farm.counts(batch) == {"queued": 6}
    rows = farm.do(lambda conn: conn.execute(text("SELECT failures, crashes, alone FROM jobs")).all())
    assert set(rows) == {(0, 0, False)}
    start()
    until(lambda: all_succeeded(farm, batch, 6))


def test_a_leaving_worker_finishes_what_fits(farm: Queue, start: Start, settings: Settings) -> None:
    # Room for a machine that is busy: what fits is judged by how long steps take.
    worker = start(settings.model_copy(update={"grace": timedelta(seconds=30)}), STUB_STEP_SECONDS="0.2")
    batch = farm.submit(4)
    # What is claimed and not begun is given back at once.
    until(lambda: worker.said("rendering"))
    worker.signal(signal.SIGTERM)
    assert worker.wait() == Exit.LEFT
    assert all_succeeded(farm, batch, 4)


def test_a_hanging_worker_leaves_by_its_timer_and_gives_back(farm: Queue, start: Start) -> None:
    worker = start(STUB_HANG="hang")
    batch = farm.submit([{"prompt": "hang", "seed": 1}])
    until(lambda: farm.counts(batch) == {"running": 1})
    began = time.monotonic()
    worker.signal(signal.SIGTERM)
    assert worker.wait() == Exit.HUNG
    assert time.monotonic() - began < 6
    assert farm.counts(batch) == {"queued": 1}


def test_a_phase_over_its_limit_ends_the_process(farm: Queue, start: Start, settings: Settings) -> None:
    strict = settings.model_copy(update={"limit_step": timedelta(seconds=0.5), "limit_load": timedelta(seconds=1)})
    worker = start(strict, STUB_HANG="hang")
    farm.submit([{"prompt": "hang", "seed": 1}])
    assert worker.wait() == Exit.PHASE


def test_a_lost_device_ends_the_process_after_its_results_were_told(farm: Queue, start: Start) -> None:
    worker = start(STUB_LOST_DEVICE="cursed")
    batch = farm.submit([{"prompt": "cursed", "seed": 1}])
    assert worker.wait() == Exit.DEVICE
    assert farm.counts(batch) == {"queued": 1}
    assert farm.do(lambda conn: conn.scalar(text("SELECT failures FROM jobs"))) == 1


def test_cancelling_a_running_job_stops_it_at_the_next_step(farm: Queue, start: Start, settings: Settings) -> None:
    slow = settings.model_copy(update={"heartbeat": timedelta(seconds=5), "lease": timedelta(seconds=20)})
    start(slow, STUB_STEP_SECONDS="0.5")
    batch = farm.submit(2, steps=40)
    until(lambda: farm.counts(batch) == {"running": 2})
    found = farm.do(jobs.list_jobs, farm.project, batch=batch.id).items
    farm.do(jobs.cancel_job, farm.project, found[0].id)
    farm.do(jobs.cancel_job, farm.project, found[1].id)
    began = time.monotonic()
    doorbell.hint_cancel(settings)
    until(lambda: farm.counts(batch) == {"cancelled": 2})
    assert time.monotonic() - began < 4
    states = {job.state for job in farm.do(jobs.list_jobs, farm.project, batch=batch.id).items}
    assert states == {JobState.CANCELLED}


def test_a_frozen_broker_keeps_no_worker_from_working_or_leaving(farm: Queue, start: Start, servers: Servers) -> None:
    worker = start()
    assert servers.valkey is not None
    assert servers.valkey.pid is not None
    os.kill(servers.valkey.pid, signal.SIGSTOP)
    try:
        batch = farm.submit(12)
        until(lambda: all_succeeded(farm, batch, 12))
        worker.signal(signal.SIGTERM)
        assert worker.wait() == Exit.LEFT
    finally:
        os.kill(servers.valkey.pid, signal.SIGCONT)


def test_flower_sees_micro_batches_and_cannot_stop_the_worker(farm: Queue, start: Start, settings: Settings) -> None:
    worker = start(settings.model_copy(update={"poll": timedelta(seconds=60)}))
    app = doorbell.make_app(settings, timeout=5)
    name = until(lambda: list(app.control.inspect(timeout=1).stats() or {}))[0]
    for order in ("shutdown", "pool_shrink", "cancel_consumer", "revoke", "rate_limit", "time_limit"):
        app.control.broadcast(order, arguments={"task_id": "x", "n": 2, "queue": doorbell.queue_of("default")})
    heard: list[dict[str, Any]] = []
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": heard.append})
        batch = farm.submit(6)
        doorbell.ring(settings, settings.pool)
        with suppress(TimeoutError):
            receiver.capture(limit=9, timeout=4, wakeup=False)
    assert all_succeeded(farm, batch, 6)
    told = [event for event in heard if event["type"].startswith("task-")]
    assert [event["type"] for event in told].count("task-succeeded") == 2
    begun = [event for event in told if event["type"] == "task-received"]
    assert sorted("'jobs': 4" in event["kwargs"] for event in begun) == [False, True]
    assert {event["hostname"] for event in told} == {name}
    assert all("crack 0" in event["kwargs"] or "crack 4" in event["kwargs"] for event in begun)
    assert worker.alive


def test_a_worker_tells_of_itself_and_says_goodbye(farm: Queue, start: Start) -> None:
    worker = start()
    (told,) = until(lambda: [one for one in farm.do(jobs.workers) if one.state == "idle"])
    assert (told.pid, told.device, told.pool) == (worker.pid, "stub", "default")
    batch = farm.submit(1)
    until(lambda: all_succeeded(farm, batch, 1))
    until(lambda: farm.do(jobs.workers)[0].warm)
    worker.signal(signal.SIGTERM)
    assert worker.wait() == Exit.LEFT
    assert farm.do(jobs.workers) == []


def test_a_schema_it_does_not_know_is_refused(start: Start, empty_settings: Settings, settings: Settings) -> None:
    strange = settings.model_copy(update={"database_url": empty_settings.database_url})
    assert start(strange, ready=False).wait() == Exit.REFUSED
