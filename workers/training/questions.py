"""What is asked about a painted wall: of its caption, and of what a model made of the caption."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from farm.painter import Scene, caption, sample_scene
from farm.painter.scene import DIRECTIONS, FORMS, LIGHTS, WALLS, WIDTHS
from workers.training.diffusion import Meanings
from workers.training.pool import Pool
from workers.training.sharpen import UNKNOWN

LEANS = ("falling", "rising")
DIAGONAL = DIRECTIONS.index("diagonal")

QUESTIONS: dict[str, Sequence[str | bool]] = {
    "wall": WALLS,
    "direction": DIRECTIONS,
    "width": WIDTHS,
    "form": FORMS,
    "light": LIGHTS,
    "water": (False, True),
    "old": (False, True),
}


def answers(scenes: list[Scene]) -> dict[str, NDArray[np.int64]]:
    """The number of the right answer to each question, for each scene."""
    return {
        name: np.array([known.index(getattr(scene, name)) for scene in scenes]) for name, known in QUESTIONS.items()
    }


def _captions_with_meanings(count: int, rng: np.random.Generator) -> tuple[list[str], dict[str, NDArray[np.int64]]]:
    scenes = [sample_scene(rng) for _ in range(count)]
    return [caption(scene, rng) for scene in scenes], answers(scenes)


MEANINGS = Meanings({name: len(known) for name, known in QUESTIONS.items()}, _captions_with_meanings)


def lean(pool: Pool) -> NDArray[np.int64]:
    """Which of LEANS each diagonal crack is, seen from left to right; UNKNOWN of other pictures.

    Captions do not say it, and a picture that is half the one and half the other is neither.
    """
    found = np.full(len(pool.scenes), UNKNOWN, np.int64)
    for number, scene in enumerate(pool.scenes):
        if scene.direction == "diagonal":
            down, across = np.gradient((pool.pixels[number, :, :, 3] > 0).astype(np.float32))
            # Edges face across the crack: where both grow together, it rises.
            found[number] = int(float((down * across).sum()) > 0)
    return found
