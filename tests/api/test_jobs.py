"""One job through the API: submit, look, list, cancel, retry, delete."""

from typing import Any
from uuid import UUID, uuid4

import pytest

from farm import doorbell
from farm.states import Outcome
from farm.views import JobView
from tests.api.conftest import PROMPT, Api, problem_of


def test_submitted_job_answers_what_clients_rely_on(api: Api) -> None:
    answer = api.http.post("/jobs", json={"prompt": PROMPT, "labels": {"site": "bridge"}})
    assert answer.status_code == 201
    job = answer.json()
    assert answer.headers["location"] == f"/api/v1/jobs/{job['id']}"
    assert job["state"] == "queued"
    assert (job["width"], job["height"], job["steps"], job["guidance_scale"]) == (128, 128, 4, 1.0)
    assert job["checkpoint"] == "crack-tiny"
    assert job["acceleration"] == "lcm-lora"
    assert 0 <= job["seed"] < 2**53
    assert job["labels"] == {"site": "bridge"}
    assert job["image"] is None
    assert job["error"] is None
    assert job["attempt"] == 0
    assert set(job) == set(JobView.model_fields)
    assert api.http.get(f"/jobs/{job['id']}").json() == job


def test_count_makes_a_batch_with_rising_seeds(api: Api) -> None:
    answer = api.http.post("/jobs", json={"prompt": PROMPT, "seed": 40, "count": 3, "labels": {"site": "bridge"}})
    assert answer.status_code == 201
    batch = answer.json()
    assert batch["total"] == 3
    assert batch["counts"] == {"queued": 3, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 0}
    assert batch["labels"] == {"site": "bridge"}
    listed = api.http.get(f"/batches/{batch['id']}/jobs").json()
    assert [job["seed"] for job in listed["items"]] == [40, 41, 42]
    assert listed["next_cursor"] is None


def test_warnings_are_part_of_the_answer(api: Api) -> None:
    job = api.http.post("/jobs", json={"prompt": PROMPT, "negative_prompt": "windows"}).json()
    assert len(job["warnings"]) == 1
    assert "no effect" in job["warnings"][0]


def test_a_rehearsal_counts_and_stores_nothing(api: Api) -> None:
    before = api.stored()
    body = {"prompt": PROMPT, "count": 3, "negative_prompt": "windows"}
    for _ in range(2):
        answer = api.http.post("/jobs?dry_run=true", json=body, headers={"Idempotency-Key": "rehearsal"})
        assert answer.status_code == 200
        found = answer.json()
        assert (found["jobs"], found["lanes"], found["pipelines"]) == (3, 1, 1)
        assert len(found["warnings"]) == 1
    problem_of(api.http.post("/jobs?dry_run=true", json={"prompt": ""}), 422, "invalid-request")
    problem_of(api.http.post("/jobs?dry_run=perhaps", json={"prompt": "x"}), 422, "invalid-request")
    assert api.stored() == before
    assert api.http.post("/jobs?dry_run=false", json=body).status_code == 201


def test_a_moment_that_is_past_means_now(api: Api) -> None:
    job = api.http.post("/jobs", json={"prompt": PROMPT, "run_at": "1970-01-01T00:00:00Z"}).json()
    assert job["run_at"] >= job["created_at"]
    (lane,) = api.http.get("/queue").json()["items"]
    assert lane["oldest_age_seconds"] < 60


