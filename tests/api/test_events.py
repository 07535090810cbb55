"""The event stream of a batch: complete, in order, resumable, alive, and gone when the server leaves."""

import threading
import time
from collections.abc import Generator
from typing import Any
from uuid import UUID, uuid4

import httpx
import orjson
import pytest
from sqlalchemy import text

from api.routes import events
from farm.client.sse import Parser
from farm.views import Event
from tests.api.conftest import Api, problem_of, until


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "POLL_SECONDS", 0.02)


def stream(api: Api, batch: dict[str, Any], after: str | None = None) -> Generator[Event, None, None]:
    """The batch's events as they arrive."""
    headers = {} if after is None else {"Last-Event-ID": after}
    parser = Parser()
    with (
        api.client(api.key) as client,
        client.stream("GET", f"/batches/{batch['id']}/events", headers=headers) as answer,
    ):
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        for piece in answer.iter_bytes():
            yield from parser.feed(piece)


def read_all(api: Api, batch: dict[str, Any], after: str | None = None) -> list[Event]:
    return list(stream(api, batch, after))


def test_every_job_is_told_once_then_done(api: Api) -> None:
    batch = api.submit(5)
    first = api.render(2)
    rest = api.render(3)
    found = read_all(api, batch)
    told = [event.data["id"] for event in found if event.event == "job"]
    assert set(told[:2]) == {str(job) for job in first}
    assert set(told[2:]) == {str(job) for job in rest}
    assert found[-1].event == "done"
    assert found[-1].data["counts"]["succeeded"] == 5
    job = next(event.data for event in found if event.event == "job")
    assert job == api.http.get(f"/jobs/{job['id']}").json()


def test_a_reader_follows_while_jobs_are_rendered(api: Api) -> None:
    batch = api.submit(4)
    found: list[Event] = []
    reader = threading.Thread(target=lambda: found.extend(stream(api, batch)))
    reader.start()
    rendered = []
    for _ in range(4):
        rendered += [str(job) for job in api.render(1)]
        time.sleep(0.05)
    reader.join(10)
    assert not reader.is_alive()
    assert [event.data["id"] for event in found if event.event == "job"] == rendered
    progress = [event.data["counts"]["succeeded"] for event in found if event.event == "progress"]
    assert progress[-1] == 4
    assert found[-1].event == "done"


def test_a_reader_goes_on_after_any_event(api: Api) -> None:
    batch = api.submit(6)
    for _ in range(3):
        api.render(2)
    whole = read_all(api, batch)
    jobs = [event for event in whole if event.event == "job"]
    assert len(jobs) == 6
    for n, event in enumerate(jobs):
        later = [found for found in read_all(api, batch, event.id) if found.event == "job"]
        assert [found.id for found in later] == [found.id for found in jobs[n + 1 :]]
    assert [event.event for event in read_all(api, batch, whole[-1].id)] == ["progress", "done"]


def test_a_long_history_comes_without_pauses(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "POLL_SECONDS", 20.0)
    batch = api.submit(500)
    for _ in range(5):
        api.render(100)
    began = time.monotonic()
    found = stream(api, batch)
    told: set[str] = set()
    while len(told) < 500:
        event = next(found)
        if event.event == "job":
            told.add(event.data["id"])
    assert time.monotonic() - began < 20.0, "one pause would take as long"
    found.close()


def test_silence_is_filled_with_comments(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "HEARTBEAT_SECONDS", 0.1)
    batch = api.submit(1)
    with api.client(api.key) as client, client.stream("GET", f"/batches/{batch['id']}/events") as answer:
        text = b""
        for piece in answer.iter_raw():
            text += piece
            if text.count(b": still here\n\n") >= 2:
                break
    assert text.count(b"event: progress") == 1


def test_a_stream_ends_after_its_longest_time(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LONGEST_SECONDS", 0.1)
    assert [event.event for event in stream(api, api.submit(1))] == ["progress"]


def test_a_stream_ends_when_its_batch_is_deleted(api: Api) -> None:
    batch = api.submit(1)
    found = stream(api, batch)
    assert next(found).event == "progress"
    api.http.delete(f"/batches/{batch['id']}")
    assert list(found) == []


def test_a_stream_ends_when_the_server_leaves(fresh: Any) -> None:
    api = fresh()
    batch = api.submit(1)
    found = stream(api, batch)
    assert next(found).event == "progress"
    began = time.monotonic()
    api.server.handle_exit(15, None)
    assert list(found) == []
    assert time.monotonic() - began < api.settings.grace.total_seconds()


def test_a_stream_outlives_its_database_connections(api: Api) -> None:
    batch = api.submit(2)
    found = stream(api, batch)
    assert next(found).event == "progress"
    with api.database.transaction() as conn:
        conn.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
    api.render(2)
    assert [event.event for event in found][-1] == "done"


def test_readers_that_leave_are_forgotten(api: Api) -> None:
    batch = api.submit(1)
    for _ in range(5):
        found = stream(api, batch)
        next(found)
        found.close()
    until(lambda: not api.server.server_state.connections or len(api.server.server_state.connections) <= 1)


def test_done_waits_for_jobs_that_are_not_visible_yet(api: Api) -> None:
    """While an older transaction is open, commits after it are held back from readers; `done` must wait for them."""
    batch = api.submit(2)
    with api.database.transaction() as older:
        older.execute(text("SELECT pg_current_xact_id()"))
        api.render(2)
        found = stream(api, batch)
        assert next(found).event == "progress"
        time.sleep(0.2)
    kinds = [event.event for event in found]
    assert kinds.count("job") == 2
    assert kinds[-1] == "done"


NIL = UUID(int=0)


@pytest.mark.parametrize(
    "after",
    [
        "x",
        "1",
        "1.2",
        "-",
        "1." + "z" * 36,
        "9" * 190,
        f"-5.{NIL}",
        f"{2**64}.{NIL}",
        f"{'9' * 40}.{NIL}",
        f"1_0.{NIL}",
    ],
)
def test_made_up_event_ids_are_refused(api: Api, after: str) -> None:
    answer = api.http.get(f"/batches/{api.submit(1)['id']}/events", headers={"Last-Event-ID": after})
    problem_of(answer, 422, "invalid-request")


def test_unknown_batches_are_not_found(api: Api) -> None:
    problem_of(api.http.get(f"/batches/{uuid4()}/events"), 404, "not-found")


def test_the_text_is_what_the_standard_says(api: Api) -> None:
    prompt = "two\nlines\r\nand \u2028 and ü"
    batch = api.http.post("/batches", json={"jobs": [{"prompt": prompt}]}).json()
    api.render(1)
    answer: httpx.Response = api.http.get(f"/batches/{batch['id']}/events")
    blocks = answer.content.split(b"\n\n")
    assert blocks.pop() == b""
    for block in blocks:
        (name, _), (kind, _), (data, document) = (line.split(b": ", 1) for line in block.split(b"\n"))
        assert (name, kind, data) == (b"id", b"event", b"data")
        orjson.loads(document)
    assert orjson.loads(blocks[0].partition(b"data: ")[2])["prompt"] == prompt
