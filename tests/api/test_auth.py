"""Keys: every route but health wants one, and each wants the right scope."""

import time
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest

from api.auth import Authenticator
from api.main import NOUNS
from farm.db import Database
from farm.errors import Unauthorized
from tests.api.conftest import HEALTH, Api, made_up, operations, problem_of

SCOPES = {"admin", "jobs:read", "jobs:submit", "jobs:manage", "jobs:write"}


def test_the_document_knows_every_route(api: Api) -> None:
    routes = sum(len(route.methods) for noun in NOUNS for route in noun.router.routes)
    assert len(operations(api)) == routes


def test_without_a_key_everything_but_health_is_refused(api: Api) -> None:
    anyone = api.client(None)
    for method, path in operations(api):
        answer = anyone.request(method, made_up(path))
        if path in HEALTH:
            assert answer.status_code == 200
        else:
            problem_of(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/redoc", "/openapi.json", "/api/v1", "/api/v1/openapi.json", "/api/v1/nothing", "/metrics",
             "/api/v1/health", "/api/v1/health/ready/", "/api/v1/health/live/../../jobs", "//api/v1/health/live"]
)  # fmt: skip
def test_unknown_paths_say_nothing_without_a_key(api: Api, path: str) -> None:
    for method in ("GET", "POST", "OPTIONS", "HEAD"):
        answer = httpx.request(method, api.url + path)
        assert answer.status_code == 401, (method, path)


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer farm_nothing"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic {key}"},
        {"Authorization": "{key}"},
        {"Authorization": "Bearer {key}x"},
        {"Authorization": "Bearer x{key}"},
        {"Authorization": "Basic abc", "X-API-Key": "{key}"},
        {"X-API-Key": "farm_nothing"},
        {"X-API-Key": ""},
        {"X-API-Key": "é\xff"},
        {"Cookie": "key={key}"},
    ],
)
def test_what_is_no_key_is_refused(api: Api, headers: dict[str, str]) -> None:
    sent = [(name.encode(), value.format(key=api.key).encode("latin-1")) for name, value in headers.items()]
    problem_of(httpx.get(f"{api.url}/api/v1/version", headers=sent), 401, "unauthorized")
    problem_of(httpx.get(f"{api.url}/api/v1/version?key={api.key}"), 401, "unauthorized")


def test_a_key_comes_as_bearer_or_in_its_own_header(api: Api) -> None:
    for headers in ({"X-API-Key": api.key}, {"Authorization": f"bearer {api.key}"}):
        assert httpx.get(f"{api.url}/api/v1/version", headers=headers).status_code == 200


def test_every_route_wants_its_scope(api: Api) -> None:
    def wanted(method: str, path: str) -> set[str]:
        if path == "/version":
            return SCOPES
        if path.startswith(("/keys", "/registrations", "/projects")):
            return {"admin"}
        if method == "POST" and path in {"/checkpoints", "/vaes", "/controlnets", "/motions", "/adapters"}:
            return {"admin"}
        if method == "GET":
            return {"jobs:read"}
        submits = (method == "POST" and path in {"/jobs", "/batches", "/uploads"}) or path.endswith("/replay")
        return {"jobs:write", "jobs:submit" if submits else "jobs:manage"}

    for scope in SCOPES:
        client = api.client(api.new_key(scope))
        for method, path in operations(api):
            if path in HEALTH:
                continue
            answer = client.request(method, made_up(path))
            if scope in wanted(method, path):
                assert answer.status_code not in {401, 403}, (scope, method, path)
            else:
                assert problem_of(answer, 403, "forbidden")["scope"] in wanted(method, path)


def test_expired_keys_are_refused(api: Api) -> None:
    key = api.new_key(expires_at=datetime.now(UTC) + timedelta(seconds=0.2))
    time.sleep(0.25)
    problem_of(api.client(key).get("/version"), 401, "unauthorized")


