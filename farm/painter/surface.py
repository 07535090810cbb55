"""Bare walls before cracks, water and light: float32 (height, width, 3) in about 0..1."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from farm.painter.noise import Plane, blotch, grain, mottle, smooth_line
from farm.painter.scene import Scene

Colour = NDArray[Any]

_PAINT = {
    "yellow": ((0.86, 0.70, 0.24), (0.05, 0.05, 0.07)),
    "white": ((0.92, 0.91, 0.88), (0.025, 0.025, 0.03)),
    "blue": ((0.30, 0.47, 0.70), (0.06, 0.05, 0.06)),
}


def wall(scene: Scene, width: int, height: int, rng: np.random.Generator) -> Colour:
    """The uncracked wall of a scene."""
    if scene.wall == "brick":
        surface = _brick(width, height, rng)
    elif scene.wall == "concrete":
        surface = _concrete(width, height, rng)
    else:
        surface = _painted(scene, width, height, rng)
    if scene.old:
        surface = _stained(surface, rng)
    return surface


def _tone(colour: tuple[float, ...], shade: Plane) -> Colour:
    return np.asarray(colour, np.float32) * (1.0 + shade)[:, :, None]


def _concrete(width: int, height: int, rng: np.random.Generator) -> Colour:
    grey = float(rng.uniform(0.52, 0.7))
    warm = float(rng.uniform(-0.008, 0.022))
    shade = 0.055 * blotch(rng, height, width) + 0.035 * mottle(rng, height, width) + 0.035 * grain(rng, height, width)
    pores = np.clip(grain(rng, height, width) - 2.3, 0.0, 1.0)
    return _tone((grey + warm, grey, grey - warm), shade - 0.22 * pores)


def _painted(scene: Scene, width: int, height: int, rng: np.random.Generator) -> Colour:
    base, spread = _PAINT[scene.wall]
    colour = tuple(float(v) for v in np.asarray(base) + rng.uniform(-1, 1, 3) * spread)
    shade = 0.025 * blotch(rng, height, width) + 0.016 * mottle(rng, height, width) + 0.022 * grain(rng, height, width)
    surface = _tone(colour, shade)
    if scene.old:
        # Paint comes off in patches; its broken edge throws a thin dark line.
        level = blotch(rng, height, width) + 0.55 * mottle(rng, height, width)
        edge = level - float(rng.uniform(1.35, 1.9))
        bare = np.clip(edge * 8.0, 0.0, 1.0)[:, :, None]
        rim = np.clip(1.0 - np.abs(edge) * 9.0, 0.0, 1.0)[:, :, None]
        surface = surface * (1.0 - bare) + _concrete(width, height, rng) * bare
        surface = surface * (1.0 - 0.22 * rim)
    return surface


def _brick(width: int, height: int, rng: np.random.Generator) -> Colour:
    tall = int(rng.integers(13, 18))
    long = int(tall * rng.uniform(2.0, 2.5))
    joint = float(rng.uniform(1.6, 2.4))
    y = np.arange(height, dtype=np.float32) + float(rng.uniform(0, tall))
    y = y[:, None] + 0.5 * smooth_line(rng, width, 24)[None, :]
    row = np.floor(y / tall)
    x = np.arange(width, dtype=np.float32)[None, :] + float(rng.uniform(0, long))
    x = x + (row % 2) * (long / 2) + 0.5 * smooth_line(rng, height, 24)[:, None]
    column = np.floor(x / long)
    # Distance to the nearest joint; mottle makes the edges of the bricks uneven.
    inside = np.minimum(
        np.minimum(y - row * tall, (row + 1) * tall - y),
        np.minimum(x - column * long, (column + 1) * long - x),
    )
    inside = inside + 0.35 * mottle(rng, height, width)
    mortar = np.clip(joint - inside, 0.0, 1.0)[:, :, None].astype(np.float32)
    tones = rng.uniform(-0.16, 0.13, 1024).astype(np.float32)
    each = tones[((row * 37 + column * 101).astype(np.int64)) % 1024]
    red = np.asarray((0.60, 0.27, 0.19)) + rng.uniform(-1, 1, 3) * (0.05, 0.03, 0.03)
    shade = each + 0.05 * mottle(rng, height, width) + 0.05 * grain(rng, height, width)
    brick = _tone(tuple(float(v) for v in red), shade)
    pale = float(rng.uniform(0.62, 0.74))
    paste = _tone((pale, pale * 0.97, pale * 0.91), 0.04 * grain(rng, height, width))
    wall: Colour = brick * (1.0 - mortar) + paste * mortar
    return wall


def _stained(surface: Colour, rng: np.random.Generator) -> Colour:
    """Brown blotches, and dirt that gathers towards the bottom or the top."""
    height, width = surface.shape[:2]
    blot = np.clip(blotch(rng, height, width) + 0.4 * mottle(rng, height, width) - 0.7, 0.0, 1.2)
    brown = np.asarray((0.30, 0.36, 0.46), np.float32) * float(rng.uniform(0.6, 1.0))
    surface = surface * (1.0 - brown * np.minimum(blot, 1.0)[:, :, None])
    slope = np.linspace(0.0, 1.0, height, dtype=np.float32)[:, None]
    if rng.random() < 0.4:
        slope = 1.0 - slope
    dirt = np.clip(slope - 0.6 + 0.12 * mottle(rng, height, width), 0.0, 0.5)
    return np.asarray(surface * (1.0 - 0.5 * dirt[:, :, None]), dtype=np.float32)
