"""Refusals and failures: one shape, one table, nothing of our inside in it."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import structlog

from api.errors import BY_STATUS, STATUS
from farm import errors, jobs
from tests.api.conftest import HEALTH, Api, made_up, operations, problem_of, until


def kinds(root: type[errors.FarmError] = errors.FarmError) -> Iterator[type[errors.FarmError]]:
    yield root
    for child in root.__subclasses__():
        yield from kinds(child)


def test_the_table_holds_every_code_and_no_other() -> None:
    codes = {kind.code for kind in kinds()}
    assert codes <= set(STATUS)
    assert set(STATUS) - codes == {"bad-request", "method-not-allowed"}
    assert set(BY_STATUS.values()) <= set(STATUS)


@pytest.mark.parametrize("kind", sorted(set(kinds()), key=str))
def test_every_error_has_its_answer(api: Api, monkeypatch: pytest.MonkeyPatch, kind: type[errors.FarmError]) -> None:
    def fail(*_: Any) -> None:
        raise kind("it is at 10.0.0.1", near=["moss"])

    monkeypatch.setattr(jobs, "queue", fail)
    answer = api.http.get("/queue")
    document = problem_of(answer, STATUS[kind.code], kind.code)
    assert document["retryable"] is kind.retryable
    if answer.status_code < 500:
        assert document["detail"] == "it is at 10.0.0.1"
        assert document["near"] == ["moss"]
    else:
        assert "10.0.0.1" not in answer.text
    assert ("retry-after" in answer.headers) == (kind.retryable and answer.status_code in {409, 429, 503})


def test_the_unforeseen_is_a_problem_document_too(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the password is hunter2")

    monkeypatch.setattr(jobs, "queue", fail)
    answer = api.http.get("/queue", headers={"X-Request-Id": "case-7"})
    assert problem_of(answer, 500, "internal")["request_id"] == "case-7"
    assert "hunter2" not in answer.text
    monkeypatch.undo()
    assert api.http.get("/queue").status_code == 200


def test_unknown_places_and_methods_are_problem_documents(api: Api) -> None:
    assert problem_of(api.http.get("/nothing"), 404, "not-found")["instance"] == "/api/v1/nothing"
    problem_of(api.http.get("/jobs/"), 404, "not-found")
    for path in ("/", "/docs", "/redoc", "/openapi.json", "/v1/images", "/sdapi/v1/txt2img"):
        problem_of(httpx.get(api.url + path, headers={"X-API-Key": api.key}), 404, "not-found")
    answer = api.http.put("/jobs", json={})
    problem_of(answer, 405, "method-not-allowed")
    assert answer.headers["allow"] == "GET, POST"


def test_parameters_that_a_route_does_not_have_are_refused(api: Api) -> None:
    """Whoever misspells `dry_run` must not find a job stored."""
    before = api.stored()
    for method, path in operations(api):
        answer = api.http.request(
            method,
            f"{made_up(path)}?dryrun=true",
            content=b'{"prompt": "x"}',
            headers={"Content-Type": "application/json"},
        )
        if path in HEALTH:
            assert answer.status_code == 200
            continue
        document = problem_of(answer, 422, "invalid-request")
        assert document["problems"] == [{"field": "dryrun", "problem": "unknown parameter"}], path
    assert api.stored() == before


def test_request_ids_are_ours_unless_they_are_sensible(api: Api) -> None:
    assert api.http.get("/version", headers={"X-Request-Id": "trace-1.a_B"}).headers["x-request-id"] == "trace-1.a_B"
    for odd in ("x" * 65, "a b", "<script>", ""):
        given = api.http.get("/version", headers={"X-Request-Id": odd}).headers["x-request-id"]
        assert given != odd
        assert len(given) == 32


def test_the_access_log_names_the_project_and_keeps_the_query_out(api: Api) -> None:
    with structlog.testing.capture_logs() as lines:
        api.http.get("/jobs?label=secret=1", headers={"X-Request-Id": "r1"})
        until(lambda: lines)
    (line,) = lines
    assert line["event"] == "request"
    assert (line["method"], line["path"], line["status"], line["project"]) == ("GET", "/api/v1/jobs", 200, "cracks")
    assert line["milliseconds"] > 0
    assert "secret" not in str(line)
    assert api.key not in str(line)
