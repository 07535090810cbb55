"""Asking for models over the API: who may, what is refused at once, and how one is followed."""

from typing import Any

import pytest
from sqlalchemy import text

from farm import registrations, sources
from farm.ids import new_id
from farm.modelfiles import FoundModel
from tests.api.conftest import Api, problem_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SOURCE = f"hf:owner/name@{COMMIT}"


@pytest.mark.parametrize(
    ("route", "body", "kind"),
    [
        ("/checkpoints", {"variant": "fp16", "profile": {"steps": 6, "vae": "tiny"}}, "checkpoint"),
        ("/vaes", {"family": "sdxl"}, "vae"),
        ("/motions", {"profile": {"acceleration": "animatelcm-lora"}}, "motion"),
        ("/adapters", {}, "style"),
        ("/adapters", {"kind": "acceleration", "family": "sdxl"}, "acceleration"),
        ("/adapters", {"source": f"hf:latent-consistency/lcm-lora-sdxl@{COMMIT}"}, "acceleration"),
    ],
)
def test_a_model_is_asked_for_and_followed(api: Api, route: str, body: dict[str, Any], kind: str) -> None:
    answer = api.http.post(route, json={"name": "new", "source": SOURCE, **body})
    assert answer.status_code == 202, answer.text
    made = answer.json()
    assert (made["kind"], made["state"], made["finished_at"]) == (kind, "waiting", None)
    assert answer.headers["location"] == f"/api/v1/registrations/{made['id']}"
    assert api.http.get(f"/registrations/{made['id']}").json() == made
    assert [one["id"] for one in api.http.get("/registrations").json()["items"]] == [made["id"]]
    assert made["project"] is None
    problem_of(api.http.post(route, json={"name": "new", "source": SOURCE}), 409, "conflict")
    ended = api.http.post(f"/registrations/{made['id']}/cancel").json()
    assert (ended["state"], ended["reason"]) == ("refused", "cancelled")
    assert api.http.post(f"/registrations/{made['id']}/cancel").json() == ended


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"source": "hf:owner/name"}, "source", "pin it"),
        ({"source": "hf:owner/name@main"}, "source", "never a branch or a tag"),
        ({"source": "/etc/passwd"}, "source", "is no source"),
        ({"source": "http://169.254.169.254/latest"}, "source", "is no source"),
        ({"source": f"{SOURCE}/../x"}, "source", "may not hold empty parts"),
        ({"name": "a/b"}, "name", "pattern"),
        ({"name": "moss", "surprise": 1}, "surprise", "unknown field"),
        ({"profile": {"steps": 0}}, "profile.steps", "greater than"),
        ({"profile": {"colour": "red"}}, "profile.colour", "unknown field"),
        ({"variant": "../x"}, "variant", "pattern"),
        ({"project": "cracsk"}, "project", "there is no project named cracsk; did you mean cracks?"),
        ({"project": "../x"}, "project", "pattern"),
    ],
)
def test_what_is_wrong_at_once(api: Api, body: dict[str, Any], field: str, words: str) -> None:
    answer = api.http.post("/checkpoints", json={"name": "new", "source": SOURCE, **body})
    (found,) = problem_of(answer, 422, "invalid-request")["problems"]
    assert found["field"] == field
    assert words in found["problem"]
    assert api.http.get("/registrations").json()["items"] == []


@pytest.mark.parametrize(
    "source",
    [
        "http://169.254.169.254/x", "https://example.com/x", "https://huggingface.co/owner/name", "http://2852039166/x",
        "http://0xa9fea9fe/x", "//example.com/x", "ftp://example.com/x", "file:///etc/passwd", "local:x",
        "HF:owner/name", "S3://models/x", "s3:/models/x", "s3://169.254.169.254/x", "s3://127.0.0.1/x", "s3://localhost:9000/x",
        "s3://[::1]/x", "s3://user:word@host/x", "s3://models#@host/x", "s3://models\\@host/x", "s3://a..b/x", "s3:///x",
        f"hf://owner/name@{COMMIT}", f"hf:https://example.com/name@{COMMIT}", f"hf:example.com:80/name@{COMMIT}",
        f"hf:../name@{COMMIT}", f"hf:owner/..@{COMMIT}", f"hf:owner/n\u0430me@{COMMIT}", f"hf:owner/name?x=@{COMMIT}",
        f"hf:owner/name@{COMMIT}\n", f"hf:owner/name@{COMMIT}/%2e%2e/../x",
    ],
)  # fmt: skip
def test_a_source_names_no_host(source: str) -> None:
    """A hub source is a place on the hub that the worker is set to, an S3 source a bucket of the farm's own S3."""
    with pytest.raises(ValueError, match=r"is no|: "):
        sources.parse(source)


