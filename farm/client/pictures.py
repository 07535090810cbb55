"""Pictures on disk: what a file is called, when it is already there, and how it gets there whole."""

import hashlib
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Self

import orjson

from farm.client import calls
from farm.client.flows import Block, Flow, request
from farm.errors import IntegrityFailed, NotFound
from farm.views import JobView, UploadView

MANIFEST = "manifest.ndjson"
"""One line for each picture in the folder: `file`, `sha256`, `bytes`, the job's id, labels and recipe fields."""


@dataclass(frozen=True)
class Saved:
    """A picture on disk. `fetched` is false when an earlier run had left it there already."""

    job: JobView
    path: Path
    fetched: bool


@dataclass(frozen=True)
class Downloaded:
    """What a download left in `folder`: pictures fetched now, and pictures that were there already."""

    folder: Path
    manifest: Path
    fetched: int
    kept: int

    @property
    def pictures(self) -> int:
        return self.fetched + self.kept


def file_name(job: JobView) -> str:
    """`NNNNNN-<seed>.png` (or `.webp`, `.jpg`): the job's number in its batch, then its seed.

    Sorted by name, the pictures of a batch stand in the order they were submitted in.
    """
    return f"{job.number:06d}-{job.seed}.{job.suffix}"


def send(picture: Path | str | bytes, random: Random) -> Flow[UploadView]:
    """Read a picture and send it. Raises InvalidRequest for what is no picture."""
    data = yield Block(lambda: calls.bytes_of(picture))
    sent: UploadView = yield from request(calls.upload(data), random)
    return sent


def picture(job: JobView, random: Random) -> Flow[bytes]:
    """The stored picture of a succeeded job, as its sha256 proves. Raises NotFound or Conflict when it has none."""
    link = yield from request(calls.image_link(job.id), random)
    body: bytes = yield from request(calls.fetch(link.url), random)
    if hashlib.sha256(body).hexdigest() != link.sha256:
        raise IntegrityFailed(f"the picture of job {job.id} arrived with another content than was stored; fetch again")
    return body


def with_picture(job: JobView, random: Random) -> Flow[tuple[JobView, bytes]]:
    """A job beside its picture."""
    body = yield from picture(job, random)
    return job, body


def save(job: JobView, path: Path, random: Random) -> Flow[Saved]:
    """Leave the job's picture at `path`, fetching it only if what is there is not it already."""
    if job.image is None:
        raise NotFound(f"job {job.id} is {job.state} and has no picture")
    sha256 = job.image.sha256
    there: bool = yield Block(lambda: holds(path, sha256))
    if not there:
        body = yield from picture(job, random)
        yield from _replace(path, body)
    return Saved(job, path, fetched=not there)


def _replace(path: Path, body: bytes) -> Generator[Block[None], Any, None]:
    def write() -> None:
        part = path.with_name(path.name + ".part")
        part.write_bytes(body)
        part.replace(path)

    yield Block(write)


def holds(path: Path, sha256: str) -> bool:
    """Whether a file is there with this content."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except FileNotFoundError:
        return False


class Download:
    """One run into a folder. The manifest is written beside its final place and put there once it is complete."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest = self.folder / MANIFEST
        self._part = self.folder / f"{MANIFEST}.part"
        self._fetched = self._kept = 0

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = self._part.open("wb")
        return self

    def path(self, job: JobView) -> Path:
        return self.folder / file_name(job)

    def add(self, saved: Saved) -> int:
        """Note a picture in the manifest; answers how many there are by now."""
        self._fetched += saved.fetched
        self._kept += not saved.fetched
        self._file.write(orjson.dumps(_entry(saved), option=orjson.OPT_APPEND_NEWLINE))
        return self._fetched + self._kept

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        if error is None:
            self._part.replace(self.manifest)

    def result(self) -> Downloaded:
        return Downloaded(self.folder, self.manifest, self._fetched, self._kept)


def _entry(saved: Saved) -> dict[str, Any]:
    job = saved.job.model_dump(mode="json", exclude={"state", "error", "image", "warnings"})
    image = saved.job.image
    return {"file": saved.path.name, "sha256": image and image.sha256, "bytes": image and image.bytes, **job}
