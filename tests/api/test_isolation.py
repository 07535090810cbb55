"""Projects do not see each other: over every route, in lists, keys of objects, presigned URLs and idempotency keys."""

import io
import re
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import httpx
import orjson
import pytest
from PIL import Image

from farm.objects import image_key
from tests.api.conftest import HEALTH, PROMPT, Api, made_up, operations, problem_of

FARM_WIDE = {"/version", "/workers", "/queue", "/checkpoints", "/adapters", "/vaes", "/controlnets", "/motions"}
"""Read by everybody: what can be named and how long queues are, by lane, without a word of whose they are."""
ADMIN = re.compile(r"/(keys|projects|registrations)\b")
NAME = re.compile(r"\b\w+_(?:id|hash)\b")
JSON = {"Content-Type": "application/json"}
BODIES: dict[str, Any] = {
    "/batches/batch_id/priority": {"priority": 7},
    "/webhooks/webhook_id": {"enabled": False, "url": "https://stranger.example/"},
}


class Tenants:
    """Two projects; the first has one of everything."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.batch = api.submit(3, labels={"of": "mine"})
        self.job = str(api.render(1)[0])
        self.webhook = api.http.post("/webhooks", json={"url": "https://receiver.example/"}).json()
        api.http.post(f"/webhooks/{self.webhook['id']}/ping")
        picture = io.BytesIO()
        Image.new("RGB", (8, 8), "red").save(picture, "PNG")
        sent = api.http.post("/uploads", content=picture.getvalue(), headers={"Content-Type": "image/png"})
        self.ids = {
            "job_id": self.job,
            "batch_id": self.batch["id"],
            "webhook_id": self.webhook["id"],
            "upload_hash": sent.json()["hash"],
        }
        self.secrets = [*self.ids.values(), PROMPT, self.webhook["url"], "mine"]
        key = api.new_key("jobs:read", "jobs:submit", "jobs:manage", project="strangers")
        self.stranger = api.client(key)

    def path(self, template: str) -> str:
        return NAME.sub(lambda name: self.ids.get(name[0], str(uuid4())), template)

    def rows(self) -> dict[str, list[Any]]:
        """All that the first project can see of its own."""
        paths = ("/jobs", "/batches", "/uploads", "/webhooks", f"/webhooks/{self.webhook['id']}/deliveries", "/project")
        documents = {path: self.api.http.get(path).json() for path in paths}
        for batch in documents["/batches"]["items"]:
            batch.pop("images_per_second")
            batch.pop("eta_seconds")
        return documents


@pytest.fixture
def tenants(api: Api) -> Any:
    made = Tenants(api)
    yield made
    made.stranger.close()


def tenant_operations(api: Api) -> list[tuple[str, str]]:
    found = [(method, path) for method, path in operations(api) if path not in HEALTH and not ADMIN.match(path)]
    assert len(found) > 30
    return found


def test_what_belongs_to_another_project_does_not_exist(tenants: Tenants) -> None:
    before = tenants.rows()
    ours = [(method, path) for method, path in tenant_operations(tenants.api) if NAME.search(path)]
    assert {name for _, path in ours for name in NAME.findall(path)} == set(tenants.ids)
    for method, path in ours:
        body = orjson.dumps(BODIES[path]) if path in BODIES and method != "GET" else None
        answer = tenants.stranger.request(method, tenants.path(path), content=body, headers=JSON if body else {})
        document = problem_of(answer, 404, "not-found")
        nobody = tenants.stranger.request(method, made_up(path), content=body, headers=JSON if body else {}).json()
        # Told apart by nothing but the id that was asked for.
        strip = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}|[0-9a-f]{64}")
        assert strip.sub("", document["detail"]) == strip.sub("", nobody["detail"])
    assert tenants.rows() == before


def test_lists_and_farm_wide_routes_tell_nothing_of_others(tenants: Tenants) -> None:
    for method, path in tenant_operations(tenants.api):
        if method != "GET" or NAME.search(path):
            continue
        answer = tenants.stranger.get(path)
        assert answer.status_code == 200, path
        assert not [secret for secret in tenants.secrets if secret in answer.text], path
        if path not in FARM_WIDE | {"/project"}:
            assert answer.json()["items"] == [], path
    for query in ("label=of=mine", f"cursor={'A' * 22}", "state=succeeded", "limit=500"):
        assert tenants.stranger.get(f"/jobs?{query}").json()["items"] == []
    assert tenants.stranger.get("/project").json()["use"]["queued_jobs"] == 0
    assert tenants.stranger.get("/project").json()["name"] == "strangers"


def test_only_admins_see_across_projects(tenants: Tenants) -> None:
    across = [(method, path) for method, path in operations(tenants.api) if ADMIN.match(path)]
    assert len(across) > 6
    for method, path in across:
        problem_of(tenants.stranger.request(method, tenants.path(path)), 403, "forbidden")


def test_idempotency_keys_are_each_projects_own(tenants: Tenants) -> None:
    headers = {"Idempotency-Key": "the same"}
    mine = tenants.api.http.post("/jobs", json={"prompt": PROMPT}, headers=headers)
    theirs = tenants.stranger.post("/jobs", json={"prompt": "something else"}, headers=headers)
    assert (mine.status_code, theirs.status_code) == (201, 201)
    assert mine.json()["id"] != theirs.json()["id"]
    assert "idempotency-replayed" not in theirs.headers
    again = tenants.stranger.post("/jobs", json={"prompt": "something else"}, headers=headers)
    assert again.json() == theirs.json()


def test_object_keys_begin_with_their_project() -> None:
    project, other, job = uuid4(), uuid4(), uuid4()
    key = image_key(project, job, 1, "a" * 64, "png")
    assert str(project) in key.split("/") or project.hex in key.split("/")
    assert key != image_key(other, job, 1, "a" * 64, "png")
    assert ".." not in key


def test_a_presigned_url_opens_one_object_and_cannot_be_bent(tenants: Tenants) -> None:
    link = tenants.api.http.get(f"/jobs/{tenants.job}/image?redirect=false").json()["url"]
    parts = urlsplit(link)
    # Nothing lies there in this test, so what is allowed is told apart from what is not by the status.
    assert httpx.get(link).status_code == 404
    key = parts.path
    for bent in (
        key.replace(tenants.job, str(uuid4())),
        key.rpartition("/")[0] + "/",
        key.replace("p/", "p/../q/", 1),
        key.replace("p/", "p/%2e%2e/q/", 1),
        f"{key}x",
        "/",
        "/" + key.split("/")[1],
    ):
        assert httpx.get(parts._replace(path=bent).geturl()).status_code in {400, 403}, bent
    for method in ("PUT", "DELETE", "POST"):
        assert httpx.request(method, link).status_code in {403, 405}
    assert httpx.get(link.replace("X-Amz-Expires=3600", "X-Amz-Expires=36000")).status_code == 403
    assert httpx.get(parts._replace(query="").geturl()).status_code == 403


def test_batches_and_webhooks_of_one_project_are_counted_for_it_alone(tenants: Tenants) -> None:
    tenants.api.http.patch(f"/projects/{tenants.api.http.get('/project').json()['id']}", json={"queued_jobs": 0})
    problem_of(tenants.api.http.post("/jobs", json={"prompt": PROMPT}), 429, "limit-reached")
    assert tenants.stranger.post("/jobs", json={"prompt": PROMPT}).status_code == 201
    UUID(tenants.stranger.post("/webhooks", json={"url": "https://stranger.example/"}).json()["id"])
    assert len(tenants.api.http.get("/webhooks").json()["items"]) == 1