def test_names_in_use_and_words_of_their_own(api: Api) -> None:
    for name in ("crack-tiny", "moss"):
        problem_of(api.http.post("/checkpoints", json={"name": name, "source": SOURCE}), 409, "conflict")
    problem_of(api.http.post("/vaes", json={"name": "tiny", "source": SOURCE}), 409, "conflict")


def test_only_admins_register(api: Api) -> None:
    with api.client(api.new_key("jobs:read", "jobs:write")) as mere:
        for route in ("/checkpoints", "/vaes", "/adapters"):
            problem_of(mere.post(route, json={"name": "new", "source": SOURCE}), 403, "forbidden")
        problem_of(mere.get("/registrations"), 403, "forbidden")
    problem_of(api.http.get(f"/registrations/{new_id()}"), 404, "not-found")


def test_vaes_are_listed_and_named_by_jobs(api: Api) -> None:
    answer = api.http.post(
        "/vaes", json={"name": "small", "source": SOURCE, "family": "crack-tiny", "project": "cracks"}
    )
    assert answer.json()["project"] == "cracks"
    found = FoundModel("9" * 64, "crack-tiny", 5, (), {"tiny": True}, {"source": SOURCE, "revision": COMMIT})
    with api.database.transaction() as conn:
        claim = registrations.claim(conn, worker=new_id(), settings=api.settings)
        assert claim is not None
        assert str(claim.id) == answer.json()["id"]
        registrations.publish(conn, claim, found, [], api.settings)
    try:
        (view,) = api.http.get("/vaes").json()["items"]
        assert (view["name"], view["tiny"], view["source"]["revision"]) == ("small", True, COMMIT)
        assert (view["project"], "project_id" in view) == ("cracks", False)
        with api.client(api.new_key("jobs:read", project="strangers")) as stranger:
            assert stranger.get("/vaes").json()["items"] == []
        for wanted, expected in (("tiny", "small"), ("small", "small"), ("own", None)):
            job = api.http.post("/jobs", json={"prompt": "a crack", "vae": wanted}).json()
            assert job["vae"] == expected
        refused = api.http.post("/jobs", json={"prompt": "a crack", "checkpoint": "big", "vae": "small"})
        (problem,) = [one for one in problem_of(refused, 422, "invalid-request")["problems"] if one["field"] == "vae"]
        assert "decodes latents of crack-tiny" in problem["problem"]
    finally:
        with api.database.transaction() as conn:
            conn.execute(text("DELETE FROM models WHERE name = 'small'"))


def test_motion_adapters_are_listed_and_named_by_jobs(api: Api) -> None:
    answer = api.http.post("/motions", json={"name": "wind", "source": SOURCE})
    found = FoundModel("8" * 64, "crack-tiny", 5, (), {"max_frames": 8}, {"source": SOURCE, "revision": COMMIT})
    with api.database.transaction() as conn:
        claim = registrations.claim(conn, worker=new_id(), settings=api.settings)
        assert claim is not None
        assert str(claim.id) == answer.json()["id"]
        registrations.publish(conn, claim, found, [], api.settings)
    try:
        (view,) = api.http.get("/motions").json()["items"]
        assert (view["name"], view["max_frames"], view["acceleration"]) == ("wind", 8, None)
        job = api.http.post("/jobs", json={"prompt": "a crack", "motion": "wind", "frames": 4}).json()
        assert (job["motion"], job["frames"], job["fps"], job["acceleration"]) == ("wind", 4, 8, "lcm-lora")
        refused = api.http.post("/jobs", json={"prompt": "a crack", "motion": "wind"})
        (problem,) = problem_of(refused, 422, "invalid-request")["problems"]
        assert problem == {"field": "frames", "problem": "wind knows at most 8 frames, not 16"}
        refused = api.http.post("/jobs", json={"prompt": "a crack", "checkpoint": "big", "motion": "wind"})
        problems = problem_of(refused, 422, "invalid-request")["problems"]
        assert any(one["field"] == "motion" and "is made for crack-tiny" in one["problem"] for one in problems)
    finally:
        with api.database.transaction() as conn:
            conn.execute(text("DELETE FROM models WHERE name = 'wind'"))
