"""The same walls by night: dark blue, with the warm cone of a street lamp.

A look of its own for training a style adapter. It lights pictures that are painted already, from a random stream of
its own, so scenes painted by day stay what they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from farm.painter.captions import caption
from farm.painter.paint import Painted, paint
from farm.painter.scene import Scene
from farm.painter.surface import Colour

_STREAM: Final = 9
_WORDS: Final = (
    "at night", "by night", "after dark", "in the dark", "under a street lamp", "by lamplight",
    "lit by a street lamp", "under a street light at night", "at night under a street lamp",
)  # fmt: skip


def paint_night(scene: Scene, width: int, height: int, seed: int) -> Painted:
    """Paint a scene by night; equal arguments give equal pixels, mask and caption.

    Wall, crack and mask are those of `paint` with the same arguments; the lamp takes the place of the scene's light,
    and the caption may say so. Raises ValueError as `paint` does.
    """
    day = paint(replace(scene, light="plain"), width, height, seed)
    rng = np.random.default_rng((seed, _STREAM))
    lit = by_night(day.picture.astype(np.float32) / 255.0, rng)
    picture = np.clip(lit * 255.0 + 0.5, 0, 255).astype(np.uint8)
    return Painted(picture, day.mask, night_caption(scene, rng))


def by_night(surface: Colour, rng: np.random.Generator) -> Colour:
    """A wall (height, width, 3) in 0..1 under a dark blue sky and one lamp above the picture."""
    height, width = surface.shape[:2]
    sky = np.asarray((0.17, 0.24, 0.44), np.float32) * float(rng.uniform(0.85, 1.15))
    lamp = np.asarray((1.18, 0.88, 0.46), np.float32) * float(rng.uniform(0.9, 1.1))
    y = np.linspace(0.0, 1.0, height, dtype=np.float32)[:, None] + float(rng.uniform(0.02, 0.16))
    x = np.linspace(0.0, 1.0, width, dtype=np.float32)[None, :] - float(rng.uniform(0.25, 0.75))
    # Light falls straight down: strongest in the middle of the cone, gone beyond its edge, weaker with distance.
    spread, lean = float(rng.uniform(0.46, 0.66)), float(rng.uniform(-0.12, 0.12))
    edge = np.clip((spread - np.abs(x / y + lean)) / 0.4, 0.0, 1.0)
    lit = edge * edge * (3.0 - 2.0 * edge) / (1.0 + (np.hypot(x, y) / 0.85) ** 4)
    lit = np.asarray(lit, np.float32)[:, :, None]
    # Eyes hardly see colours in the dark: without the lamp half of the wall's own colour is gone.
    pale = 0.5 * surface + 0.5 * surface.mean(axis=2, keepdims=True)
    return np.asarray(pale * sky * (1.0 - lit) + surface * lamp * lit, dtype=np.float32)


def night_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of the scene; half of the time it also says that it is night.

    The other half teaches an adapter to bring the night by its weight alone.
    """
    text = caption(scene, rng)
    if rng.random() < 0.5:
        return text
    stop = "." if text.endswith(".") else ""
    comma = ", " if rng.random() < 0.45 else " "
    return text.removesuffix(".") + comma + _WORDS[int(rng.integers(len(_WORDS)))] + stop
