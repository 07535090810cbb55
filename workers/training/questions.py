"""What is asked about a painted wall: of its caption, and of what a model made of the caption."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from farm.painter import Scene, caption, sample_scene
from farm.painter.scene import DIRECTIONS, FORMS, LIGHTS, WALLS, WIDTHS
from workers.training.diffusion import Meanings

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
