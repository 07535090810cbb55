"""Models on the worker's disk: verified, whole or absent, within their budget."""

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from farm import catalogue
from farm.catalogue import ModelFile
from farm.errors import IntegrityFailed, InvalidModel, NotFound
from farm.settings import Settings
from farm.storage import Store
from workers.modelstore import ModelStore


class Models:
    """A catalogue of files in the real store, and a model store that reads it."""

    def __init__(self, settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings, self.store = settings, store
        self.registered: dict[str, list[ModelFile]] = {}
        self.downloads = 0
        monkeypatch.setattr(catalogue, "files", self._files)
        real = store.download

        def counted(key: str, path: Path) -> str:
            self.downloads += 1
            return real(key, path)

        monkeypatch.setattr(store, "download", counted)

    def _files(self, _conn: object, content_hash: str) -> list[ModelFile]:
        if content_hash not in self.registered:
            raise NotFound
        return self.registered[content_hash]

    def add(self, files: dict[str, bytes]) -> str:
        content_hash = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
        listed = []
        for path, data in files.items():
            sha256 = hashlib.sha256(data).hexdigest()
            self.store.put(f"models/{sha256}", data, "application/octet-stream", sha256)
            listed.append(ModelFile(path, f"models/{sha256}", sha256, len(data)))
        self.registered[content_hash] = listed
        return content_hash

    def cache(self, **changes: object) -> ModelStore:
        database = SimpleNamespace(transaction=NoTransaction)
        return ModelStore(database, self.store, self.settings.model_copy(update=changes))  # type: ignore[arg-type]


class NoTransaction:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def models(settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch) -> Models:
    return Models(settings, store, monkeypatch)


def test_a_folder_is_fetched_once_and_a_single_file_is_answered_as_a_file(models: Models) -> None:
    folder = models.add({"model_index.json": b"{}", "unet/weights.safetensors": b"w" * 1000})
    single = models.add({"lora.safetensors": b"l" * 100})
    cache = models.cache()
    for _ in range(2):
        found = cache.fetch(folder)
        assert (found / "unet" / "weights.safetensors").read_bytes() == b"w" * 1000
        assert cache.fetch(single).read_bytes() == b"l" * 100
    assert models.downloads == 3


def test_other_bytes_than_registered_are_refused_and_leave_nothing(models: Models, settings: Settings) -> None:
    bad = models.add({"lora.safetensors": b"good"})
    listed = models.registered[bad][0]
    models.registered[bad] = [ModelFile(listed.path, listed.key, "0" * 64, listed.bytes)]
    with pytest.raises(IntegrityFailed, match=r"lora\.safetensors"):
        models.cache().fetch(bad)
    assert [path for path in (settings.cache_dir / "models").iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("path", ["../escape", "/etc/passwd", "a/../../b", ""])
def test_no_file_may_leave_its_folder(models: Models, path: str) -> None:
    evil = models.add({"fine": b"x"})
    listed = models.registered[evil][0]
    models.registered[evil] = [ModelFile(path, listed.key, listed.sha256, listed.bytes)]
    with pytest.raises(InvalidModel):
        models.cache().fetch(evil)


@pytest.mark.parametrize("name", ["", "../x", "A" * 64, "a" * 63])
def test_only_content_hashes_are_fetched(models: Models, name: str) -> None:
    with pytest.raises(InvalidModel):
        models.cache().fetch(name)


def test_many_who_ask_at_once_share_one_download(models: Models) -> None:
    wanted = models.add({"a": os.urandom(200_000), "b": os.urandom(200_000)})
    with ThreadPoolExecutor(8) as threads:
        places = set(threads.map(lambda _: models.cache().fetch(wanted), range(8)))
    assert len(places) == 1
    assert models.downloads == 2


def test_the_least_recently_used_goes_first_but_never_one_just_fetched(models: Models) -> None:
    old, used, new, newer = (models.add({"f": bytes([n]) * 1000}) for n in range(4))
    cache = models.cache(cache_budget_bytes=2000)
    places = {name: cache.fetch(name).parent for name in (old, used)}
    day_ago = time.time() - 86400
    for name in (old, used):
        os.utime(places[name], (day_ago, day_ago))
    cache.fetch(used)
    places[new] = cache.fetch(new).parent
    assert {name for name, place in places.items() if place.exists()} == {used, new}
    places[newer] = cache.fetch(newer).parent
    assert all(places[name].exists() for name in (used, new, newer)), "those may be about to be read"
