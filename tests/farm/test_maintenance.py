"""The sweeper's duties on real servers."""

import hashlib
import threading
import time
from datetime import timedelta

import pytest
from sqlalchemy import text

from farm import jobs, maintenance
from farm.db import Database
from farm.errors import SchemaMismatch
from farm.maintenance import Duty, Sweeper
from farm.models import SCHEMA_VERSION
from farm.objects import image_key
from farm.storage import Store
from tests.conftest import with_database
from tests.farm.conftest import Queue
from tests.stack.watching import wait_until


def sweeper(queue: Queue, store: Store) -> Sweeper:
    settings = queue.settings.model_copy(update={"keep_deleted": timedelta(0)})
    queue.settings = settings
    return Sweeper(settings, queue.database, store)


def test_what_a_crashed_attempt_uploaded_is_deleted_and_the_published_picture_stays(queue: Queue, store: Store) -> None:
    duties = sweeper(queue, store)
    queue.submit(1)
    crashed = queue.claim()
    assert crashed is not None
    job = crashed.jobs[0]
    sha256 = hashlib.sha256(b"png").hexdigest()
    orphan = image_key(job.project_id, job.id, job.attempt, sha256, "png")
    store.put(orphan, b"png", "image/png", sha256)
    queue.do(jobs.rescue, settings=queue.settings, worker=queue.worker)
    kept = image_key(job.project_id, job.id, 2, sha256, "png")
    store.put(kept, b"png", "image/png", sha256)
    while duties.objects():
        pass
    assert not store.exists(orphan)
    assert store.exists(kept)
    assert queue.do(lambda conn: conn.scalar(text("SELECT count(*) FROM doomed_objects"))) == 0


def test_a_deleted_batch_leaves_neither_rows_nor_objects(queue: Queue, store: Store) -> None:
    duties = sweeper(queue, store)
    batch = queue.submit(3)
    claimed = queue.claim()
    assert claimed is not None
    sha256 = hashlib.sha256(b"png").hexdigest()
    for job in claimed.jobs:
        for key in (f"p/{job.id}/{job.attempt}", f"p/{job.id}/{job.attempt}.webp"):
            store.put(key, b"png", "image/png", sha256)
    queue.finish(claimed)
    queue.do(jobs.delete_batch, queue.project, batch.id)
    duties.once()
    duties.once()
    for table in ("jobs", "recipes", "images", "attempts", "segments", "batches", "doomed_objects", "counters"):
        left = queue.do(lambda conn, table=table: conn.scalar(text(f"SELECT count(*) FROM {table}")))
        assert left == 0, table
    assert not any(store.exists(f"p/{job.id}/{job.attempt}") for job in claimed.jobs)


def test_cancelled_and_retried_rows_are_turned_behind_the_answer(queue: Queue, store: Store) -> None:
    duties = sweeper(queue, store)
    batch = queue.submit(12_000)
    queue.do(jobs.cancel_batch, queue.project, batch.id)
    raw = text("SELECT count(*) FROM jobs WHERE state = 'queued'")
    assert queue.do(lambda conn: conn.scalar(raw)) == 7_000
    duties.once()
    assert queue.do(lambda conn: conn.scalar(raw)) == 0
    assert queue.counts(batch) == {"cancelled": 12_000}
    queue.do(jobs.retry_batch, queue.project, batch.id)
    duties.once()
    assert queue.counts(batch) == {"queued": 12_000}
    assert queue.claim() is not None


def test_two_sweepers_do_not_count_twice(queue: Queue, store: Store) -> None:
    one, two = sweeper(queue, store), sweeper(queue, store)
    batch = queue.submit(8)
    claimed = queue.claim()
    assert claimed is not None
    queue.finish(claimed)
    one.once()
    two.once()
    assert queue.counts(batch) == {"succeeded": 8}
    assert queue.batch(batch).images_per_second > 0


def test_the_pulse_beats_while_duties_turn_and_stops_with_one_that_hangs(
    queue: Queue, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "PULSE_SECONDS", 0.01)
    duties = sweeper(queue, store)
    stuck, go_on, stop, missed = (threading.Event() for _ in range(4))

    def hang() -> bool:
        stuck.set()
        go_on.wait()
        return False

    def cry(_event: str, *, duty: str, **_: object) -> None:
        assert duty == "stuck"
        missed.set()

    beats: list[float] = []
    duties.duties = (Duty("rescue", timedelta(0), duties.rescue), Duty("stuck", timedelta(0), hang))
    monkeypatch.setattr(maintenance.log, "critical", cry)
    running = threading.Thread(target=duties.run, args=(stop, lambda: beats.append(time.monotonic())))
    running.start()
    try:
        assert stuck.wait(20)
        wait_until(lambda: len(beats) > 3)
        duties._turned["stuck"] -= maintenance.LONGEST_TURN_SECONDS
        assert missed.wait(20)
        heard = len(beats)
    finally:
        go_on.set()
        stop.set()
        running.join(20)
    assert not running.is_alive()
    assert len(beats) == heard


def test_a_sweeper_waits_for_postgres_and_refuses_another_schema(queue: Queue, store: Store) -> None:
    stop, pulses = threading.Event(), list[int]()

    def pulse() -> None:
        pulses.append(1)
        stop.set()

    nowhere = with_database(queue.settings, "there-is-none")
    Sweeper(queue.settings, Database(nowhere), store).wait_for_schema(stop, pulse)
    assert pulses, "it is alive while it waits"
    stop.clear()
    duties = Sweeper(queue.settings, queue.database, store)
    duties.wait_for_schema(stop, pulse)
    assert not stop.is_set()
    with queue.database.transaction() as conn:
        conn.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    try:
        with pytest.raises(SchemaMismatch, match="schema 9999"):
            duties.wait_for_schema(stop, pulse)
    finally:
        with queue.database.transaction() as conn:
            conn.execute(text("UPDATE alembic_version SET version_num = :ours"), {"ours": SCHEMA_VERSION})
