"""The client against the real API on real servers: what the fake only claims, the farm confirms."""

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from PIL import Image
from sqlalchemy import text

from farm import errors, jobs
from farm.client import AsyncFarm, Farm
from farm.jobs import Result, StoredImage, Warm
from farm.modelfiles import FoundModel
from farm.objects import image_key
from farm.queries import models as model_rows
from farm.states import Outcome
from farm.storage import Store
from farm.views import BatchView, JobView
from tests.api.conftest import Api, _plain_logs, api, shared

__all__ = ["_plain_logs", "api", "shared"]

PROMPT = "A single split crack on a concrete wall"


@pytest.fixture
def real(api: Api) -> Iterator[Farm]:
    with Farm(api.url, api.key) as farm:
        yield farm


def _render(api: Api, limit: int = 100) -> dict[int, bytes]:
    """Do a worker's part for one lane: claim, upload, finish. Answers the pictures by seed."""
    claim_id, store, pictures, results = uuid4(), Store(api.settings), {}, []
    with api.database.transaction() as conn:
        claimed = jobs.claim(
            conn, claim_id=claim_id, worker=uuid4(), pool="default", warm=Warm(), limit=limit, settings=api.settings
        )
    assert claimed is not None
    for job in claimed.jobs:
        picture = f"picture {job.recipe.seed}".encode()
        sha256 = hashlib.sha256(picture).hexdigest()
        key = image_key(job.project_id, job.id, job.attempt, sha256, "png")
        store.put(key, picture, "image/png", sha256)
        pictures[job.recipe.seed] = picture
        image = StoredImage(key, key, sha256, len(picture), 128, 128, 1)
        results.append(Result(job.id, job.attempt, Outcome.SUCCEEDED, image))
    with api.database.transaction() as conn:
        jobs.finish(conn, claim_id=claim_id, results=results, settings=api.settings)
    return pictures


def test_a_batch_from_submission_to_disk(api: Api, real: Farm, tmp_path: Path) -> None:
    rows = ({"prompt": f"{PROMPT} {seed}", "seed": seed} for seed in range(5))
    batch = real.submit_many(rows, name="walls", defaults={"labels": {"site": "n"}, "steps": 2, "width": 64})
    assert (batch.name, batch.total, batch.labels) == ("walls", 5, {"site": "n"})
    pictures = _render(api)
    assert real.wait(batch, timeout=20).counts.succeeded == 5
    result = real.download(batch, tmp_path)
    assert result.fetched == 5
    assert {seed: (tmp_path / f"{seed:06d}-{seed}.png").read_bytes() for seed in range(5)} == pictures
    assert real.download(batch, tmp_path).kept == 5
    assert [picture for _, picture in real.images(batch)] == list(pictures.values())
    events = list(real.events(batch))
    assert [event.event for event in events].count("job") == 5
    assert events[-1].event == "done"
    behind = list(real.events(batch, after=events[1].id))
    assert [event.event for event in behind].count("job") == 3


def test_one_job_and_a_count_of_them(api: Api, real: Farm) -> None:
    job = real.submit(PROMPT, seed=3, adapters=[{"name": "moss", "weight": 0.5}], negative_prompt="rust")
    assert (job.seed, job.adapters[0].name, job.state) == (3, "moss", "queued")
    assert job.warnings, "a negative prompt has no effect at guidance 1"
    batch = real.submit(PROMPT, count=3, seed=10)
    assert isinstance(batch, BatchView)
    assert [one.seed for one in real.jobs(batch=batch.id, page=2)] == [10, 11, 12]
    assert len(list(real.jobs(state="queued"))) == 4
    assert isinstance(real.job(job.id), JobView)


def test_pictures_are_sent_once_and_named_by_jobs_of_every_route(api: Api, real: Farm, tmp_path: Path) -> None:
    """With a ControlNet of no content: the API only resolves it."""
    with api.database.transaction() as conn:
        net = FoundModel("7" * 64, "crack-tiny", 1, (), {}, {})
        model_rows.insert(conn, name="edges", kind="controlnet", found=net)
    try:
        file = tmp_path / "wall.png"
        Image.effect_noise((96, 64), 40).save(file)
        wall = real.upload(file)
        assert (wall.hash, wall.width, wall.height) == (hashlib.sha256(file.read_bytes()).hexdigest(), 96, 64)
        assert real.upload(file.read_bytes()).used_at > wall.used_at
        Image.effect_noise((96, 64), 80).save(file)
        where = real.upload(str(file))
        assert real.uploaded(where.hash) == where
        assert [one.hash for one in real.uploads(page=1)] == sorted((wall.hash, where.hash))
        control = {"name": "edges", "image": where.hash, "weight": 0.5, "end": 0.75}
        fields: dict[str, Any] = {"image": wall.hash, "strength": 0.5, "mask": where.hash, "controls": [control]}
        job = real.submit(PROMPT, **fields)
        assert isinstance(job, JobView)
        both = real.submit(PROMPT, count=2, **fields)
        assert isinstance(both, BatchView)
        lines = real.submit_many([{"prompt": PROMPT, **fields}])
        answer = api.http.post("/batches", json={"jobs": [{"prompt": PROMPT}], "defaults": fields})
        assert answer.status_code == 201, answer.text
        submitted = list(real.jobs())
        assert {one.batch_id for one in submitted} == {job.batch_id, both.id, lines.id, UUID(answer.json()["id"])}
        for one in submitted:
            assert (one.task, one.source, one.mask, one.strength) == ("inpaint", wall.hash, where.hash, 0.5)
            assert (one.width, one.height) == (96, 64), "as large as its picture"
            assert [use.model_dump() for use in one.controls] == [{**control, "start": 0.0}]
        for changed, field in (({"mask": "f" * 64}, "mask"), ({"controls": [{**control, "image": "f" * 64}]}, None)):
            with pytest.raises(errors.InvalidRequest) as raised:
                real.submit(PROMPT, **{**fields, **changed})
            (problem,) = raised.value.problems
            assert problem["field"] == (field or "controls.0.image")
            assert "there is no upload" in problem["problem"]
        with Farm(api.url, api.new_key(project="others")) as other, pytest.raises(errors.InvalidRequest):
            other.submit(PROMPT, **fields)
        with pytest.raises(errors.Conflict, match="delete them first"):
            real.delete_upload(wall)
        for one in submitted:
            real.delete_job(one)
        for upload in (wall, where.hash):
            real.delete_upload(upload)
        assert list(real.uploads()) == []
        with pytest.raises(errors.InvalidRequest, match="no PNG, JPEG or WebP"):
            real.upload(b"words")
    finally:
        with api.database.transaction() as conn:
            conn.execute(text("DELETE FROM models WHERE name = 'edges'"))


