"""One micro-batch in this process, with real servers and a renderer that misbehaves to order."""

import ast
import io
import json
from dataclasses import replace
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import text

from farm import jobs
from farm.db import Database
from farm.errors import InvalidModel, OutOfMemory, RenderFailed, Unavailable
from farm.recipe import Recipe
from farm.settings import Settings
from farm.states import JobState, Outcome
from farm.storage import Store
from tests.farm.conftest import Queue
from tests.stub_worker import StubRenderer, picture
from tests.workers.conftest import until
from tests.workers.ordered import Ordered, items, raising
from workers import storing
from workers.executor import Executor
from workers.exits import Exit
from workers.feed import readable
from workers.formats import encode
from workers.leaving import Leaving


def test_the_stored_picture_is_the_rendered_one_with_its_recipe(executor: Executor, farm: Queue, store: Store) -> None:
    batch = farm.submit([{"prompt": "a crack", "seed": 7, "labels": {"site": "north"}}])
    assert executor.work_once()
    assert not executor.work_once()
    (job,) = items(farm, batch)
    stored = farm.do(jobs.image_of, farm.project, job.id)
    png = store.get(stored.key)
    assert (len(png), stored.width, stored.height) == (stored.bytes, 128, 128)
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        told = json.loads(image.info["farm"])
        assert told["labels"] == {"site": "north"}
        assert told["names"]["checkpoint"] == "crack-tiny"
        recipe = farm.do(lambda conn: conn.scalar(text("SELECT encode(hash, 'hex') FROM recipes")))
        assert told["recipe_hash"] == recipe
        assert image.info["parameters"].startswith("a crack")
        pixels = np.asarray(image)
    assert np.array_equal(pixels, picture(Recipe.parse(told["recipe"])))
    # No larger than a thumbnail, so it is its own.
    assert (stored.thumbnail_key, stored.thumbnail_bytes) == (stored.key, stored.bytes)
    for secret in (str(farm.project), str(job.id), stored.key):
        assert secret.encode() not in png


def test_a_picture_larger_than_a_thumbnail_has_one(
    database: Database, store: Store, settings: Settings, farm: Queue
) -> None:
    small = settings.model_copy(update={"thumbnail_pixels": 64})
    batch = farm.submit(1)
    assert Executor(database, store, StubRenderer(), small, farm.worker).work_once()
    stored = farm.do(jobs.image_of, farm.project, items(farm, batch)[0].id)
    thumbnail = store.get(stored.thumbnail_key)
    assert len(thumbnail) == stored.thumbnail_bytes
    with Image.open(io.BytesIO(thumbnail)) as image:
        assert (image.format, image.size) == ("WEBP", (64, 64))


def test_a_renderer_says_how_many_it_takes_where_the_settings_do_not(
    database: Database, store: Store, settings: Settings, farm: Queue
) -> None:
    renderer = StubRenderer()
    batch = farm.submit(renderer.micro_batch + 2)
    unset = settings.model_copy(update={"micro_batch": None})
    assert Executor(database, store, renderer, unset, farm.worker).work_once()
    assert farm.counts(batch) == {"queued": 2, "succeeded": renderer.micro_batch}


def test_no_metadata_on_request(executor: Executor, farm: Queue, store: Store) -> None:
    batch = farm.submit([{"prompt": "a crack", "seed": 7, "metadata": False}])
    executor.work_once()
    stored = farm.do(jobs.image_of, farm.project, items(farm, batch)[0].id)
    with Image.open(io.BytesIO(store.get(stored.key))) as image:
        image.load()
        assert not image.info.keys() - {"dpi", "gamma", "srgb"}, "no text"


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (InvalidModel("key x is missing"), JobState.FAILED, "invalid-model"),
        (OutOfMemory(), JobState.QUEUED, "out-of-memory"),
        (RenderFailed("nan"), JobState.QUEUED, "render-failed"),
        (ZeroDivisionError("oops"), JobState.QUEUED, "internal"),
    ],
)
@pytest.mark.parametrize("where", ["staging", "before_step"])
def test_an_error_ends_in_a_retry_unless_it_would_come_again(
    executor: Executor, farm: Queue, renderer: Ordered, where: str, error: Exception, state: JobState, code: str
) -> None:
    batch = farm.submit(2)
    setattr(renderer, where, raising(error))
    assert executor.work_once()
    for job in items(farm, batch):
        assert (job.state, job.attempt) == (state, 1)
        assert job.error is not None
        assert job.error.code == code
    setattr(renderer, where, lambda: None)
    if state is JobState.QUEUED:
        until(lambda: executor.work_once() and farm.counts(batch) == {"succeeded": 2})


def test_a_recipe_that_cannot_be_rendered_fails_no_neighbour(
    executor: Executor, farm: Queue, renderer: Ordered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renderer, "words", {**renderer.words, "FAIL": "spoiled"})
    monkeypatch.setattr(renderer, "_misbehave", lambda recipes: StubRenderer._misbehave(renderer, recipes))
    batch = farm.submit([{"prompt": prompt, "seed": 1} for prompt in ("fine", "spoiled", "good")])
    executor.work_once()
    assert farm.counts(batch) == {"succeeded": 2, "queued": 1}
    states = {job.prompt: (job.state, job.attempt) for job in items(farm, batch)}
    assert states["spoiled"] == (JobState.QUEUED, 1)


