"""What goes over the wire: bodies, keys, retries, and errors coming back as exceptions."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace

import pytest

from farm import errors
from farm.client import AsyncFarm, Farm, transport
from farm.client.problems import BY_CODE, error_from
from farm.views import BatchView, JobView
from tests.client.fake import FakeFarm, Reply, batch_document, job_document, page, problem

JOBS = "/api/v1/jobs"
BATCHES = "/api/v1/batches"


def test_a_prompt_becomes_a_job(fake: FakeFarm, farm: Farm) -> None:
    fake.on("POST", JOBS, Reply(201, job_document(state="queued")))
    job = farm.submit("A crack", width=64, height=64, labels={"wall": "north"})
    assert isinstance(job, JobView)
    (asked,) = fake.asked
    assert asked.lines == [{"prompt": "A crack", "width": 64, "height": 64, "labels": {"wall": "north"}}]
    assert asked.headers["authorization"] == "Bearer key-of-ours"
    assert asked.headers["idempotency-key"]


def test_a_replay_is_asked_for_once(fake: FakeFarm, farm: Farm) -> None:
    job = job_document()
    compared = {"of": job["id"], "levels": 1, "mean_levels": 0.01, "differing": 0.02}
    path = f"{JOBS}/{job['id']}/replay"
    fake.on("POST", path, Reply(hang_up=True), Reply(201, job_document(state="queued", replay={"of": job["id"]})))
    fake.on("POST", path, Reply(201, job_document(replay=compared)))
    queued = farm.replay(JobView.model_validate(job))
    assert queued.replay is not None
    assert (str(queued.replay.of), queued.replay.levels) == (job["id"], None)
    keys = [asked.headers["idempotency-key"] for asked in fake.asked]
    assert keys == [keys[0]] * 2, "the farm must know it for the same request"

    async def use() -> JobView:
        async with AsyncFarm(fake.url, "k") as other:
            return await other.replay(job["id"], idempotency_key="mine")

    answered = asyncio.run(use())
    assert answered.replay is not None
    assert answered.replay.levels == 1
    assert fake.asked[-1].headers["idempotency-key"] == "mine"


def test_a_count_answers_a_batch(fake: FakeFarm, farm: Farm) -> None:
    fake.on("POST", JOBS, Reply(201, batch_document(total=3, queued=3)))
    batch = farm.submit({"prompt": "A crack", "steps": 2}, count=3)
    assert isinstance(batch, BatchView)
    assert fake.asked[0].lines == [{"prompt": "A crack", "steps": 2, "count": 3}]


def test_many_are_streamed_while_they_are_made(fake: FakeFarm, farm: Farm) -> None:
    fake.on("POST", BATCHES, Reply(201, batch_document()))
    heard = threading.Event()

    def rows() -> Iterator[str]:
        for i in range(5_000):
            yield f"Crack {i} on a concrete wall"
        if fake.first_piece.wait(10):  # the farm reads while we are not done yet: nothing was gathered first
            heard.set()
        yield "the last"

    farm.submit_many(
        rows(),
        name="walls",
        defaults={"steps": 4, "labels": {"a": "b"}, "checkpoint": "crack-tiny"},
        stop_at_failed_share=0.2,
    )
    assert heard.is_set()
    (asked,) = fake.asked
    assert len(asked.lines) == 5_001
    assert asked.lines[-1] == {"prompt": "the last"}
    assert asked.headers["content-type"] == "application/x-ndjson"
    assert asked.query == {
        "name": ["walls"],
        "steps": ["4"],
        "labels": ['{"a":"b"}'],
        "checkpoint": ["crack-tiny"],
        "stop_at_failed_share": ["0.2"],
    }


def test_a_dry_run_asks_and_stores_nothing(fake: FakeFarm, farm: Farm) -> None:
    fake.on("POST", BATCHES, Reply(200, {"jobs": 2, "lanes": 1, "pipelines": 1, "warnings": []}))
    assert farm.dry_run(["a", "b"]).jobs == 2
    assert fake.asked[0].query == {"dry_run": ["true"]}


def test_a_list_is_sent_again_under_the_same_key(fake: FakeFarm, farm: Farm) -> None:
    fake.on("POST", BATCHES, Reply(hang_up=True), problem(503, "unavailable"), Reply(201, batch_document()))
    farm.submit_many(["a", "b"])
    assert [len(asked.lines) for asked in fake.asked] == [2, 2, 2]
    assert len({asked.headers["idempotency-key"] for asked in fake.asked}) == 1


def test_a_generator_cannot_be_sent_again(fake: FakeFarm, farm: Farm) -> None:
    fake.on("POST", BATCHES, problem(503, "unavailable"), Reply(201, batch_document()))
    with pytest.raises(errors.Unavailable):
        farm.submit_many(row for row in ["a", "b"])
    assert len(fake.asked) == 1


def test_reading_is_retried_a_bounded_number_of_times(fake: FakeFarm, farm: Farm) -> None:
    fake.on("GET", f"{JOBS}/x", problem(503, "unavailable", "Postgres does not answer"))
    with pytest.raises(errors.Unavailable, match="Postgres does not answer"):
        farm.job("x")
    assert len(fake.asked) == 5


def test_a_twin_in_flight_is_waited_for(fake: FakeFarm, farm: Farm) -> None:
    twin = problem(409, "in-flight")
    twin.headers["Retry-After"] = "0"
    fake.on("POST", JOBS, twin, Reply(201, job_document()))
    farm.submit("A crack", idempotency_key="mine")
    assert [asked.headers["idempotency-key"] for asked in fake.asked] == ["mine", "mine"]


@pytest.mark.parametrize("act", [lambda farm: farm.retry("x"), lambda farm: farm.create_key("ci", scopes=["admin"])])
def test_what_may_not_be_repeated_is_not(fake: FakeFarm, farm: Farm, act: object) -> None:
    for path in (f"{BATCHES}/x/retry", "/api/v1/keys"):
        fake.on("POST", path, problem(503, "unavailable"))
    with pytest.raises(errors.Unavailable):
        act(farm)  # type: ignore[operator]
    assert len(fake.asked) == 1


def test_errors_arrive_as_the_class_of_their_code(fake: FakeFarm, farm: Farm) -> None:
    problems = [{"line": 2, "field": "steps", "problem": "must be at least 1"}]
    fake.on("POST", BATCHES, problem(422, "invalid-request", "1 of 2 lines is wrong", problems=problems))
    with pytest.raises(errors.InvalidRequest, match="1 of 2 lines") as raised:
        farm.submit_many(["a", "b"])
    assert raised.value.problems == problems
    assert raised.value.details["status"] == 422


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (401, b"", errors.Unauthorized),
        (404, b"<html>nginx</html>", errors.NotFound),
        (409, b'{"code": "idempotency-mismatch"}', errors.IdempotencyMismatch),
        (409, b'{"code": "of a newer farm"}', errors.Conflict),
        (418, b"[1]", errors.PermanentError),
        (500, b"", errors.FarmError),
        (502, b"Bad Gateway", errors.Unavailable),
    ],
)
def test_any_refusal_means_something(status: int, body: bytes, kind: type[errors.FarmError]) -> None:
    assert type(error_from(status, body)) is kind


def test_unavailable_is_what_its_code_means() -> None:
    assert BY_CODE["unavailable"] is errors.Unavailable


def test_nobody_there(farm: Farm, fake: FakeFarm) -> None:
    with Farm("http://127.0.0.1:1", "k") as nowhere, pytest.raises(errors.Unavailable, match=r"127\.0\.0\.1:1"):
        nowhere.version()


def test_no_answer_of_a_farm(fake: FakeFarm, farm: Farm) -> None:
    fake.on("GET", f"{JOBS}/x", Reply(body=b"<html>hello</html>"))
    with pytest.raises(errors.FarmError, match="no answer of a farm"):
        farm.job("x")


def test_lists_are_walked_page_by_page(fake: FakeFarm, farm: Farm) -> None:
    first, second, third = (job_document(i) for i in range(3))
    fake.on("GET", JOBS, page(first, second, cursor="c 1&"), page(third))
    walked = farm.jobs(state=["queued", "running"], labels={"wall": "n&s"}, page=2)
    assert next(walked).number == 0
    assert len(fake.asked) == 1, "the second page is fetched when it is asked for"
    assert [job.number for job in walked] == [1, 2]
    assert fake.asked[1].query == {
        "state": ["queued", "running"],
        "label": ["wall=n&s"],
        "limit": ["2"],
        "cursor": ["c 1&"],
    }


def test_an_id_stays_one_segment_of_the_path(fake: FakeFarm, farm: Farm) -> None:
    with pytest.raises(errors.NotFound):
        farm.job("../batches?x")
    assert fake.paths() == ["GET /api/v1/jobs/..%2Fbatches%3Fx"]


def test_rows_that_come_slowly_are_sent_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """The farm gives up on uploads that stay silent, and a full piece may take a slow producer hours."""
    now = [0.0]
    monkeypatch.setattr(transport, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def rows() -> Iterator[str]:
        for n in range(6):
            now[0] += 2.0
            yield str(n)

    async def later() -> AsyncIterator[str]:
        for row in rows():
            yield row

    async def gathered() -> list[bytes]:
        return [piece async for piece in transport.async_chunks(later())]

    for pieces in (list(transport.chunks(rows())), asyncio.run(gathered())):
        assert [piece.count(b"\n") for piece in pieces] == [3, 3]
