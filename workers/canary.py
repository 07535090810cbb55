"""The canary: one known picture, rendered before any work and compared with what this device rendered before.

A device that went bad often renders on, only wrongly. The first run on a machine leaves its hash in the cache folder;
later runs must give the same for the same device, number type, thread count and library versions.
"""

import hashlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

import structlog

from farm.settings import Settings

LIBRARIES = ("torch", "diffusers", "transformers", "numpy")

log = structlog.get_logger(__name__)


class Canary(Protocol):
    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    def canary(self, checkpoint: str) -> bytes: ...


def sings(renderer: Canary, checkpoint: str, settings: Settings) -> str | None:
    """Render the canary with a checkpoint (content hash) and compare.

    Answers None when all is well, else what is wrong, for a person to read.
    """
    found = renderer.canary(checkpoint).hex()
    threads = (settings.threads, os.cpu_count())
    libraries = [_version(library) for library in LIBRARIES]
    about = (checkpoint, platform.node(), renderer.device, renderer.dtype, threads, libraries)
    folder = settings.cache_dir.expanduser() / "canaries"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha256(repr(about).encode()).hexdigest()[:32]
    try:
        expected = path.read_text()
    except FileNotFoundError:
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(found)
        unfinished.rename(path)
        log.info("canary recorded", device=renderer.device, dtype=renderer.dtype)
        return None
    if found == expected:
        return None
    return (
        f"{renderer.device} ({renderer.dtype}) rendered the canary as {found[:16]}, which used to be {expected[:16]}; "
        f"the device is broken, or its driver was changed on purpose: then remove {path}"
    )


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""
