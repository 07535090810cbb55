"""The asynchronous client is the blocking one, awaited: the same methods, and the same answers."""

import asyncio
import inspect
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from farm import errors
from farm.client import AsyncFarm, Farm
from farm.client.pictures import MANIFEST
from farm.views import BatchView
from tests.client.fake import PICTURE, FakeFarm, Reply, batch_document, job_document, problem, serve_pictures


def _public(kind: type) -> dict[str, inspect.Signature]:
    return {
        name: inspect.signature(member)
        for name, member in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_") or name == "__init__"
    }


def test_both_clients_have_the_same_methods() -> None:
    blocking, awaited = _public(Farm), _public(AsyncFarm)
    assert blocking.keys() == awaited.keys()
    for name, signature in blocking.items():
        ours, theirs = signature.parameters, awaited[name].parameters
        assert [(p.name, p.kind, p.default) for p in ours.values()] == [
            (p.name, p.kind, p.default) for p in theirs.values()
        ], name
        if name not in {"submit_many", "dry_run"}:  # these read asynchronous iterables too
            assert [p.annotation for p in ours.values()] == [p.annotation for p in theirs.values()], name


def test_submit_wait_and_download(fake: FakeFarm, tmp_path: Path) -> None:
    jobs = [job_document(number) for number in range(20)]
    batch = batch_document(20, succeeded=20) | {"id": serve_pictures(fake, *jobs)}
    fake.on("POST", "/api/v1/batches", Reply(hang_up=True), problem(409, "in-flight"), Reply(201, batch))
    fake.on("GET", f"/api/v1/batches/{batch['id']}", Reply(body=batch))

    async def use() -> tuple[int, list[bytes]]:
        async with AsyncFarm(fake.url, "k") as farm:
            submitted = await farm.submit_many(["a"] * 20)
            assert isinstance(submitted, BatchView)
            done = await farm.wait(submitted)
            result = await farm.download(done, tmp_path)
            return result.fetched, [picture async for _, picture in farm.images(done)]

    assert asyncio.run(use()) == (20, [PICTURE] * 20)
    assert (tmp_path / MANIFEST).exists()
    assert [len(asked.lines) for asked in fake.asked[:3]] == [20, 20, 20]


def test_an_asynchronous_iterable_is_streamed(fake: FakeFarm) -> None:
    fake.on("POST", "/api/v1/batches", Reply(201, batch_document()))

    async def rows() -> AsyncIterator[str]:
        for i in range(5_000):
            yield f"Crack {i}"
            if i == 4_500:
                assert await asyncio.to_thread(fake.first_piece.wait, 10)

    async def use() -> None:
        async with AsyncFarm(fake.url, "k") as farm:
            await farm.submit_many(rows())

    asyncio.run(use())
    assert len(fake.asked[0].lines) == 5_000


def test_events_and_pages(fake: FakeFarm) -> None:
    fake.on(
        "GET",
        "/api/v1/batches/b/events",
        Reply(body=b"id: 1\nevent: job\ndata: {}\n\n"),
        Reply(body=b"id: 2\nevent: done\ndata: {}\n\n"),
    )
    first = {"items": [job_document(0)], "next_cursor": "c"}
    fake.on("GET", "/api/v1/jobs", Reply(body=first), Reply(body={**first, "next_cursor": None}))

    async def use() -> tuple[list[str], int]:
        async with AsyncFarm(fake.url, "k") as farm:
            return [event.id async for event in farm.events("b")], len([job async for job in farm.jobs()])

    assert asyncio.run(use()) == (["1", "2"], 2)


def test_a_failure_ends_what_was_fetched_ahead(fake: FakeFarm) -> None:
    batch = serve_pictures(fake, *(job_document(number) for number in range(30)), picture=b"damaged")

    async def use() -> None:
        async with AsyncFarm(fake.url, "k") as farm:
            async for _ in farm.images(batch):
                pass

    with pytest.raises(errors.IntegrityFailed):
        asyncio.run(use())
