"""Bodies that are refused for what they are, whatever they say: too large, too slow, too many things, another type."""

import select
import socket
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any
from uuid import uuid4

import httpx
import orjson
import pytest

from api.bodies import LINE_BYTES
from tests.api.conftest import Api, problem_of

NDJSON = {"Content-Type": "application/x-ndjson"}
JSON = {"Content-Type": "application/json"}
MANY: dict[str, Any] = {f"f{n}": 1 for n in range(5_000)}


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"prompt": "x", **MANY}, "", "has 5001 fields"),
        ({"prompt": "x", "labels": MANY}, "labels", "at most 32 entries, not 5000"),
        ({"prompt": "x", "adapters": [1] * 5_000}, "adapters", "at most 16 entries, not 5000"),
        ({"prompt": "x", "adapters": [MANY]}, "adapters.0", "at most 100 entries, not 5000"),
    ],
)
def test_floods_are_refused_as_one_thing(api: Api, body: dict[str, Any], field: str, words: str) -> None:
    """A finding for each of millions of wrong things would cost memory and minutes."""
    problems = {
        "": problem_of(api.http.post("/jobs", json=body), 422, "invalid-request")["problems"],
        "jobs.0": problem_of(api.http.post("/batches", json={"jobs": [body]}), 422, "invalid-request")["problems"],
    }
    for where, found in problems.items():
        assert [problem["field"] for problem in found] == [f"{where}.{field}".strip(".")]
        assert words in found[0]["problem"]
    answer = api.http.post("/batches", json={"jobs": [{"prompt": "x"}], "defaults": body})
    places = [problem["field"] for problem in problem_of(answer, 422, "invalid-request")["problems"]]
    assert places == [f"defaults.{field}".strip(".")]