def test_a_picture_that_cannot_be_encoded_fails_no_neighbour(
    executor: Executor, farm: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = farm.submit([{"prompt": f"crack {n}", "seed": n} for n in range(3)])
    real = encode

    def fails_on_one(pixels: Any, recipe: Recipe, **more: Any) -> bytes:
        if recipe.prompt == "crack 1":
            raise MemoryError
        return real(pixels, recipe, **more)

    monkeypatch.setattr(storing, "encode", fails_on_one)
    executor.work_once()
    assert farm.counts(batch) == {"succeeded": 2, "queued": 1}


def test_an_s3_that_is_away_for_a_moment_costs_no_attempt(
    executor: Executor, farm: Queue, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = farm.submit(2)
    real, calls = store.put, []

    def away(*args: Any) -> None:
        calls.append(args)
        if len(calls) <= 3:
            raise Unavailable("S3 is away")
        real(*args)

    monkeypatch.setattr(store, "put", away)
    executor.work_once()
    assert farm.counts(batch) == {"succeeded": 2}


def test_only_the_cancelled_job_of_a_micro_batch_is_dropped(executor: Executor, farm: Queue, renderer: Ordered) -> None:
    batch = farm.submit(3)
    first = items(farm, batch)[0]

    def cancel() -> None:
        farm.do(jobs.cancel_job, farm.project, first.id)
        executor.lease.beat()
        renderer.before_step = lambda: None

    renderer.before_step = cancel
    executor.work_once()
    assert farm.counts(batch) == {"succeeded": 2, "cancelled": 1}


def test_a_lost_claim_stops_at_the_next_step_and_publishes_nothing(
    executor: Executor, farm: Queue, renderer: Ordered
) -> None:
    batch = farm.submit(2, steps=8)
    steps = []

    def lose() -> None:
        steps.append(1)
        if len(steps) == 2:
            farm.do(jobs.rescue, settings=farm.settings, worker=farm.worker)
            executor.lease.beat()

    renderer.before_step = lose
    executor.work_once()
    assert len(steps) == 2
    assert farm.counts(batch) == {"queued": 2}


def test_leaving_takes_nothing_new(executor: Executor, farm: Queue) -> None:
    batch = farm.submit(2)
    executor.leaving.request(hurry=False)
    assert not executor.work_once()
    assert farm.counts(batch) == {"queued": 2}


def test_a_claim_whose_answer_was_lost_is_found_again(
    executor: Executor, farm: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = farm.submit(3)
    real = jobs.claim

    def broken(conn: Any, **more: Any) -> Any:
        real(conn, **more)
        conn.commit()
        raise Unavailable("the connection broke after COMMIT")

    monkeypatch.setattr(jobs, "claim", broken)
    assert not executor.work_once()
    assert farm.counts(batch) == {"running": 3}
    monkeypatch.setattr(jobs, "claim", real)
    assert executor.work_once()
    assert farm.counts(batch) == {"succeeded": 3}
    assert {job.attempt for job in items(farm, batch)} == {1}


def test_a_job_under_suspicion_is_alone_in_its_process(executor: Executor, farm: Queue, renderer: Ordered) -> None:
    batch = farm.submit(3)
    farm.do(lambda conn: conn.execute(text("UPDATE jobs SET alone = true")))
    most = []
    renderer.before_step = lambda: most.append(len(executor.lease.held))
    threads = [Thread(target=executor.work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert farm.counts(batch) == {"succeeded": 3}
    assert set(most) == {1}


def test_too_much_memory_ends_the_process_between_two_micro_batches(
    database: Database, store: Store, settings: Settings, farm: Queue, renderer: Ordered
) -> None:
    hungry = settings.model_copy(update={"max_worker_rss_bytes": 1})
    executor = Executor(database, store, renderer, hungry, farm.worker)
    batch = farm.submit(8)
    renderer.before_step = lambda: executor.leaving.requested.wait(10) and None
    renderer.step_seconds = 0.0
    executor.lease.start()
    executor.work()
    executor.lease.stop()
    assert executor.leaving.status is Exit.MEMORY
    assert farm.counts(batch)["queued"] >= 4


def test_flower_reads_what_a_micro_batch_is(farm: Queue) -> None:
    farm.submit([{"prompt": "crack " * 50, "seed": 1, "adapters": [{"name": "moss", "weight": 0.5}]}])
    claimed = farm.claim()
    assert claimed is not None
    told = readable(claimed, "default")
    for words in ("'pool': 'default'", "'jobs': 1", "'checkpoint': 'crack-tiny'", "'moss'", "'size': '128x128'"):
        assert words in told
    assert len(told) < 300


def test_a_hostile_prompt_goes_to_flower_written_out(farm: Queue) -> None:
    farm.submit([{"prompt": "<script>\x1b[31m\x9b2J\u202e\r\n'}", "seed": 1}])
    claimed = farm.claim()
    assert claimed is not None
    told = readable(claimed, "default")
    assert told.isprintable()
    assert r"<script>\x1b[31m\x9b2J\u202e\r\n'}" in told, "Flower's pages escape the rest"
    assert ast.literal_eval(told)["prompt"] == claimed.jobs[0].recipe.prompt


def test_leaving_ends_by_its_timer_and_says_last_words_first() -> None:
    ended = Event()
    said: list[Any] = []

    def end(status: Exit, _why: str) -> None:
        said.append(status)
        ended.set()

    leaving = Leaving(0.3, end=end)
    leaving.at_last(lambda: said.append("gave back"))
    leaving.request()
    leaving.request()
    assert leaving.seconds_left <= 0.3
    assert ended.wait(2)
    assert said == ["gave back", Exit.HUNG]


def test_a_result_for_an_old_attempt_is_refused(farm: Queue) -> None:
    batch = farm.submit(1)
    claimed = farm.claim()
    assert claimed is not None
    late = replace(claimed, jobs=(replace(claimed.jobs[0], attempt=claimed.jobs[0].attempt + 1),))
    assert set(farm.finish(late, Outcome.GIVEN_BACK).values()) == {"lost"}
    assert farm.counts(batch) == {"running": 1}