def test_a_submission_counts_once_under_its_key(api: Api, real: Farm) -> None:
    first = real.submit_many([PROMPT, PROMPT], idempotency_key="mine")
    assert real.submit_many([PROMPT, PROMPT], idempotency_key="mine").id == first.id
    with pytest.raises(errors.IdempotencyMismatch):
        real.submit_many([PROMPT], idempotency_key="mine")
    assert real.dry_run([PROMPT] * 7).jobs == 7
    assert len(list(real.batches())) == 1


def test_what_is_wrong_is_said_by_line_and_field(api: Api, real: Farm) -> None:
    with pytest.raises(errors.InvalidRequest) as raised:
        real.submit_many([{"prompt": "x"}, {"prompt": "x", "stepz": 1}, {"prompt": "x", "checkpoint": "crack-tinny"}])
    found = [(problem["line"], problem["field"]) for problem in raised.value.problems]
    assert found == [(2, "stepz"), (3, "checkpoint")]
    assert "crack-tiny" in raised.value.problems[1]["problem"]
    assert not list(real.batches())


def test_a_batch_is_changed(api: Api, real: Farm) -> None:
    batch = real.submit_many([PROMPT] * 3, defaults={"labels": {"a": "b=c"}})
    assert real.pause(batch).paused
    assert [one.id for one in real.batches(state="paused", labels={"a": "b=c"})] == [batch.id]
    assert not real.resume(batch).paused
    assert real.priority(batch, 7).priority == 7
    assert real.cancel(batch).counts.cancelled == 3
    assert real.retry(batch).counts.queued == 3
    job = next(real.jobs(batch=batch.id))
    assert real.cancel_job(job).state == "cancelled"
    assert real.retry_job(job).state == "queued"
    real.delete_job(job)
    real.delete(batch)
    with pytest.raises(errors.NotFound):
        real.batch(batch.id)


def test_the_farm_tells_about_itself(api: Api, real: Farm) -> None:
    real.submit_many([PROMPT] * 2)
    (lane,) = real.queue()
    assert lane.depth == 2
    assert real.workers() == []
    assert {one.name for one in real.checkpoints()} == {"crack-tiny", "big"}
    assert {one.name for one in real.adapters()} == {"lcm", "moss", "big-moss"}
    assert real.version()["version"]


def test_keys_and_scopes(api: Api, real: Farm) -> None:
    made = real.create_key("reader", scopes=["jobs:read"], project="cracks")
    assert made.key is not None
    with Farm(api.url, made.key) as reader:
        assert list(reader.jobs()) == []
        with pytest.raises(errors.Forbidden):
            reader.submit(PROMPT)
        real.revoke_key(made.id)
        with pytest.raises(errors.Unauthorized):
            reader.queue()
    listed = real.keys()
    assert made.id in {key.id for key in listed}
    with Farm(api.url) as nobody, pytest.raises(errors.Unauthorized):
        nobody.version()


def test_awaited_the_same(api: Api, tmp_path: Path) -> None:
    async def use() -> tuple[int, list[str], int]:
        async with AsyncFarm(api.url, api.key) as farm:
            batch = await farm.submit_many([PROMPT] * 4)
            await asyncio.to_thread(_render, api)
            done = await farm.wait(batch, timeout=20)
            result = await farm.download(done, tmp_path)
            events = [event.event async for event in farm.events(done)]
            return result.fetched, events, len([job async for job in farm.jobs(batch=done.id)])

    fetched, events, listed = asyncio.run(use())
    assert (fetched, events[-1], listed) == (4, "done", 4)


def test_a_list_of_problems_is_bounded_and_nothing_is_kept(api: Api, real: Farm) -> None:
    def rows(make: Callable[[int], Any]) -> Iterator[Any]:
        return (make(number) for number in range(3_000))

    with pytest.raises(errors.InvalidRequest) as raised:
        real.submit_many(rows(lambda number: {"prompt": "x", "steps": -number}))
    assert len(raised.value.problems) == 100
    assert not list(real.batches())