def test_keys_are_compared_in_constant_time(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(stored: bytes, sent: bytes) -> bool:
        compared.append((stored, sent))
        return False

    monkeypatch.setattr("farm.keys.hmac.compare_digest", compare)
    problem_of(api.client(api.new_key()).get("/version"), 401, "unauthorized")
    assert [(len(stored), stored == sent) for stored, sent in compared] == [(32, True)]


def test_keys_are_made_listed_and_revoked_by_admins(api: Api) -> None:
    ends = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    body = {"name": "importer", "project": "walls", "scopes": ["jobs:read"], "expires_at": ends}
    answer = api.http.post("/keys", json=body)
    assert answer.status_code == 201
    made = answer.json()
    assert made["project"] == "walls"
    assert made["scopes"] == ["jobs:read"]
    assert len(made["key"]) > 43
    theirs = api.client(made["key"])
    assert theirs.get("/jobs").status_code == 200
    listed = api.http.get("/keys").json()["items"]
    (found,) = [key for key in listed if key["id"] == made["id"]]
    assert found["key"] is None
    assert made["key"] not in api.http.get("/keys").text
    for _ in range(2):
        assert api.http.delete(f"/keys/{made['id']}").status_code == 204
    # The key had been remembered a moment ago, and must be forgotten at once.
    problem_of(theirs.get("/jobs"), 401, "unauthorized")
    problem_of(api.http.delete(f"/keys/{uuid4()}"), 404, "not-found")


def test_a_key_belongs_to_the_project_of_who_asks(api: Api) -> None:
    made = api.http.post("/keys", json={"name": "mine"}).json()
    assert made["project"] == "cracks"
    assert made["scopes"] == ["jobs:read", "jobs:write"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "a\0b"}, "name"),
        ({"name": "x" * 201}, "name"),
        ({"name": "x", "scopes": []}, "scopes"),
        ({"name": "x", "scopes": ["root"]}, "scopes.0"),
        ({"name": "x", "project": ""}, "project"),
        ({"name": "x", "project": "../x"}, "project"),
        ({"name": "x", "expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
        ({"name": "x", "expires_at": "2999-01-01T00:00:00"}, "expires_at"),
        ({"name": "x", "expires_at": 5}, "expires_at"),
        ({"name": "x", "expires_at": "9999999999"}, "expires_at"),
        ({"name": "x", "expires_at": "9999-12-31T23:59:59-14:00"}, "expires_at"),
        ({"name": "x", "key": "mine"}, "key"),
    ],
)
def test_keys_that_make_no_sense_are_refused(api: Api, body: dict[str, Any], field: str) -> None:
    document = problem_of(api.http.post("/keys", json=body), 422, "invalid-request")
    assert field in [problem["field"] for problem in document["problems"]]


def test_lookups_are_remembered_for_seconds_only(api: Api, shared: Api) -> None:
    now = [0.0]
    asked = Authenticator(api.database, clock=lambda: now[0])
    assert asked.remembered(api.key) is None
    caller = asked.look_up(api.key)
    assert asked.remembered(api.key) == caller
    now[0] = 5.0
    assert asked.remembered(api.key) is None
    with pytest.raises(Unauthorized):
        asked.look_up("farm_unknown")
    assert asked.remembered("farm_unknown") is None


def test_a_lookup_is_not_remembered_past_the_end_of_the_key(api: Api) -> None:
    now = [0.0]
    asked = Authenticator(api.database, clock=lambda: now[0])
    key = api.new_key(expires_at=datetime.now(UTC) + timedelta(seconds=2))
    left = asked.look_up(key).seconds_left
    assert left is not None
    assert 0 < left <= 2
    now[0] = left - 0.01
    assert asked.remembered(key) is not None
    now[0] = left
    assert asked.remembered(key) is None
    lasting = api.new_key(expires_at=datetime.now(UTC) + timedelta(days=2))
    asked.look_up(lasting)
    now[0] += 3.0
    assert asked.remembered(lasting) is None, "for seconds only, as ever"


def test_a_key_revoked_during_its_lookup_is_not_remembered(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Authenticator(api.database)
    original = Database.transaction

    def transaction(database: Database) -> Any:
        asked.forget()
        return original(database)

    monkeypatch.setattr(Database, "transaction", transaction)
    asked.look_up(api.key)
    assert asked.remembered(api.key) is None