def test_floods_elsewhere_are_refused_as_one_thing(api: Api) -> None:
    for path, body in (
        ("/batches", {"jobs": [{"prompt": "x"}], **MANY}),
        ("/batches", {"jobs": [{"prompt": "x"}], "labels": MANY}),
        ("/keys", {"name": "x", **MANY}),
        ("/keys", {"name": "x", "scopes": ["root"] * 5_000}),
    ):
        assert len(problem_of(api.http.post(path, json=body), 422, "invalid-request")["problems"]) == 1
    answer = problem_of(api.http.post("/batches", json={"jobs": [1] * 5_000}), 422, "invalid-request")
    assert answer["problems"][99] == {"field": "jobs.99", "problem": "must be a JSON object"}
    assert len(answer["problems"]) == 100


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/xml", "json"])
def test_other_content_types_are_refused(api: Api, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    for path in ("/jobs", "/batches", "/keys"):
        problem_of(api.http.post(path, content=b'{"prompt": "x"}', headers=headers), 415, "unsupported-media-type")


def test_parameters_of_the_content_type_do_not_matter(api: Api) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert api.http.post("/jobs", content=b'{"prompt": "x"}', headers=headers).status_code == 201


def test_compressed_bodies_are_refused(api: Api) -> None:
    for path, kind in (("/jobs", JSON), ("/batches", JSON), ("/batches", NDJSON)):
        answer = api.http.post(path, content=b"x", headers={**kind, "Content-Encoding": "gzip"})
        problem_of(answer, 415, "unsupported-media-type")


def test_ndjson_belongs_to_batches(api: Api) -> None:
    problem_of(api.http.post("/jobs", content=b'{"prompt": "x"}', headers=NDJSON), 415, "unsupported-media-type")


@pytest.mark.parametrize(
    ("path", "headers", "over"),
    [("/jobs", JSON, 200_001), ("/batches", JSON, 200_001), ("/keys", JSON, 200_001), ("/batches", NDJSON, 400_001)],
)
def test_bodies_over_the_limit_are_refused_by_header_and_while_streaming(
    api: Api, path: str, headers: dict[str, str], over: int
) -> None:
    before = api.stored()
    announced = api.http.post(path, content=b"x" * over, headers=headers)
    assert problem_of(announced, 413, "too-large")["limit"] == over - 1

    def pieces() -> Any:
        for _ in range(over // 1000):
            yield b"x" * 1000
        yield b"x"

    problem_of(api.http.post(path, content=pieces(), headers=headers), 413, "too-large")
    assert api.stored() == before


def test_only_a_batch_may_be_large(fresh: Any) -> None:
    api = fresh(max_body_bytes=4 * 1024**2)
    body = b'{"prompt": "x"}'.ljust(1024**2 + 1)
    for path in ("/jobs", "/keys", f"/batches/{uuid4()}/priority"):
        assert problem_of(api.http.post(path, content=body, headers=JSON), 413, "too-large")["limit"] == 1024**2
    batch = b'{"jobs": [{"prompt": "x"}]}'.ljust(1024**2 + 1)
    assert api.http.post("/batches", content=batch, headers=JSON).status_code == 201


def test_a_prompt_of_a_megabyte_is_refused_in_few_words(fresh: Any) -> None:
    api = fresh(max_body_bytes=32 * 1024**2, max_upload_bytes=32 * 1024**2)
    for size, status, code in ((1_000_000, 422, "invalid-request"), (1024**2, 413, "too-large")):
        body = b'{"prompt": "%s"}' % (b"crack" * (size // 5 + 1))
        answer = api.http.post("/jobs", content=body, headers=JSON)
        problem_of(answer, status, code)
        assert len(answer.content) < 1000
        assert b"crackcrack" not in answer.content
    body = b'{"prompt": "%s"}' % (b"crack" * 200_000)
    for path, content, headers in (("/batches", b'{"jobs": [%s]}' % body, JSON), ("/batches", body, NDJSON)):
        answer = api.http.post(path, content=content, headers=headers)
        problem_of(answer, 422, "invalid-request")
        assert len(answer.content) < 1000
        assert b"crackcrack" not in answer.content
    assert sum(api.stored().values()) == 0


def test_a_line_that_grows_for_ever_is_refused_at_its_limit(fresh: Any) -> None:
    """Of four gigabytes that a batch may have nobody waits for more than the line's first megabyte."""
    api = fresh(max_upload_bytes=4 * 1024**3)
    host, port = api.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(
            b"POST /api/v1/batches HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\nContent-Type: application/x-ndjson\r\n"
            b"Content-Length: %d\r\n\r\n" % (api.key.encode(), 1024**3)
        )
        first, endless = b'{"prompt": "x"}\n', b'{"prompt": "'
        line.sendall(first + endless + b"x" * (LINE_BYTES - len(endless)))
        assert select.select([line], [], [], 0.2)[0] == [], "a line of that length is still one"
        # With one more there is nothing left to read when the answer goes out, so that TCP does not take it back.
        line.sendall(b"x")
        answer = b""
        while not answer.endswith(b"}"):
            piece = line.recv(4000)
            assert piece, "closed without an answer"
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 422")
    assert [problem["line"] for problem in orjson.loads(body)["problems"]] == [2]
    assert sum(api.stored().values()) == 0


def trickle(api: Api, kind: str, *, go_on: bool) -> bytes:
    """What is answered to a body that is begun, continued with a byte at a time if `go_on`, and never ended."""
    host, port = api.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=0.05) as line:
        line.sendall(
            b"POST /api/v1/batches HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\nContent-Type: %s\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n" % (api.key.encode(), kind.encode())
        )
        answer = b""
        for _ in range(200):
            try:
                piece = line.recv(4000)
            except TimeoutError:
                if go_on:
                    line.sendall(b"1\r\n \r\n")
                continue
            answer += piece
            if not piece:
                return answer
    pytest.fail("the connection stayed open")


@pytest.mark.parametrize("kind", ["application/json", "application/x-ndjson"])
@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"body_silence": timedelta(seconds=0.2)}, "nothing of the request body arrived for 0.2 seconds"),
        ({"body_time": timedelta(seconds=0.3)}, "took longer than 0.3 seconds"),
    ],
)
def test_bodies_that_never_end_are_refused(fresh: Any, kind: str, limits: dict[str, timedelta], words: str) -> None:
    api = fresh(**limits)
    # A server that ends a line on which its client still writes may take its own answer with it: TCP resets both ways.
    for _ in range(10):
        with suppress(ConnectionError):
            answer = trickle(api, kind, go_on="body_time" in limits)
            break
    else:
        pytest.fail("no answer ever arrived")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    assert orjson.loads(body)["code"] == "too-slow"
    assert orjson.loads(body)["retryable"] is True
    assert words in orjson.loads(body)["detail"]
    assert sum(api.stored().values()) == 0


def test_a_reader_may_be_silent_longer_than_a_body(fresh: Any) -> None:
    api = fresh(body_silence=timedelta(seconds=0.1))
    batch = api.submit(1)
    with api.http.stream("GET", f"/batches/{batch['id']}/events") as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("id: ")
        time.sleep(0.3)
        api.render(1)
        assert "event: done" in list(lines)


def test_a_header_alone_is_enough_to_refuse_a_body(api: Api) -> None:
    host, port = api.url.removeprefix("http://").split(":")
    # No server needs to count so far as 30 digits do: what it cannot read is no length.
    for length, statuses in ((b"200001", b"413"), (b"9" * 18, b"413"), (b"9" * 30, b"400 413")):
        with socket.create_connection((host, int(port)), timeout=5) as line:
            line.sendall(
                b"POST /api/v1/jobs HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\nContent-Type: application/json\r\n"
                b"Content-Length: %s\r\n\r\n" % (api.key.encode(), length)
            )
            assert line.recv(1000).split()[1] in statuses.split()


def test_bodies_at_the_limit_are_read(api: Api) -> None:
    body = b'{"prompt": "x"}'.ljust(200_000)
    assert api.http.post("/jobs", content=body, headers=JSON).status_code == 201
    lines = b'{"prompt": "x"}\n'.ljust(400_000, b"\n")
    assert api.http.post("/batches", content=lines, headers=NDJSON).json()["total"] == 1


def test_nobody_reads_a_body_without_a_key(api: Api) -> None:
    answer = httpx.post(f"{api.url}/api/v1/jobs", content=b"x" * 300_000, headers=JSON)
    problem_of(answer, 401, "unauthorized")
