"""Many jobs at once: JSON and NDJSON, defaults, rehearsals, all or nothing; and what people do to a batch."""

import threading
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from fastapi.routing import APIRoute
from sqlalchemy import text

from api import bodies
from api.bodies import json_bytes
from api.deps import Needs, transaction
from api.examples import BATCH, FULL_JOB, JOB, JOBS_WITH_COUNT, NDJSON
from api.main import NOUNS
from farm.modelfiles import FoundModel
from farm.queries import models as model_rows
from farm.states import Outcome
from farm.views import BatchView
from tests.api.conftest import PROMPT, Api, problem_of, until

LINES = {"Content-Type": "application/x-ndjson"}


def ndjson(*rows: dict[str, Any]) -> bytes:
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)


def prompts(api: Api, batch: dict[str, Any]) -> list[str]:
    return [job["prompt"] for job in api.http.get(f"/batches/{batch['id']}/jobs").json()["items"]]


def test_json_batch_with_defaults(api: Api) -> None:
    body = {
        "name": "walls",
        "labels": {"run": "7"},
        "defaults": {"steps": 2, "labels": {"site": "bridge"}},
        "jobs": [{"prompt": "one"}, {"prompt": "two", "steps": 3}],
    }
    answer = api.http.post("/batches", json=body)
    assert answer.status_code == 201
    batch = answer.json()
    assert answer.headers["location"] == f"/api/v1/batches/{batch['id']}"
    assert set(batch) == set(BatchView.model_fields)
    assert (batch["name"], batch["total"], batch["paused"], batch["labels"]) == ("walls", 2, False, {"run": "7"})
    assert batch["counts"] == {"queued": 2, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 0}
    items = api.http.get(f"/batches/{batch['id']}/jobs").json()["items"]
    assert [(job["number"], job["prompt"], job["steps"]) for job in items] == [(0, "one", 2), (1, "two", 3)]
    assert items[0]["labels"] == {"site": "bridge"}
    assert api.http.get(f"/batches/{batch['id']}").json() == batch


def test_a_batch_says_when_it_is_to_stop_itself(api: Api) -> None:
    jobs = [{"prompt": "one"}]
    plain = api.http.post("/batches", json={"jobs": jobs}).json()
    assert (plain["stop_at_failed_share"], plain["stop_reason"]) == (None, None)
    said = api.http.post("/batches", json={"jobs": jobs, "stop_at_failed_share": 1})
    asked = api.http.post("/batches?stop_at_failed_share=0.25", content=ndjson(*jobs), headers=LINES)
    assert [answer.json()["stop_at_failed_share"] for answer in (said, asked)] == [1.0, 0.25]
    both = api.http.post("/batches?stop_at_failed_share=0.25", json={"jobs": jobs})
    document = problem_of(both, 422, "invalid-request")
    assert [problem["field"] for problem in document["problems"]] == ["stop_at_failed_share"]


def test_ndjson_batch_has_its_defaults_in_the_query(api: Api) -> None:
    query = {
        "name": "walls & more",
        "steps": "2",
        "guidance_scale": "1.5",
        "checkpoint": "crack-tiny",
        "adapters": '[{"name":"moss","weight":0.5}]',
        "labels": '{"site":"bridge"}',
        "metadata": "false",
        "priority": "-5",
    }
    answer = api.http.post("/batches", params=query, content=ndjson({"prompt": "a"}, {"prompt": "b"}), headers=LINES)
    assert answer.status_code == 201, answer.text
    batch = answer.json()
    assert (batch["name"], batch["total"], batch["priority"]) == ("walls & more", 2, -5)
    assert batch["labels"] == {"site": "bridge"}
    job = api.http.get(f"/batches/{batch['id']}/jobs").json()["items"][0]
    assert (job["steps"], job["guidance_scale"]) == (2, 1.5)
    assert job["adapters"] == [{"name": "moss", "weight": 0.5}]
    assert job["labels"] == {"site": "bridge"}


