"""Puts a scene together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from farm.painter.captions import caption
from farm.painter.cracks import coverage
from farm.painter.noise import grain, mottle
from farm.painter.scene import Scene
from farm.painter.surface import wall
from farm.painter.weather import light_up, soak

_SMALLEST, _LARGEST = 32, 4096


@dataclass(frozen=True, slots=True)
class Painted:
    """A painted scene.

    `picture` is uint8 (height, width, 3) sRGB; `mask` is bool (height, width), True where at
    least three tenths of the pixel are crack; `caption` is one English sentence or phrase.
    """

    picture: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    caption: str


def paint(scene: Scene, width: int, height: int, seed: int) -> Painted:
    """Paint a scene; equal arguments give equal pixels, mask and caption.

    Raises ValueError unless both sides are 32..4096 and `seed` is not negative.
    """
    if not (_SMALLEST <= width <= _LARGEST and _SMALLEST <= height <= _LARGEST):
        raise ValueError(f"sides must be {_SMALLEST}..{_LARGEST} pixels, not {width}x{height}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, is {seed}")
    walls, cracks, weather, words = (np.random.default_rng((seed, part)) for part in range(4))
    surface = wall(scene, width, height, walls)
    cover = coverage(scene, width, height, cracks)
    if scene.cracked:
        # Crumbled edges, and a bottom that is not equally dark everywhere.
        crumb = cover * (1.0 - cover) * grain(cracks, height, width)
        cover = np.clip(cover + 1.1 * crumb, 0.0, 1.0)
        depth = float(cracks.uniform(0.80, 0.93)) - 0.05 * np.abs(mottle(cracks, height, width))
        # The lit lip of the crack lies on one side, one pixel away.
        lip = np.zeros_like(cover)
        lip[1:, 1:] = np.clip(cover[:-1, :-1] - cover[1:, 1:], 0.0, 1.0)
        surface = surface * (1.0 - depth * cover + 0.14 * lip)[:, :, None]
    if scene.water:
        surface = soak(surface, weather)
    surface = light_up(surface, scene.light, weather)
    picture = np.clip(surface * 255.0 + 0.5, 0, 255).astype(np.uint8)
    return Painted(picture, cover >= 0.3, caption(scene, words))
