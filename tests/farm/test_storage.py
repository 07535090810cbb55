"""Objects in a real S3: checked on the way up, resumed on the way down, gone when deleted."""

import hashlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from farm.errors import NotFound, Unavailable
from farm.settings import Settings
from farm.storage import PART_BYTES, Store


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_what_was_put_is_got(store: Store) -> None:
    data = os.urandom(100_000)
    store.put("a/b", data, "image/png", sha256(data))
    assert store.get("a/b") == data
    assert store.exists("a/b")
    assert not store.exists("a/c")
    with pytest.raises(NotFound):
        store.get("a/c")


def test_the_server_refuses_bytes_that_are_not_what_was_announced(store: Store) -> None:
    with pytest.raises(Unavailable):
        store.put("a/b", b"other", "image/png", sha256(b"these"))
    assert not store.exists("a/b")


def test_files_go_up_whole_and_in_parts(store: Store, tmp_path: Path) -> None:
    for size in (1000, PART_BYTES + 1000):
        path = tmp_path / "model"
        path.write_bytes(os.urandom(size))
        wanted = sha256(path.read_bytes())
        store.put(f"m/{size}", path, "application/octet-stream", wanted)
        assert store.download(f"m/{size}", tmp_path / "copy") == wanted
        assert sha256((tmp_path / "copy").read_bytes()) == wanted
    store.delete_many([f"m/{PART_BYTES + 1000}"])


def test_a_broken_download_goes_on_where_it_broke(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(300_000)
    store.put("m/x", data, "application/octet-stream", sha256(data))
    real, asked = store._client.get_object, []

    def breaks_twice(**request: Any) -> Any:
        asked.append(request.get("Range"))
        answer = real(**request)
        if len(asked) <= 2:
            some = answer["Body"].read(100_000)

            def chunks(_size: int) -> Any:
                yield some
                raise ConnectionResetError("gone")

            answer["Body"] = SimpleNamespace(iter_chunks=chunks)
        return answer

    monkeypatch.setattr(store._client, "get_object", breaks_twice)
    assert store.download("m/x", tmp_path / "x") == sha256(data)
    assert (tmp_path / "x").read_bytes() == data
    assert asked == [None, "bytes=100000-", "bytes=200000-"]


def test_deleting_many_counts_missing_ones_as_deleted(store: Store) -> None:
    for n in range(3):
        store.put(f"d/{n}", b"x", "text/plain", sha256(b"x"))
    store.delete_many([f"d/{n}" for n in range(1200)])
    assert not any(store.exists(f"d/{n}") for n in range(3))
    store.delete_many([])


def test_anyone_may_fetch_a_presigned_url_under_its_file_name(store: Store) -> None:
    store.put("p/1", b"picture", "image/png", sha256(b"picture"))
    answer = httpx.get(store.presign("p/1", "räumlich 1.png", 60))
    assert answer.content == b"picture"
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-disposition"] == "inline; filename*=UTF-8''r%C3%A4umlich%201.png"


def test_presigned_urls_name_the_public_endpoint(settings: Settings) -> None:
    public = Store(settings.model_copy(update={"s3_public_endpoint_url": "https://pictures.example.org"}))
    assert public.presign("p/1", "1.png", 60).startswith(f"https://pictures.example.org/{settings.s3_bucket}/p/1?")


def test_the_bucket_is_made_once_and_missed_when_absent(settings: Settings, store: Store) -> None:
    store.ensure_bucket()
    store.check()
    with pytest.raises(NotFound):
        Store(settings.model_copy(update={"s3_bucket": "never-made"})).check()


def test_a_server_that_is_away_is_unavailable(settings: Settings) -> None:
    away = Store(settings.model_copy(update={"s3_endpoint_url": "http://127.0.0.1:9"}))
    with pytest.raises(Unavailable):
        away.check()
