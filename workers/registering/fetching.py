"""Getting the files of a model to this disk: from the hub, from S3, or as somebody sent them.

What is wanted is chosen from the listing before a byte is fetched, and only safetensors and small text files ever are.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from farm.errors import IntegrityFailed, InvalidModel, NotFound, Unavailable
from farm.modelchoice import choose
from farm.modelkinds import ModelKind
from farm.settings import Settings
from farm.sources import Source
from farm.storage import Store

MOST_FILES = 10_000
"""Files a folder may list; a model has a few dozen."""
SPARE = 2
"""Times its size that a model needs on this disk: as fetched, and as a converted or linked copy."""
HUB_SECONDS = 30.0

Told = Callable[[int], None]
"""Told how many bytes there will be; raises to stop the fetch. Asked again before each file."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A file to fetch: what its server calls it, bytes, sha256 (hex) where the server knows it."""

    name: str
    bytes: int
    sha256: str | None = None


def fetch(
    source: Source, kind: ModelKind, wanted: Mapping[str, Any], folder: Path, settings: Settings, told: Told
) -> Path:
    """Fetch a model into `folder`; answers that folder, or the file where the model is one file.

    What an interrupted fetch left there is used again. Raises InvalidModel for what cannot be a model, Unavailable when
    a server is away or the disk is full, IntegrityFailed when other bytes arrive than were announced.
    """
    reader: _Hub | _Bucket = _Hub(source) if source.kind == "hub" else _Bucket(source, settings)
    listed = reader.listing()
    if len(listed) > MOST_FILES:
        raise InvalidModel(f"{source.text}: holds more than {MOST_FILES} files")
    chosen = _chosen(source, kind, wanted.get("variant"), listed)
    total = sum(listed[name].bytes for name in chosen)
    if total > settings.max_model_bytes:
        raise InvalidModel(f"{source.text}: {total} bytes are over the limit of {settings.max_model_bytes}")
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < SPARE * total:
        raise Unavailable(f"{source.text}: there is no room for {SPARE} times {total} bytes in {folder}")
    for name, inside in chosen.items():
        told(total)
        target = folder / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        _verify(target, listed[name], reader.fetch(listed[name], target))
    return folder / next(iter(chosen.values())) if len(chosen) == 1 else folder


def _chosen(source: Source, kind: ModelKind, variant: str | None, listed: Mapping[str, Remote]) -> dict[str, str]:
    """Path below the source -> path on this disk."""
    if source.is_file:
        if not listed:
            raise InvalidModel(f"{source.text}: there is no such file")
        return {name: Path(name).name for name in listed}
    if not listed:
        raise InvalidModel(f"{source.text}: there is nothing")
    try:
        chosen = choose({name: remote.bytes for name, remote in listed.items()}, kind, variant)
    except InvalidModel as error:
        raise InvalidModel(f"{source.text}: {error.message}") from error
    # One adapter file keeps its own name here, so that a refusal names what a person knows.
    return {name: Path(name).name for name in chosen} if len(chosen) == 1 else chosen


def _verify(target: Path, remote: Remote, found: str | None) -> None:
    if target.stat().st_size != remote.bytes:
        raise IntegrityFailed(f"{remote.name}: {target.stat().st_size} bytes arrived, {remote.bytes} were announced")
    if remote.sha256 is None:
        return
    if found is None:
        with target.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != remote.sha256:
        target.unlink()
        raise IntegrityFailed(f"{remote.name}: has sha256 {found}, {remote.sha256} was announced")


class _Bucket:
    """A prefix or key in S3, reached with the farm's own credentials."""

    def __init__(self, source: Source, settings: Settings) -> None:
        self._store = Store(settings.model_copy(update={"s3_bucket": source.place}))
        self._source = source

    def listing(self) -> dict[str, Remote]:
        path = self._source.path
        prefix = path if self._source.is_file else f"{path}/"
        try:
            # A bucket that is not there is an outage to the farm's own store, and a wrong name here.
            self._store.check()
            found = self._store.listing(prefix, MOST_FILES)
        except NotFound as error:
            raise InvalidModel(f"{self._source.text}: there is no bucket {self._source.place}") from error
        if self._source.is_file:
            return {Path(path).name: Remote(path, found[path])} if path in found else {}
        return {key.removeprefix(prefix): Remote(key, size) for key, size in found.items() if not key.endswith("/")}

    def fetch(self, remote: Remote, target: Path) -> str:
        return self._store.download(remote.name, target)


class _Hub:
    """A Hugging Face hub repository at a commit. `HF_ENDPOINT` and `HF_TOKEN` mean what they mean to its library."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._endpoint = os.environ.get("HF_ENDPOINT") or None

    def listing(self) -> dict[str, Remote]:
        source = self._source
        with _translated(source):
            info = HfApi(endpoint=self._endpoint).model_info(
                source.place, revision=source.revision, files_metadata=True, timeout=HUB_SECONDS
            )
        if info.sha != source.revision:
            raise InvalidModel(f"{source.text}: the hub answered for commit {info.sha}")
        remotes = {}
        for one in info.siblings or ():
            if one.size is None:
                raise Unavailable(f"{source.text}: the hub does not say how large {one.rfilename} is")
            remotes[one.rfilename] = Remote(one.rfilename, one.size, one.lfs.sha256 if one.lfs else None)
        if source.is_file:
            return {Path(source.path).name: remotes[source.path]} if source.path in remotes else {}
        prefix = f"{source.path}/" if source.path else ""
        return {name.removeprefix(prefix): one for name, one in remotes.items() if name.startswith(prefix)}

    def fetch(self, remote: Remote, target: Path) -> None:
        with _translated(self._source):
            # Beside the target, so that the library finds and resumes what it had begun.
            got = hf_hub_download(
                self._source.place,
                remote.name,
                revision=self._source.revision,
                local_dir=target.parent / ".hub",
                endpoint=self._endpoint,
                etag_timeout=HUB_SECONDS,
            )
        Path(got).replace(target)


@contextmanager
def _translated(source: Source) -> Iterator[None]:
    """The hub's errors as the farm's own."""
    try:
        yield
    except GatedRepoError as error:
        raise InvalidModel(f"{source.text}: this repository is gated; accept its terms, then set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise InvalidModel(f"{source.text}: the repository has no such commit") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise Unavailable(f"{source.text}: the hub cannot be reached: {error}"[:500]) from error
    except RepositoryNotFoundError as error:
        raise InvalidModel(
            f"{source.text}: there is no such repository, or it is private; then set HF_TOKEN"
        ) from error
    except (EntryNotFoundError, HFValidationError) as error:
        raise InvalidModel(f"{source.text}: {error}"[:500]) from error
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise Unavailable(f"{source.text}: the hub does not answer: {error}"[:500]) from error
