"""Pictures are fetched from S3 by an address that the API gives."""

import hashlib
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import httpx

from farm.storage import Store
from tests.api.conftest import Api, keys_of, problem_of


def test_a_picture_and_its_thumbnail_are_fetched_without_a_key(api: Api) -> None:
    api.submit(1)
    (job_id,) = api.render(1)
    store = Store(api.settings)
    bodies = {"image": b"a picture", "thumbnail": b"a small one"}
    for key, body in zip(keys_of(job_id), bodies.values(), strict=True):
        store.put(key, body, "image/png", hashlib.sha256(body).hexdigest())
    try:
        for kind, body in bodies.items():
            moved = api.http.get(f"/jobs/{job_id}/{kind}")
            assert moved.status_code == 307
            assert moved.headers["cache-control"] == "no-store"
            got = httpx.get(moved.headers["location"])
            assert (got.status_code, got.content) == (200, body)
            assert str(job_id) in got.headers["content-disposition"]
            link = api.http.get(f"/jobs/{job_id}/{kind}?redirect=false")
            assert link.status_code == 200
            document = link.json()
            assert set(document) == {"url", "expires_at", "sha256"}
            assert document["sha256"] == ("a" if kind == "image" else "b") * 64
            assert httpx.get(document["url"]).content == body
            left = datetime.fromisoformat(document["expires_at"]) - datetime.now(UTC)
            assert timedelta(minutes=59) < left <= api.settings.presign_expiry
    finally:
        store.delete_many(keys_of(job_id))


def test_what_is_not_rendered_has_no_picture(api: Api) -> None:
    job = api.http.post("/jobs", json={"prompt": "x"}).json()
    for kind in ("image", "thumbnail"):
        document = problem_of(api.http.get(f"/jobs/{job['id']}/{kind}"), 404, "not-found")
        assert document["state"] == "queued"
        problem_of(api.http.get(f"/jobs/{uuid4()}/{kind}?redirect=false"), 404, "not-found")


def test_redirect_is_true_or_false(api: Api) -> None:
    for query in ("redirect=maybe", "redirct=false"):
        document = problem_of(api.http.get(f"/jobs/{uuid4()}/image?{query}"), 422, "invalid-request")
        assert document["problems"][0]["field"] == query.partition("=")[0]
