"""Idempotency-Key: a submission sent twice counts once."""

import threading
from typing import Any

import httpx
import pytest

from farm import jobs
from farm.keys import authenticate
from tests.api.conftest import PROMPT, Api, problem_of

ONE = {"prompt": PROMPT}
KEY = {"Idempotency-Key": "import 7"}
LINES = {"Content-Type": "application/x-ndjson"}

WAYS: list[tuple[str, dict[str, Any]]] = [
    ("/jobs", {"json": ONE}),
    ("/jobs", {"json": {**ONE, "count": 3}}),
    ("/batches", {"json": {"jobs": [ONE, ONE]}}),
    ("/batches?steps=2", {"content": b'{"prompt": "a"}\n', "headers": LINES}),
]


def send(api: Api, path: str, body: dict[str, Any], key: dict[str, str] | None = None) -> httpx.Response:
    headers = body.get("headers", {}) | (KEY if key is None else key)
    with api.client(api.key) as client:
        return client.post(path, **{**body, "headers": headers})


@pytest.mark.parametrize(("path", "body"), WAYS)
def test_the_first_answer_is_repeated(api: Api, path: str, body: dict[str, Any]) -> None:
    first = send(api, path, body)
    stored = api.stored()
    again = send(api, path, body)
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == first.json()
    assert again.headers["location"] == first.headers["location"]
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert api.stored() == stored
    # Without the key, or under another, it is a submission of its own.
    assert send(api, path, body, {}).json()["id"] != first.json()["id"]
    assert send(api, path, body, {"Idempotency-Key": "8"}).json()["id"] != first.json()["id"]


def test_another_request_under_the_same_key_is_refused(api: Api) -> None:
    send(api, "/batches?steps=2", {"content": b'{"prompt": "a"}\n', "headers": LINES})
    stored = api.stored()
    for path, body in (
        ("/batches?steps=3", {"content": b'{"prompt": "a"}\n', "headers": LINES}),
        ("/batches?steps=2", {"content": b'{"prompt": "b"}\n', "headers": LINES}),
        *WAYS[:3],
    ):
        problem_of(send(api, path, body), 422, "idempotency-mismatch")
    assert api.stored() == stored


def test_another_project_may_use_the_same_key(api: Api) -> None:
    first = send(api, "/jobs", {"json": ONE}).json()
    strangers = api.client(api.new_key(project="strangers"))
    answer = strangers.post("/jobs", json=ONE, headers=KEY)
    assert answer.status_code == 201
    assert answer.json()["id"] != first["id"]


def test_a_refused_submission_does_not_use_its_key_up(api: Api) -> None:
    for path, body in (("/jobs", {"json": {"prompt": ""}}), ("/batches", {"json": {"jobs": [{"prompt": ""}]}})):
        problem_of(send(api, path, body), 422, "invalid-request")
    assert send(api, "/jobs", {"json": ONE}).status_code == 201


@pytest.mark.parametrize(("path", "body"), WAYS)
def test_a_twin_in_flight_is_told_to_wait(api: Api, path: str, body: dict[str, Any]) -> None:
    with api.database.transaction() as conn:
        project = authenticate(conn, api.key).project_id
        assert jobs.idempotent(conn, project, KEY["Idempotency-Key"], b"", api.settings) is None
        answer = send(api, path, body)
        assert problem_of(answer, 409, "in-flight")["retryable"] is True
        assert int(answer.headers["retry-after"]) >= 1
    assert send(api, path, body).status_code == 201


@pytest.mark.parametrize(("path", "body"), [WAYS[0], WAYS[3]])
def test_twins_sent_together_count_once(api: Api, path: str, body: dict[str, Any]) -> None:
    together = threading.Barrier(8)
    answers: list[httpx.Response] = []

    def submit() -> None:
        together.wait(10)
        answers.append(send(api, path, body))

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert {answer.status_code for answer in answers} <= {201, 409}
    assert len({answer.json()["id"] for answer in answers if answer.status_code == 201}) == 1
    assert api.stored()["batches"] == 1
    assert send(api, path, body).headers["idempotency-replayed"] == "true"


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb", "schlüssel".encode()])
def test_keys_that_are_none_are_refused(api: Api, key: Any) -> None:
    for path, body in WAYS:
        document = problem_of(send(api, path, body, {"Idempotency-Key": key}), 422, "invalid-request")
        assert document["problems"][0]["field"] == "Idempotency-Key"
    assert sum(api.stored().values()) == 0