@pytest.mark.parametrize("kind", ["application/x-ndjson", "application/ndjson", "application/jsonl; charset=utf-8"])
def test_blank_lines_and_a_missing_line_end_do_no_harm(api: Api, kind: str) -> None:
    body = b'\n{"prompt": "a"}\r\n\n  \n{"prompt": "b"}'
    answer = api.http.post("/batches", content=body, headers={"Content-Type": kind})
    assert answer.status_code == 201, answer.text
    assert prompts(api, answer.json()) == ["a", "b"]


def test_all_or_nothing_with_the_first_hundred_problems(api: Api) -> None:
    rows = [{"prompt": PROMPT}] * 50 + [{"prompt": PROMPT, "steps": 0}] * 150 + [{"prompt": PROMPT}]
    document = problem_of(api.http.post("/batches", content=ndjson(*rows), headers=LINES), 422, "invalid-request")
    assert len(document["problems"]) == 100
    assert document["problems"][0]["line"] == 51
    assert document["problems"][99]["line"] == 150
    assert {problem["field"] for problem in document["problems"]} == {"steps"}
    assert sum(api.stored().values()) == 0


@pytest.mark.parametrize("body", [b"", b"\n", b" \n\n"])
def test_nothing_to_do_is_refused(api: Api, body: bytes) -> None:
    problem_of(api.http.post("/batches", content=body, headers=LINES), 422, "invalid-request")


def test_an_endless_line_is_refused(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "LINE_BYTES", 1000)
    body = ndjson({"prompt": "a"}) + b'{"prompt": "' + b"b" * 2000
    document = problem_of(api.http.post("/batches", content=body, headers=LINES), 422, "invalid-request")
    assert document["problems"][0]["line"] == 2


def test_a_rehearsal_counts_and_stores_nothing(api: Api) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "negative_prompt": "x"},
        {"prompt": "b", "count": 3},
        {"prompt": "c", "width": 64},
    ]
    rows.append({"prompt": "d", "adapters": [{"name": "moss"}]})
    wanted = {"jobs": 6, "lanes": 2, "pipelines": 2}
    for answer in (
        api.http.post("/batches?dry_run=true", json={"jobs": rows}),
        api.http.post("/batches?dry_run=true", content=ndjson(*rows), headers=LINES | {"Idempotency-Key": "x"}),
    ):
        assert answer.status_code == 200
        document = answer.json()
        assert len(document.pop("warnings")) == 1
        assert document == wanted
    assert sum(api.stored().values()) == 0


def test_too_many_jobs_are_refused(fresh: Any) -> None:
    api = fresh(max_batch_jobs=10)
    problem_of(api.http.post("/jobs", json={"prompt": "x", "count": 11}), 413, "too-large")
    problem_of(api.http.post("/batches", content=ndjson(*[{"prompt": "x"}] * 11), headers=LINES), 413, "too-large")
    assert sum(api.stored().values()) == 0
    assert api.http.post("/jobs", json={"prompt": "x", "count": 10}).status_code == 201


def test_the_examples_of_the_document_are_accepted(api: Api) -> None:
    for example in (JOB, FULL_JOB, JOBS_WITH_COUNT):
        assert api.http.post("/jobs", json=example).status_code == 201
    assert api.http.post("/batches", json=BATCH).status_code == 201
    assert api.http.post("/batches", content=NDJSON, headers=LINES).json()["total"] == 2


def test_a_batch_is_paused_resumed_and_reprioritised(api: Api) -> None:
    batch_id = api.submit(2)["id"]
    path = f"/batches/{batch_id}"
    for _ in range(2):
        assert api.http.post(f"{path}/pause").json()["paused"] is True
    assert [batch["id"] for batch in api.http.get("/batches?state=paused").json()["items"]] == [
        path.rsplit("/", maxsplit=1)[-1]
    ]
    assert api.http.post(f"{path}/resume").json()["paused"] is False
    assert api.http.get("/batches?state=paused").json()["items"] == []
    assert api.http.post(f"{path}/priority", json={"priority": 7}).json()["priority"] == 7
    for priority in (101, -101, "1", 1.5, None, True):
        answer = api.http.post(f"{path}/priority", json={"priority": priority})
        assert problem_of(answer, 422, "invalid-request")["problems"][0]["field"] == "priority"