def test_listing_goes_by_state_label_and_page(api: Api) -> None:
    for n in range(5):
        api.http.post("/jobs", json={"prompt": f"{n}", "labels": {"parity": str(n % 2), "n": str(n)}})
    done = str(api.render(1)[0])
    assert [job["id"] for job in api.http.get("/jobs?state=succeeded").json()["items"]] == [done]
    both = api.http.get("/jobs?state=succeeded&state=queued").json()["items"]
    assert [job["prompt"] for job in both] == ["4", "3", "2", "1", "0"]
    odd = api.http.get("/jobs", params={"label": "parity=1"}).json()["items"]
    assert [job["prompt"] for job in odd] == ["3", "1"]
    one = api.http.get("/jobs", params={"label": ["parity=1", "n=3"]}).json()["items"]
    assert [job["prompt"] for job in one] == ["3"]
    prompts, cursor = [], None
    while True:
        page = api.http.get("/jobs", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        prompts += [job["prompt"] for job in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
        assert len(page["items"]) == 2
    assert prompts == ["4", "3", "2", "1", "0"]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=501", "limit"),
        ("limit=two", "limit"),
        ("state=sleeping", "state.0"),
        ("label=site", "label.0"),
        ("label=a%00=b", "label.0"),
        ("label=a=1&label=a=2", "label"),
        ("limt=5", "limt"),
        ("cursor=", "cursor"),
    ],
)
def test_queries_that_make_no_sense_are_refused(api: Api, query: str, field: str) -> None:
    for path in ("/jobs", "/batches"):
        if path == "/batches" and query.startswith("state"):
            field = "state"
        document = problem_of(api.http.get(f"{path}?{query}"), 422, "invalid-request")
        assert document["problems"][0]["field"] == field


@pytest.mark.parametrize("cursor", ["x", "AAAA", "!!!!", "A" * 22 + "!!", "é", "A" * 400, "../../etc"])
def test_made_up_cursors_are_refused(api: Api, cursor: str) -> None:
    for path in ("/jobs", "/batches"):
        problem_of(api.http.get(path, params={"cursor": cursor}), 422, "invalid-request")


def test_limits_of_a_page_are_accepted(api: Api) -> None:
    for limit in (1, 500):
        assert api.http.get("/jobs", params={"limit": limit}).status_code == 200


def test_a_job_is_cancelled_retried_and_deleted(api: Api) -> None:
    job = api.submit(1)
    job_id = api.http.get(f"/batches/{job['id']}/jobs").json()["items"][0]["id"]
    problem_of(api.http.post(f"/jobs/{job_id}/retry"), 409, "conflict")
    for _ in range(2):
        assert api.http.post(f"/jobs/{job_id}/cancel").json()["state"] == "cancelled"
    assert api.http.post(f"/jobs/{job_id}/retry").json()["state"] == "queued"
    api.render(1)
    problem_of(api.http.post(f"/jobs/{job_id}/cancel"), 409, "conflict")
    assert api.http.get(f"/jobs/{job_id}").json()["image"] == {
        "sha256": "a" * 64,
        "bytes": 100,
        "width": 128,
        "height": 128,
    }
    answer = api.http.delete(f"/jobs/{job_id}")
    assert (answer.status_code, answer.content) == (204, b"")
    problem_of(api.http.get(f"/jobs/{job_id}"), 404, "not-found")
    problem_of(api.http.delete(f"/jobs/{job_id}"), 404, "not-found")


def test_a_failed_job_says_why(api: Api) -> None:
    api.submit(1)
    (job_id,) = api.render(1, outcome=Outcome.FAILED)
    job = api.http.get(f"/jobs/{job_id}").json()
    assert job["state"] == "failed"
    assert job["error"] == {"code": "render-failed", "message": "render-failed"}


def test_an_id_that_is_none_is_named(api: Api) -> None:
    document = problem_of(api.http.get("/jobs/none"), 422, "invalid-request")
    assert document["problems"][0]["field"] == "job_id"


