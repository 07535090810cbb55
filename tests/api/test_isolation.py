"""Projects do not see each other: over every route, in lists, keys of objects, presigned URLs and idempotency keys."""

import io
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import httpx
import orjson
import pytest
from PIL import Image
from sqlalchemy import text

from farm import catalogue, jobs, keys
from farm.modelfiles import FoundModel
from farm.objects import image_key
from tests.api.conftest import HEALTH, PROFILE, PROMPT, Api, made_up, operations, problem_of

FARM_WIDE = {"/version", "/workers", "/queue", "/checkpoints", "/adapters", "/vaes", "/controlnets", "/motions"}
"""Read by everybody: what can be named and how long queues are, by lane, without a word of whose they are."""
MODELS = ("/checkpoints", "/adapters", "/vaes", "/controlnets", "/motions")
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
        self.picture = picture.getvalue()
        sent = api.http.post("/uploads", content=self.picture, headers={"Content-Type": "image/png"})
        self.uploaded = sent.json()["hash"]
        self.ids = {
            "job_id": self.job,
            "batch_id": self.batch["id"],
            "webhook_id": self.webhook["id"],
            "upload_hash": self.uploaded,
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


OURS = (
    ("ours-base", "1", "checkpoint", "crack-tiny", PROFILE),
    ("ours-fast", "2", "acceleration", "sdxl", {}),
    ("ours-moss", "3", "style", "crack-tiny", {}),
    ("ours-taesd", "4", "vae", "crack-tiny", {"tiny": True}),
    ("ours-edges", "5", "controlnet", "crack-tiny", {}),
    ("ours-wind", "6", "motion", "crack-tiny", {"max_frames": 8}),
)
"""Models of the first project: name, digit of the hash, kind, family, profile."""
HASHES = {name: mark * 64 for name, mark, *_ in OURS}


@pytest.fixture
def ours(tenants: "Tenants") -> Iterator[Callable[[], None]]:
    """Gives the first project one model of each kind. `big` has no LCM-LoRA but its."""
    database = tenants.api.database

    def give() -> None:
        with database.transaction() as conn:
            owner = keys.project_named(conn, "cracks")
            for name, mark, kind, family, profile in OURS:
                found = FoundModel(hash=mark * 64, family=family, bytes=1, files=(), profile=profile, source={})
                catalogue.publish(conn, name=name, kind=kind, found=found, project_id=owner)

    yield give
    with database.transaction() as conn:
        conn.execute(text("DELETE FROM models WHERE project_id IS NOT NULL"))


def naming(tenants: "Tenants") -> list[dict[str, Any]]:
    """A job for each way of getting one of these models: by its name, and without."""
    edges = {"name": "ours-edges", "image": tenants.uploaded, "weight": 1}
    wanted: tuple[dict[str, Any], ...] = (
        {"checkpoint": "ours-base"},
        {"checkpoint": "big"},
        {"adapters": [{"name": "ours-moss"}]},
        {"vae": "ours-taesd"},
        {"vae": "tiny"},
        {"controls": [edges]},
        {"motion": "ours-wind", "frames": 4},
    )
    return [{"prompt": PROMPT, "width": 128, "height": 128, **one} for one in wanted]


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


def test_models_of_another_project_do_not_exist(tenants: Tenants, ours: Callable[[], None]) -> None:
    stranger, rehearse = tenants.stranger, "/jobs?dry_run=true"
    picture = stranger.post("/uploads", content=tenants.picture, headers={"Content-Type": "image/png"}).json()
    assert picture["hash"] == tenants.uploaded, "what is refused is refused for the model"

    def told() -> list[Any]:
        """All that a stranger gets to hear."""
        answers = [stranger.post(rehearse, json=job) for job in naming(tenants)]
        answers.append(
            stranger.post("/batches", json={"defaults": {"checkpoint": "ours-bas"}, "jobs": [{"prompt": "x"}]})
        )
        answers.append(stranger.post("/jobs", json={"prompt": "x", "adapters": [{"name": "ours-mos"}]}))
        assert [answer.status_code for answer in answers] == [422] * len(answers)
        return [*(answer.json()["problems"] for answer in answers), *(stranger.get(path).json() for path in MODELS)]

    before = told()
    ours()
    assert told() == before
    admin = tenants.api.client(tenants.api.new_key(project="farm"))
    mate = tenants.api.client(tenants.api.new_key("jobs:read", "jobs:submit"))
    with admin, mate:
        for job in naming(tenants):
            assert mate.post(rehearse, json=job).status_code == 200, job
            # It sees them all, but its jobs are jobs of its project.
            assert admin.post(rehearse, json=job).status_code == 422, job
        for reader in (admin, mate):
            seen = {one["name"]: one["project"] for path in MODELS for one in reader.get(path).json()["items"]}
            assert {name for name, project in seen.items() if project == "cracks"} == set(HASHES)
            assert seen["moss"] is None


def test_workers_and_lanes_do_not_tell_names_of_others_models(tenants: Tenants, ours: Callable[[], None]) -> None:
    ours()
    job, worker = {"prompt": PROMPT, "checkpoint": "ours-base", "acceleration": "none"}, uuid4()
    assert tenants.api.http.post("/jobs", json=job).status_code == 201
    base, use = HASHES["ours-base"], [{"hash": HASHES["ours-moss"], "weight": 1.0}]
    warm = {"checkpoint": base, "adapters": use, "slots": use, "bytes": 1}
    warm |= {"controlnets": [{"hash": HASHES["ours-edges"]}], "motions": [{"hash": HASHES["ours-wind"]}]}
    rest = {"of": "checkpoint", "hash": base, "checkpoint": base, "failures": 3, "code": "x", "seconds": 9.0}
    with tenants.api.database.transaction() as conn:
        jobs.hello(conn, worker=worker, pool="default", host="here", pid=1, device="cpu", version="1")
        waiting = {"waiting": [{"checkpoint": base, "bytes": 1}]}
        jobs.tell(conn, worker=worker, state="idle", warm=[warm], cache=waiting, resting=[rest])
    for path, names in (("/queue", {"ours-base"}), ("/workers", set(HASHES) - {"ours-fast", "ours-taesd"})):
        mine, theirs = tenants.api.http.get(path).text, tenants.stranger.get(path).text
        assert {name for name in HASHES if name in mine} == names
        assert "ours-" not in theirs
        assert base in theirs


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
