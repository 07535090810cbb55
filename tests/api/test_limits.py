"""Limits over HTTP: 429 says which, how much and until when. A frozen Redis blocks nobody, and limits go on."""

import asyncio
import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from uuid import uuid4

import httpx
import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from api.limiting import RequestLimit
from farm.cli.app import app
from farm.client import AsyncFarm, Farm
from farm.errors import LimitReached
from farm.settings import Settings
from tests.api.conftest import PROMPT, Api, problem_of
from tests.api.test_uploads import png

STEPS = 128 * 128 * 4


def own(api: Api) -> dict[str, Any]:
    answer = api.http.get("/project")
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


def limit(api: Api, **wanted: int | None) -> None:
    answer = api.http.patch(f"/projects/{own(api)['id']}", json=wanted)
    assert answer.status_code == 200, answer.text
    assert {name: answer.json()["limits"][name] for name in wanted} == wanted


def test_a_burst_of_ten_times_the_limit_is_accepted_to_the_limit(api: Api) -> None:
    limit(api, queued_jobs=10)
    ready = threading.Barrier(25)
    answers: list[httpx.Response] = []

    def burst() -> None:
        client = api.client(api.key)
        ready.wait(20)
        for number in range(4):
            if number % 2:
                answers.append(client.post("/jobs", json={"prompt": PROMPT}))
            else:
                line = b'{"prompt": "x"}\n'
                answers.append(client.post("/batches", content=line, headers={"Content-Type": "application/x-ndjson"}))
        client.close()

    threads = [threading.Thread(target=burst) for _ in range(25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [201] * 10 + [429] * 90
    assert api.stored()["jobs"] == 10
    assert own(api)["use"]["queued_jobs"] == 10


def test_a_burst_of_pictures_is_stored_to_the_limit_of_bytes(api: Api) -> None:
    """Ten times what fits, at once, each twice: exactly so much is kept, and it is said why the rest is not."""
    pictures = [png(mark, (64, 64)) for mark in range(40)]
    size = max(len(picture) for picture in pictures)
    # By a PNG's own rules its bytes may differ by a few: what fits is counted by the largest.
    most = 4 * size
    limit(api, upload_bytes=most)
    ready = threading.Barrier(8)
    answers: list[tuple[int, httpx.Response]] = []

    def burst(number: int) -> None:
        client = api.client(api.key)
        ready.wait(20)
        for picture in pictures[number % 4 :: 4]:
            answer = client.post("/uploads", content=picture, headers={"Content-Type": "image/png"})
            answers.append((len(picture), answer))
        client.close()

    threads = [threading.Thread(target=burst, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for _, answer in answers} <= {200, 201, 429}
    # Two who send the same one at once may both be told that it is new; it counts once.
    stored = {answer.json()["hash"]: length for length, answer in answers if answer.status_code == 201}
    assert len(stored) == 4
    assert own(api)["use"]["upload_bytes"] == sum(stored.values()) <= most
    assert len(api.http.get("/uploads").json()["items"]) == 4
    fifth = next(answer for _, answer in answers if answer.status_code == 429)
    document = problem_of(fifth, 429, "limit-reached")
    assert (document["limit"], document["value"]) == ("upload_bytes", most)
    assert int(fifth.headers["retry-after"]) > 0
    alone = api.http.post("/uploads", content=png(99, (256, 256)), headers={"Content-Type": "image/png"})
    assert problem_of(alone, 413, "too-large")["limit"] == "upload_bytes"
    kept = api.http.get("/uploads").json()["items"][0]
    again = next(picture for picture in pictures if hashlib.sha256(picture).hexdigest() == kept["hash"])
    assert api.http.post("/uploads", content=again, headers={"Content-Type": "image/png"}).status_code == 200
    assert api.http.delete(f"/uploads/{kept['hash']}").status_code == 204
    assert api.http.post("/uploads", content=again, headers={"Content-Type": "image/png"}).status_code == 201


def test_a_refusal_says_which_limit_how_much_and_until_when(api: Api) -> None:
    limit(api, queued_jobs=3, pixel_steps_per_day=5 * STEPS)
    api.submit(2)
    document = problem_of(api.http.post("/jobs", json={"prompt": PROMPT, "count": 2}), 429, "limit-reached")
    assert (document["limit"], document["value"], document["used"]) == ("queued_jobs", 3, 2)
    assert document["retryable"] is True
    api.submit(1)
    answer = api.http.post("/jobs", json={"prompt": PROMPT})
    document = problem_of(answer, 429, "limit-reached")
    assert int(answer.headers["retry-after"]) == document["retry_after"] >= 1
    assert document["frees_at"] > "2020"
    limit(api, queued_jobs=None)
    api.submit(2)
    answer = api.http.post("/jobs", json={"prompt": PROMPT})
    document = problem_of(answer, 429, "limit-reached")
    assert (document["limit"], document["value"]) == ("pixel_steps_per_day", 5 * STEPS)
    assert 1 <= int(answer.headers["retry-after"]) <= 86_400
    document = problem_of(api.http.post("/jobs", json={"prompt": PROMPT, "count": 6}), 429, "limit-reached")
    limit(api, pixel_steps_per_day=None, queued_jobs=100)
    document = problem_of(api.http.post("/jobs", json={"prompt": PROMPT, "count": 101}), 413, "too-large")
    assert (document["limit"], document["value"], document["asked"]) == ("queued_jobs", 100, 101)
    assert api.stored()["jobs"] == 5


def test_a_rehearsal_and_a_repetition_are_not_refused(api: Api) -> None:
    headers = {"Idempotency-Key": "once"}
    first = api.http.post("/jobs", json={"prompt": PROMPT}, headers=headers)
    limit(api, queued_jobs=1)
    assert api.http.post("/jobs", json={"prompt": PROMPT}, headers=headers).json() == first.json()
    assert api.http.post("/jobs?dry_run=true", json={"prompt": PROMPT}).status_code == 200
    assert api.http.post("/batches?dry_run=true", json={"jobs": [{"prompt": PROMPT}]}).status_code == 200
    problem_of(api.http.post("/jobs", json={"prompt": PROMPT}), 429, "limit-reached")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"queued_jobs": -1}, "queued_jobs"),
        ({"queued_jobs": "5"}, "queued_jobs"),
        ({"queued_jobs": 2**63}, "queued_jobs"),
        ({"running_jobs": 1.5}, "running_jobs"),
        ({"requests_per_second": 0}, "requests_per_second"),
        ({"pixel_steps_per_day": True}, "pixel_steps_per_day"),
        ({"jobs": 5}, "jobs"),
    ],
)
def test_limits_that_make_no_sense_are_refused(api: Api, body: dict[str, Any], field: str) -> None:
    before = own(api)
    document = problem_of(api.http.patch(f"/projects/{before['id']}", json=body), 422, "invalid-request")
    assert field in [problem["field"] for problem in document["problems"]]
    assert own(api) == before
    problem_of(api.http.patch(f"/projects/{uuid4()}", json={}), 404, "not-found")