PLACES = [
    ("GET", "/jobs/{job}"),
    ("DELETE", "/jobs/{job}"),
    ("POST", "/jobs/{job}/cancel"),
    ("POST", "/jobs/{job}/replay"),
    ("POST", "/jobs/{job}/retry"),
    ("GET", "/jobs/{job}/image"),
    ("GET", "/jobs/{job}/thumbnail"),
    ("GET", "/batches/{batch}"),
    ("DELETE", "/batches/{batch}"),
    ("GET", "/batches/{batch}/jobs"),
    ("GET", "/batches/{batch}/events"),
    ("POST", "/batches/{batch}/cancel"),
    ("POST", "/batches/{batch}/pause"),
    ("POST", "/batches/{batch}/resume"),
    ("POST", "/batches/{batch}/retry"),
    ("POST", "/batches/{batch}/priority"),
]


def test_the_list_of_places_holds_every_route_with_an_id(api: Api) -> None:
    document = api.http.get("/openapi.json").json()
    found = {
        (method.upper(), path.removeprefix("/api/v1").replace("_id}", "}"))
        for path, operations in document["paths"].items()
        for method in operations
        if "{job_id}" in path or "{batch_id}" in path
    }
    assert found == set(PLACES)


def test_another_projects_ids_are_not_found(api: Api) -> None:
    batch = api.submit(1)
    job = api.http.get(f"/batches/{batch['id']}/jobs").json()["items"][0]
    strangers = api.client(api.new_key(project="strangers"))
    nobody = {"job": uuid4(), "batch": uuid4()}
    before = api.stored()
    for method, path in PLACES:
        body: Any = {"json": {"priority": 1}} if path.endswith("priority") else {}
        theirs = strangers.request(method, path.format(job=job["id"], batch=batch["id"]), **body)
        refused = problem_of(theirs, 404, "not-found")
        missing = problem_of(strangers.request(method, path.format(**nobody), **body), 404, "not-found")
        # Nothing tells a stranger's id from one that does not exist.
        for name, own in (("job", job["id"]), ("batch", batch["id"])):
            missing["detail"] = missing["detail"].replace(str(nobody[name]), own)
        assert refused["detail"] == missing["detail"]
    assert strangers.get("/jobs").json() == {"items": [], "next_cursor": None}
    assert strangers.get("/batches").json() == {"items": [], "next_cursor": None}
    assert api.stored() == before
    assert api.http.get(f"/jobs/{job['id']}").json() == job


def test_the_doorbell_rings_after_a_submission(api: Api) -> None:
    queue = api.settings.redis_prefix + doorbell.queue_of("default")
    with doorbell.connect(api.settings) as redis:
        redis.delete(queue)
        api.http.post("/jobs", json={"prompt": PROMPT})
        assert doorbell.flush(api.settings, 5)
        assert redis.llen(queue) == 1


def test_ids_sort_by_time(api: Api) -> None:
    ids = [UUID(api.http.post("/jobs", json={"prompt": PROMPT}).json()["id"]) for _ in range(3)]
    assert ids == sorted(ids)


def test_a_job_with_a_picture_is_replayed_beside_itself(api: Api) -> None:
    job = api.http.post("/jobs", json={"prompt": PROMPT, "seed": 5, "labels": {"set": "train"}}).json()
    problem_of(api.http.post(f"/jobs/{job['id']}/replay"), 409, "conflict")
    api.render(1)
    answer = api.http.post(f"/jobs/{job['id']}/replay", headers={"Idempotency-Key": "once"})
    assert answer.status_code == 201
    replay = answer.json()
    assert answer.headers["location"] == f"/api/v1/jobs/{replay['id']}"
    assert replay["replay"] == {"of": job["id"], "levels": None, "mean_levels": None, "differing": None}
    assert (replay["seed"], replay["prompt"], replay["state"]) == (5, PROMPT, "queued")
    assert replay["batch_id"] != job["batch_id"]
    again = api.http.post(f"/jobs/{job['id']}/replay", headers={"Idempotency-Key": "once"})
    assert again.json()["id"] == replay["id"]
    assert api.http.get(f"/jobs/{job['id']}").json()["replay"] is None
    problem_of(api.http.post(f"/jobs/{uuid4()}/replay"), 404, "not-found")
