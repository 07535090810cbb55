"""Checkpoints and adapters on this machine's disk: fetched from S3 once, verified, kept within a budget.

Processes share the folder. A model appears under its content hash by one rename, so whatever is there is whole.
"""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from time import time
from uuid import uuid4

import structlog

from farm import catalogue
from farm.catalogue import ModelFile
from farm.db import Database
from farm.errors import IntegrityFailed, InvalidModel, Unavailable
from farm.settings import Settings
from farm.storage import Store

STALE_SECONDS = 24 * 3600
"""A half-fetched model untouched this long belongs to a process that died."""

log = structlog.get_logger(__name__)


class ModelStore:
    """`fetch(hash)` answers a verified local copy. Threads and processes may ask for the same model at once."""

    def __init__(self, database: Database, store: Store, settings: Settings) -> None:
        self._database = database
        self._store = store
        self._budget = settings.cache_budget_bytes
        # A model fetched within this time may be about to be read, so it is never the one to go.
        self._settle = settings.limit_load.total_seconds()
        self._root = settings.cache_dir.expanduser() / "models"
        self._root.mkdir(parents=True, exist_ok=True)

    def fetch(self, content_hash: str) -> Path:
        """The folder of a model, or the file of a model that is a single file.

        Raises NotFound for an unknown hash, IntegrityFailed when S3 holds other bytes than were registered, Unavailable
        when Postgres or S3 is away or the disk is full.
        """
        place = self._root / _name(content_hash)
        # The lock lives beside the folder: one process fetches, the others wait and find it.
        with self._locked(place.name):
            if not place.is_dir():
                with self._database.transaction() as conn:
                    files = catalogue.files(conn, content_hash)
                self._make_room(sum(file.bytes for file in files))
                self._download(files, place)
            os.utime(place)
        return _entry(place)

    def adopt(self, content_hash: str, files: Iterable[tuple[str, Path]]) -> None:
        """Take over verified files that are on this disk already: (path in the model, where it lies). They are linked
        or copied, so the originals may go."""
        place = self._root / _name(content_hash)
        with self._locked(place.name):
            if place.is_dir():
                return
            unfinished = self._root / f"{place.name}.{uuid4().hex[:8]}.part"
            try:
                for inside, source in files:
                    target = unfinished / _inside(inside)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _link(source, target)
                unfinished.rename(place)
            except OSError as error:
                raise Unavailable(f"model {place.name} could not be kept in {self._root}: {error}") from error
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)

    def _download(self, files: Sequence[ModelFile], place: Path) -> None:
        unfinished = self._root / f"{place.name}.{uuid4().hex[:8]}.part"
        try:
            for file in files:
                target = unfinished / _inside(file.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                found = self._store.download(file.key, target)
                if found != file.sha256:
                    raise IntegrityFailed(f"{file.path} of model {place.name}: S3 holds {found}, not {file.sha256}")
            log.info("model fetched", model=place.name, files=len(files), bytes=sum(file.bytes for file in files))
            unfinished.rename(place)
        except OSError as error:
            raise Unavailable(f"model {place.name} could not be kept in {self._root}: {error}") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _make_room(self, wanted: int) -> None:
        """Drop least recently used models until `wanted` bytes fit the budget."""
        with self._locked("room"):
            kept = []
            for place in self._root.iterdir():
                age = time() - place.stat().st_mtime
                if place.suffix == ".part" and age > STALE_SECONDS:
                    shutil.rmtree(place, ignore_errors=True)
                elif place.is_dir() and place.suffix != ".part":
                    kept.append((age, _bytes(place), place))
            total = sum(size for _, size, _ in kept)
            for age, size, place in sorted(kept, reverse=True):
                if total + wanted <= self._budget:
                    return
                if age <= self._settle:
                    break
                gone = place.rename(self._root / f"{place.name}.{uuid4().hex[:8]}.part")
                shutil.rmtree(gone, ignore_errors=True)
                total -= size
                log.info("model dropped from the disk", model=place.name, bytes=size)
            if total + wanted > self._budget:
                log.warning("models in use pass the disk budget", bytes=total + wanted, budget=self._budget)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self._root / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _name(content_hash: str) -> str:
    if len(content_hash) != 64 or not set(content_hash) <= set("0123456789abcdef"):
        raise InvalidModel(f"{content_hash!r} is no content hash")
    return content_hash


def _inside(path: str) -> PurePosixPath:
    """A path that stays below its folder."""
    inside = PurePosixPath(path)
    if inside.is_absolute() or ".." in inside.parts or not inside.parts:
        raise InvalidModel(f"a model may not hold a file at {path!r}")
    return inside


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Another file system, or one without hard links.
        shutil.copyfile(source, target)


def _entry(place: Path) -> Path:
    found = list(place.iterdir())
    return found[0] if len(found) == 1 and found[0].is_file() else place


def _bytes(place: Path) -> int:
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