def test_requests_per_second_are_counted_over_every_process(fresh: Callable[..., Api]) -> None:
    one, other = fresh(), fresh()
    limit(one, requests_per_second=20)
    neighbour = one.client(one.new_key(project="walls"))
    time.sleep(1.1)
    answers = [(one, other)[number % 2].http.get("/version") for number in range(60)]
    taken = sum(answer.status_code == 200 for answer in answers)
    # Answering sixty requests takes less than three seconds, each of which has room for twenty.
    assert 20 <= taken < 60
    refused = next(answer for answer in answers if answer.status_code != 200)
    document = problem_of(refused, 429, "limit-reached")
    assert (document["limit"], document["value"]) == ("requests_per_second", 20)
    assert refused.headers["retry-after"] == "1"
    assert all(neighbour.get("/version").status_code == 200 for _ in range(30))
    assert httpx.get(f"{one.url}/api/v1/health/live").status_code == 200
    neighbour.close()


@contextmanager
def frozen() -> Iterator[int]:
    """A port that takes connections and never answers, as a stopped Redis does."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield listening.getsockname()[1]


@pytest.mark.parametrize("gone", [False, True], ids=["frozen", "gone"])
def test_without_redis_each_process_counts_for_itself_and_waits_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    with frozen() as port:
        url = SecretStr(f"redis://:secret@127.0.0.1:{1 if gone else port}/0")
        project = uuid4()

        async def ask() -> tuple[int, int]:
            counting = RequestLimit(settings.model_copy(update={"redis_url": url}), clock=lambda: 0.0)
            shared, taken, asked = counting._shared.hit, 0, 0

            async def counted(*arguments: Any) -> bool:
                nonlocal asked
                asked += 1
                return await shared(*arguments)

            monkeypatch.setattr(counting._shared, "hit", counted)
            for _ in range(12):
                with suppress(LimitReached):
                    await counting.admit(project, 5)
                    taken += 1
            await counting.close()
            return taken, asked

        taken, asked = asyncio.run(ask())
    # Twelve take less than two seconds, even with the one that waited for Redis, for as long as its patience lasts.
    assert 5 <= taken < 12
    assert asked == 1


def test_a_frozen_redis_costs_a_request_less_than_fifty_milliseconds(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    took: list[float] = []
    patience: list[float | None] = []
    now = [0.0]
    wait = asyncio.timeout

    def bounded(seconds: float | None) -> asyncio.Timeout:
        patience.append(seconds)
        return wait(seconds)

    async def ask(port: int) -> None:
        url = SecretStr(f"redis://:secret@127.0.0.1:{port}/0")
        counting = RequestLimit(settings.model_copy(update={"redis_url": url}), clock=lambda: now[0])
        monkeypatch.setattr("api.limiting.asyncio.timeout", bounded)
        for _ in range(7):
            began = time.perf_counter()
            await counting.admit(uuid4(), 5)
            took.append(time.perf_counter() - began)
            now[0] += 1.0
        await counting.close()

    with frozen() as port:
        asyncio.run(ask(port))
    # What bounds it, and that nothing waits outside of that. Only a machine that stands still makes all of them slow.
    assert max(seconds or 9 for seconds in patience) < 0.05
    assert min(took) < 0.05
    assert min(took) > 0.005, "each of them did ask"


def test_redis_is_asked_again_when_it_is_back(settings: Settings) -> None:
    now = [0.0]
    project = uuid4()

    async def ask() -> None:
        counting = RequestLimit(settings, clock=lambda: now[0])
        counting._alone_until = 1.0
        await counting.admit(project, 1)
        now[0] = 1.5
        await counting.admit(project, 1)
        with pytest.raises(LimitReached):
            await counting.admit(project, 1)
        await counting.admit(project, None)
        await counting.close()

    asyncio.run(ask())


def test_the_client_and_the_command_line_know_limits(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARM_URL", api.url)
    monkeypatch.setenv("FARM_API_KEY", api.key)
    monkeypatch.delenv("FARM_DATABASE_URL", raising=False)

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["projects", *arguments])

    assert "queued jobs: 7" in run("limit", "cracks", "--queued-jobs", "7", "--running-jobs", "2").stdout
    assert "upload bytes: 999" in run("limit", "cracks", "--upload-bytes", "999").stdout
    assert "0 of 7" in run("list").stdout
    assert "0 of 999" in run("list").stdout
    changed = run("limit", "cracks", "--running-jobs", "none", "--requests-per-second", "500")
    assert "running jobs: no limit" in changed.stdout
    assert "queued jobs: 7" in changed.stdout
    assert run("limit", "cracks", "--queued-jobs", "many").exit_code == 2
    missing = run("limit", "crakcs", "--queued-jobs", "1")
    assert missing.exit_code == 3

    async def awaited() -> None:
        async with AsyncFarm(api.url, api.key) as farm:
            mine = await farm.projects.mine()
            assert [mine] == list(await farm.projects.list())
            assert (await farm.projects.limit(mine.id, queued_jobs=8)).limits.queued_jobs == 8

    asyncio.run(awaited())
    with Farm(api.url, api.key) as farm:
        assert farm.projects.mine().limits.queued_jobs == 8
        farm.projects.limit(farm.projects.mine().id, queued_jobs=0)
        with pytest.raises(LimitReached, match="limit of 0 queued jobs"):
            farm.submit_many(iter([PROMPT]))
