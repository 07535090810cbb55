"""Pictures sent over the API: checked, stored once, listed, named by jobs, and let go of."""

import hashlib
import io
from datetime import timedelta
from threading import Thread
from typing import Any
from uuid import uuid4

import httpx
import numpy as np
import pytest
from PIL import Image
from sqlalchemy import text

from farm import uploads
from farm.errors import Unavailable
from farm.maintenance import Sweeper
from farm.objects import upload_key
from farm.settings import Settings
from farm.storage import Store
from tests.api.conftest import Api, problem_of

PNG = {"Content-Type": "image/png"}


def png(mark: int = 0, size: tuple[int, int] = (128, 128), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(mark).integers(0, 256, (size[1], size[0], 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def send(api: Api, data: bytes, client: httpx.Client | None = None) -> str:
    answer = (client or api.http).post("/uploads", content=data, headers=PNG)
    assert answer.status_code in {200, 201}, answer.text
    return str(answer.json()["hash"])


def project_of(api: Api) -> Any:
    with api.database.transaction() as conn:
        return conn.execute(text("SELECT id FROM projects WHERE name = 'cracks'")).scalar_one()


def key_of(api: Api, hash_: str) -> str:
    return upload_key(project_of(api), hash_)


def rows(api: Api, table: str) -> int:
    with api.database.transaction() as conn:
        count: int = conn.execute(text(f"SELECT count(*) FROM {table}")).scalar_one()
    return count


@pytest.mark.parametrize(("kind", "media"), [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp")])
def test_a_picture_is_stored_once_under_its_hash(api: Api, kind: str, media: str) -> None:
    data = png(1, (96, 64), kind)
    answer = api.http.post("/uploads", content=data, headers={"Content-Type": media})
    assert answer.status_code == 201
    sent = answer.json()
    assert (sent["hash"], sent["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    assert (sent["media_type"], sent["width"], sent["height"]) == (media, 96, 64)
    assert answer.headers["location"] == f"/api/v1/uploads/{sent['hash']}"
    assert Store(api.settings).get(key_of(api, sent["hash"])) == data
    again = api.http.post("/uploads", content=data, headers={"Content-Type": media})
    assert (again.status_code, again.json()["created_at"]) == (200, sent["created_at"])
    assert again.json()["used_at"] > sent["used_at"]
    assert api.http.get(f"/uploads/{sent['hash']}").json() == again.json()
    assert (rows(api, "uploads"), rows(api, "doomed_objects")) == (1, 0)


def test_they_are_listed_page_by_page_and_belong_to_one_project(api: Api) -> None:
    hashes = sorted(send(api, png(mark)) for mark in range(5))
    first = api.http.get("/uploads", params={"limit": 3}).json()
    second = api.http.get("/uploads", params={"limit": 3, "cursor": first["next_cursor"]}).json()
    assert [one["hash"] for one in first["items"] + second["items"]] == hashes
    assert second["next_cursor"] is None
    with api.client(api.new_key(project="others")) as other:
        assert other.get("/uploads").json()["items"] == []
        problem_of(other.get(f"/uploads/{hashes[0]}"), 404, "not-found")
        problem_of(other.delete(f"/uploads/{hashes[0]}"), 404, "not-found")
        assert send(api, png(0), other) in hashes
    assert rows(api, "uploads") == 6
    with api.client(api.new_key("jobs:read")) as reader:
        problem_of(reader.post("/uploads", content=png(), headers=PNG), 403, "forbidden")


def test_what_is_no_picture_is_refused_and_leaves_nothing(api: Api) -> None:
    large = png(2, (2048, 64))
    for content, headers, status, code in (
        (b"", PNG, 422, "invalid-request"),
        (b"GIF89a", PNG, 422, "invalid-request"),
        (png()[:-1], PNG, 422, "invalid-request"),
        (png() + b"PK", PNG, 422, "invalid-request"),
        (png(), {"Content-Type": "image/webp"}, 422, "invalid-request"),
        (png(), {"Content-Type": "image/gif"}, 415, "unsupported-media-type"),
        (png(), {}, 415, "unsupported-media-type"),
        (png(), {**PNG, "Content-Encoding": "gzip"}, 415, "unsupported-media-type"),
        (bytes(api.settings.max_image_bytes + 1), PNG, 413, "too-large"),
        (large, PNG, 413, "too-large"),
    ):
        problem_of(api.http.post("/uploads", content=content, headers=headers), status, code)
    for hash_ in ("x", "A" * 64, "a" * 63):
        problem_of(api.http.get(f"/uploads/{hash_}"), 422, "invalid-request")
    assert (rows(api, "uploads"), rows(api, "doomed_objects")) == (0, 0)


def test_many_at_once_store_one(api: Api) -> None:
    data = png(3)
    seen: list[int] = []
    threads = [
        Thread(target=lambda: seen.append(api.http.post("/uploads", content=data, headers=PNG).status_code))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(seen) == 8
    assert set(seen) <= {200, 201}
    assert (rows(api, "uploads"), rows(api, "doomed_objects")) == (1, 0)


def sweeper(api: Api, **changes: timedelta) -> Sweeper:
    given = {"keep_uploads": timedelta(0), "keep_deleted": timedelta(0), **changes}
    return Sweeper(api.settings.model_copy(update=given), api.database, Store(api.settings))


def test_what_nobody_uses_goes_after_its_time(api: Api) -> None:
    hash_ = send(api, png(4))
    sweeper(api, keep_uploads=timedelta(days=1)).uploads()
    assert rows(api, "uploads") == 1
    duties = sweeper(api)
    duties.uploads()
    assert rows(api, "uploads") == 0
    duties.objects()
    assert not duties.store.exists(key_of(api, hash_))
    assert send(api, png(4)) == hash_


def test_deleting_one(api: Api) -> None:
    hash_ = send(api, png(5))
    assert api.http.delete(f"/uploads/{hash_}").status_code == 204
    problem_of(api.http.delete(f"/uploads/{hash_}"), 404, "not-found")
    assert send(api, png(5)) == hash_, "sent again before its object went"
    duties = sweeper(api)
    duties.objects()
    assert duties.store.exists(key_of(api, hash_))


class Dies(Store):
    """A store whose process dies as the picture is there, before anybody knows."""

    def put(self, key: str, data: Any, content_type: str, sha256: str) -> None:
        super().put(key, data, content_type, sha256)
        raise KeyboardInterrupt


def test_a_crash_halfway_leaves_nothing_for_good(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "PATIENCE", timedelta(0))
    with pytest.raises(KeyboardInterrupt):
        uploads.add(api.database, Dies(api.settings), api.settings, project_of(api), png(6), "image/png")
    key = key_of(api, hashlib.sha256(png(6)).hexdigest())
    duties = sweeper(api)
    assert duties.store.exists(key)
    duties.objects()
    assert not duties.store.exists(key)


class Raced(Store):
    """A store beside which a sweeper deletes what no row names yet."""

    def __init__(self, settings: Settings, duties: Sweeper, times: int) -> None:
        super().__init__(settings)
        self.duties, self.times = duties, times

    def put(self, key: str, data: Any, content_type: str, sha256: str) -> None:
        super().put(key, data, content_type, sha256)
        if self.times:
            self.times -= 1
            self.duties.objects()


def test_a_sweeper_that_is_too_quick_makes_it_send_again(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "PATIENCE", timedelta(0))
    duties = sweeper(api)
    project = project_of(api)
    sent, new = uploads.add(api.database, Raced(api.settings, duties, 1), api.settings, project, png(7), "image/png")
    assert new
    assert duties.store.exists(upload_key(project, sent.hash))
    with pytest.raises(Unavailable, match="as fast as it was stored"):
        uploads.add(api.database, Raced(api.settings, duties, 9), api.settings, project, png(8), "image/png")
    assert rows(api, "uploads") == 1
    problem_of(api.http.get(f"/uploads/{uuid4().hex * 2}"), 404, "not-found")
