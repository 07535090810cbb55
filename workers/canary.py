"""The canary: one known picture, rendered before any work and compared with what this device rendered before.

A device that went bad often renders on, only wrongly. The first run on a machine leaves its hash in the cache folder;
later runs must give the same for the same device, number type, processor, thread count, library versions and engine:
another release of the farm, or a checkout that was pulled, has a song of its own.
"""

import hashlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import structlog

from farm.settings import Settings

LIBRARIES = ("torch", "diffusers", "transformers", "numpy")
ENGINE = Path(__file__).parent / "pipelines"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Read by torch: another number of threads sums in another order."""

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
    threads = (settings.threads, len(os.sched_getaffinity(0)), [os.environ.get(name) for name in THREADS])
    code = [_version(library) for library in LIBRARIES], engine_hash(ENGINE)
    about = (checkpoint, platform.node(), _processor(), renderer.device, renderer.dtype, threads, code)
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


def engine_hash(folder: Path) -> str:
    """sha256 over the names and contents of the engine's modules, which decide the pixels too."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        found.update(f"{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return found.hexdigest()


def _processor() -> str:
    """The processor's name as Linux gives it, empty where it gives none: others have other vector units."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("model name")), "")


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""
