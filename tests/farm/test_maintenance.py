"""The sweeper's duties on real servers."""

import hashlib
from datetime import timedelta

from sqlalchemy import text

from farm import jobs
from farm.maintenance import Sweeper
from farm.objects import image_key
from farm.storage import Store
from tests.farm.conftest import Queue


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
