"""Waiting for jobs and batches, and reading a batch's events over broken connections."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm import errors
from farm.client import Farm, flows, sse
from farm.views import BatchView, Event, JobView
from tests.client.fake import FakeFarm, Reply, batch_document, job_document, problem


def test_a_batch_is_waited_for_and_told_about(fake: FakeFarm, farm: Farm) -> None:
    queued = batch_document(queued=2)
    half = {**queued, "counts": {"queued": 1, "succeeded": 1}}
    done = {**queued, "counts": {"failed": 1, "succeeded": 1}}
    fake.on("GET", f"/api/v1/batches/{queued['id']}", *(Reply(body=body) for body in (queued, half, half, done)))
    seen: list[int] = []
    batch = farm.wait(BatchView.model_validate(queued), on_progress=lambda batch: seen.append(batch.counts.finished))
    assert batch.done
    assert seen == [0, 1, 2], "a view that says nothing new is not told"


def test_a_job_is_waited_for_over_an_absence_of_the_farm(fake: FakeFarm, farm: Farm) -> None:
    job = job_document(state="queued")
    replies = [
        Reply(body=job),
        problem(503, "unavailable"),
        Reply(hang_up=True),
        Reply(body={**job, "state": "failed"}),
    ]
    fake.on("GET", f"/api/v1/jobs/{job['id']}", *replies)
    assert farm.wait(JobView.model_validate(job)).state == "failed"


def test_patience_ends(fake: FakeFarm, farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "PATIENCE", 0.02)
    job = job_document(state="queued")
    fake.on("GET", f"/api/v1/jobs/{job['id']}", Reply(body=job), problem(503, "unavailable"))
    with pytest.raises(errors.Unavailable):
        farm.wait(JobView.model_validate(job))


def test_waiting_has_a_limit(fake: FakeFarm, farm: Farm) -> None:
    job = job_document(state="queued")
    fake.on("GET", f"/api/v1/jobs/{job['id']}", Reply(body=job))
    with pytest.raises(TimeoutError):
        farm.wait(JobView.model_validate(job), timeout=0.02)


def test_a_view_from_before_a_retry_is_not_believed(fake: FakeFarm, farm: Farm) -> None:
    old = job_document(state="failed")
    again = [Reply(body={**old, "state": "queued"}), Reply(body={**old, "state": "succeeded"})]
    fake.on("GET", f"/api/v1/jobs/{old['id']}", *again)
    assert farm.wait(JobView.model_validate(old)).state == "succeeded"


STREAM = (
    ": hello\n\n"
    'id: 1\nevent: job\ndata: {"prompt": "a\u2028b"}\n\n'
    "retry: 100\r\n\r\n"
    'id: 2\r\nevent: progress\r\ndata: {"n":\r\ndata:1}\r\n\r\n'
    "id: 3\nevent: done\ndata: {}\n\n"
).encode()


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_are_the_same_however_the_stream_is_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    parser = sse.Parser()
    pieces = [STREAM[a:b] for a, b in pairwise(edges)]
    assert [event for piece in pieces for event in parser.feed(piece)] == [
        Event(id="1", event="job", data={"prompt": "a\u2028b"}),
        Event(id="2", event="progress", data={"n": 1}),
        Event(id="3", event="done", data={}),
    ]


def test_a_broken_stream_goes_on_behind_its_last_event(fake: FakeFarm, farm: Farm) -> None:
    path = "/api/v1/batches/b/events"
    half = STREAM.index(b"id: 3") - 5  # the second event is cut short: it comes again
    fake.on("GET", path, Reply(body=STREAM[:half]), Reply(hang_up=True), Reply(body=STREAM[STREAM.index(b"id: 2") :]))
    assert [event.id for event in farm.events("b")] == ["1", "2", "3"]
    assert [asked.headers.get("last-event-id") for asked in fake.asked] == [None, "1", "1"]


def test_a_stream_that_is_refused_ends_at_once(fake: FakeFarm, farm: Farm) -> None:
    with pytest.raises(errors.NotFound):
        list(farm.events("nobody"))
    assert len(fake.asked) == 1


def test_a_stream_that_never_brings_anything_is_given_up(fake: FakeFarm, farm: Farm) -> None:
    fake.on("GET", "/api/v1/batches/b/events", Reply(body=b": hello\n\n"))
    with pytest.raises(errors.Unavailable):
        list(farm.events("b"))
    assert len(fake.asked) == sse.TRIES + 1
