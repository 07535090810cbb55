"""A worker process with a stub for a renderer: `python -m tests.stub_worker`. Every fault switch of the tests is here.

Knobs, by environment: STUB_STEP_SECONDS (one denoising step); STUB_CRASH, STUB_HANG, STUB_FAIL, STUB_LOST_DEVICE (a
word: a micro-batch with that word in a prompt kills the process, hangs in its first step, raises, or loses the device).
"""

import hashlib
import os
import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import structlog

from farm.errors import RenderFailed
from farm.recipe import Recipe
from farm.settings import Settings
from workers.main import run
from workers.pictures import Pixels

log = structlog.get_logger(__name__)


class WarmState(NamedTuple):
    lanes: dict[str, str]
    checkpoints: frozenset[str]
    mixes: bool = False
    apart: frozenset[str] = frozenset()


class StubRenderer:
    """Deterministic noise by seed, at the size the recipe asks for."""

    device = "stub"
    dtype = "uint8"
    micro_batch = 8

    def __init__(self, settings: Settings | None = None, fetch: Callable[[str], Path] | None = None) -> None:
        self.step_seconds = float(os.environ.get("STUB_STEP_SECONDS", "0.01"))
        self.words = {kind: os.environ.get(f"STUB_{kind}", "") for kind in ("CRASH", "HANG", "FAIL", "LOST_DEVICE")}
        self._lanes: dict[str, str] = {}
        self._checkpoints: set[str] = set()

    def warm_state(self) -> WarmState:
        return WarmState(dict(self._lanes), frozenset(self._checkpoints))

    def warm(self) -> list[dict[str, object]]:
        return [{"checkpoint": hash_, "bytes": 1} for hash_ in sorted(self._checkpoints)]

    def cache(self) -> dict[str, object]:
        return {}

    def canary(self, checkpoint: str) -> bytes:
        return hashlib.sha256(f"canary {checkpoint}".encode()).digest()

    def stage(self, recipes: Sequence[Recipe], pictures: Mapping[str, Pixels]) -> str:
        return recipes[0].lane

    def render(
        self, staged: str, recipes: Sequence[Recipe], on_step: Callable[[int, int], Collection[int]]
    ) -> list[Pixels | None]:
        log.info("rendering", jobs=len(recipes))
        steps = recipes[0].steps
        dropped: set[int] = set()
        for step in range(1, steps + 1):
            self._misbehave(recipes)
            time.sleep(self.step_seconds)
            dropped |= set(on_step(step, steps))
            if len(dropped) == len(recipes):
                break
        self._lanes[staged] = recipes[0].adapter_set
        self._checkpoints.add(recipes[0].checkpoint)
        return [None if index in dropped else picture(recipe) for index, recipe in enumerate(recipes)]

    def _misbehave(self, recipes: Sequence[Recipe]) -> None:
        asked = {kind for kind, word in self.words.items() for one in recipes if word and word in one.prompt}
        if "CRASH" in asked:
            os.kill(os.getpid(), signal.SIGKILL)
        if "HANG" in asked:
            time.sleep(3600)
        if "FAIL" in asked:
            raise RenderFailed("the stub was told to fail")
        if "LOST_DEVICE" in asked:
            raise RenderFailed("the stub was told to lose its device", fatal=True)


def picture(recipe: Recipe) -> Pixels:
    """The stub's picture of a recipe: uint8, height x width x 3."""
    noise = np.random.default_rng(recipe.seed).integers(0, 256, (recipe.height, recipe.width, 3))
    return noise.astype(np.uint8)


if __name__ == "__main__":
    run(StubRenderer)