def test_a_batch_is_cancelled_retried_and_deleted(api: Api) -> None:
    path = f"/batches/{api.submit(3)['id']}"
    api.render(1)
    for _ in range(2):
        counts = api.http.post(f"{path}/cancel").json()["counts"]
        assert (counts["succeeded"], counts["cancelled"], counts["queued"]) == (1, 2, 0)
    counts = api.http.post(f"{path}/retry").json()["counts"]
    assert (counts["succeeded"], counts["cancelled"], counts["queued"]) == (1, 0, 2)
    api.render(1, outcome=Outcome.FAILED)
    assert api.http.get(path).json()["counts"]["failed"] == 1
    assert [job["number"] for job in api.http.get(f"{path}/jobs?state=failed").json()["items"]] == [1]
    answer = api.http.delete(path)
    assert (answer.status_code, answer.content) == (204, b"")
    problem_of(api.http.get(path), 404, "not-found")
    assert api.http.get("/batches").json()["items"] == []


def test_batches_are_listed_by_state_label_and_page(api: Api) -> None:
    for n in range(3):
        api.submit(1, labels={"n": str(n)})
    api.render(1)
    done = api.http.get("/batches?state=done").json()["items"]
    assert [batch["labels"] for batch in done] == [{"n": "0"}]
    active = api.http.get("/batches?state=active").json()["items"]
    assert [batch["labels"]["n"] for batch in active] == ["2", "1"]
    assert len(api.http.get("/batches", params={"label": "n=2"}).json()["items"]) == 1
    first = api.http.get("/batches?limit=2").json()
    rest = api.http.get("/batches", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    assert [batch["labels"]["n"] for batch in first["items"] + rest["items"]] == ["2", "1", "0"]
    assert rest["next_cursor"] is None


def test_lanes_and_workers_are_shown(api: Api) -> None:
    api.submit(3)
    api.submit(2, width=64)
    lanes = api.http.get("/queue").json()["items"]
    assert [(lane["depth"], lane["checkpoint"], lane["pool"]) for lane in lanes] == [
        (3, "crack-tiny", "default"),
        (2, "crack-tiny", "default"),
    ]
    assert all(lane["oldest_age_seconds"] >= 0 for lane in lanes)
    assert api.http.get("/workers").json() == {"items": [], "next_cursor": None}


def test_models_are_shown(api: Api) -> None:
    checkpoints = api.http.get("/checkpoints").json()["items"]
    assert [model["name"] for model in checkpoints] == ["big", "crack-tiny"]
    assert checkpoints[1]["profile"]["steps"] == 4
    adapters = api.http.get("/adapters").json()["items"]
    assert {(model["name"], model["kind"]) for model in adapters} >= {("lcm", "acceleration"), ("moss", "style")}


def test_models_count_as_soon_as_they_are_registered(api: Api) -> None:
    """By another process: the API keeps the catalogue, and has to notice."""
    job = {"prompt": "a", "adapters": [{"name": "late"}]}
    problem_of(api.http.post("/jobs", json=job), 422, "invalid-request")
    found = FoundModel(hash="f" * 64, family="crack-tiny", bytes=1, files=(), profile={}, source={})
    with api.database.transaction() as conn:
        model_rows.insert(conn, name="late", kind="style", found=found)
    try:
        assert api.http.post("/jobs", json=job).status_code == 201
    finally:
        with api.database.transaction() as conn:
            model_rows.remove(conn, "late")
    problem_of(api.http.post("/jobs", json=job), 422, "invalid-request")


def test_an_upload_that_breaks_off_leaves_nothing(api: Api) -> None:
    class Gone(Exception):
        pass

    def pieces() -> Any:
        yield ndjson({"prompt": "a"}) * 3000
        raise Gone

    with pytest.raises(Gone):
        api.http.post("/batches", content=pieces(), headers=LINES)
    folder = api.settings.spool_dir
    assert folder is not None
    until(lambda: open_files(folder) == 0)
    assert sum(api.stored().values()) == 0


@pytest.mark.parametrize(
    ("path", "kind", "halves"),
    [
        ("/jobs", "application/json", (b'{"prompt":', b' "a"}')),
        ("/batches", "application/json", (b'{"jobs": [', b'{"prompt": "a"}]}')),
        ("/batches", "application/x-ndjson", (b'{"prompt": "a"}\n', b'{"prompt": "b"}\n')),
    ],
)
def test_slow_bodies_hold_no_connection(api: Api, path: str, kind: str, halves: tuple[bytes, bytes]) -> None:
    """More bodies that trickle in than there are connections, and others are served all the same."""
    going = threading.Event()
    arrived = threading.Semaphore(0)
    answers: list[httpx.Response] = []

    def pieces() -> Any:
        yield halves[0]
        arrived.release()
        assert going.wait(20)
        yield halves[1]

    def send() -> None:
        with api.client(api.key) as client:
            answers.append(client.post(path, content=pieces(), headers={"Content-Type": kind}))

    threads = [threading.Thread(target=send) for _ in range(api.settings.database_pool_size + 2)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert arrived.acquire(timeout=10)
    assert api.http.get("/jobs").status_code == 200
    going.set()
    for thread in threads:
        thread.join(20)
    assert [answer.status_code for answer in answers] == [201] * len(threads)


def test_bodies_are_read_before_a_transaction_opens() -> None:
    """The order of a route's parameters decides, so every route is looked at."""
    seen = 0
    for noun in NOUNS:
        for route in noun.router.routes:
            assert isinstance(route, APIRoute)
            calls = [dependency.call for dependency in route.dependant.dependencies]
            if json_bytes in calls and transaction in calls:
                seen += 1
                assert calls.index(json_bytes) < calls.index(transaction), route.name
                assert isinstance(calls[0], Needs), route.name
    assert seen == 11


def test_more_requests_than_threads_and_connections_all_get_answers(fresh: Any) -> None:
    api = fresh(api_threads=2, database_pool_size=2)
    answers: list[int] = []

    def ask(n: int) -> None:
        with api.client(api.new_key("jobs:read") if n % 2 else api.key) as client:
            answers.extend(client.get("/queue").status_code for _ in range(5))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == [200] * 60


def test_nothing_is_acknowledged_that_could_not_be_committed(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit that fails is a failure, whatever the route had answered, and nobody is told of work."""
    rung: list[str] = []
    monkeypatch.setattr("farm.doorbell.ring", lambda settings, pool, times=1: rung.append(pool))
    refuse = """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'the disk is full'; END $$;
        CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON batches DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION refuse()
    """
    with api.database.transaction() as conn:
        conn.execute(text(refuse))
    try:
        for answer in (
            api.http.post("/jobs", json={"prompt": PROMPT}, headers={"Idempotency-Key": "a"}),
            api.http.post("/batches", json={"jobs": [{"prompt": PROMPT}]}, headers={"Idempotency-Key": "b"}),
        ):
            assert "disk" not in problem_of(answer, 500, "internal")["detail"]
    finally:
        with api.database.transaction() as conn:
            conn.execute(text("DROP TRIGGER refuse ON batches; DROP FUNCTION refuse"))
    assert sum(api.stored().values()) == 0
    assert rung == []
    assert api.http.post("/jobs", json={"prompt": PROMPT}, headers={"Idempotency-Key": "a"}).status_code == 201
    assert rung == ["default"]


def open_files(folder: Path) -> int:
    """Files below a folder that this process holds open, deleted or not."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            found += str(link.readlink()).startswith(str(folder))
        except FileNotFoundError:
            continue
    return found


def test_spooled_rows_are_closed_after_use(api: Api) -> None:
    api.http.post("/batches", content=ndjson({"prompt": "a"}), headers=LINES)
    api.http.post("/batches", content=b"nonsense", headers=LINES)
    folder = api.settings.spool_dir
    assert folder is not None
    until(lambda: open_files(folder) == 0)
    assert list(folder.iterdir()) == []
