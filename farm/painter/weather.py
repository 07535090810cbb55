"""Water running down and the light on the wall."""

from __future__ import annotations

import numpy as np

from farm.painter.noise import Plane, mottle, smooth_line
from farm.painter.surface import Colour


def soak(surface: Colour, rng: np.random.Generator) -> Colour:
    """Streams that run down from the top edge: wet dark wall with a bluish gleam."""
    height, width = surface.shape[:2]
    x = np.arange(width, dtype=np.float32)[None, :]
    wet: Colour = np.zeros((height, width), np.float32)
    gleam = np.zeros((height, width), np.float32)
    down = np.arange(height, dtype=np.float32)
    heart = float(rng.uniform(0.12, 0.88)) * width
    for _ in range(int(rng.integers(3, 7))):
        centre = heart + float(rng.normal(0.0, width * 0.11)) + 2.2 * smooth_line(rng, height, 26)
        half = float(rng.uniform(3.0, 8.0)) * (1.0 + 0.22 * smooth_line(rng, height, 15))
        stop = float(rng.uniform(0.55, 1.4)) * height
        half = half * np.sqrt(np.clip((stop - down) / 14.0, 0.0, 1.0))
        away = np.abs(x - centre[:, None])
        np.maximum(wet, np.clip((half[:, None] - away) / 1.6, 0.0, 1.0), out=wet)
        line = centre + half * float(rng.uniform(-0.55, 0.55))
        shine = np.clip(1.0 - np.abs(x - line[:, None]) / 1.1, 0.0, 1.0)
        fleck = np.clip(0.6 + 0.8 * smooth_line(rng, height, 7), 0.0, 1.0) * (half > 1.5)
        np.maximum(gleam, shine * fleck[:, None], out=gleam)
    wet = wet * (0.94 + 0.04 * mottle(rng, height, width))
    dark = np.asarray((0.50, 0.44, 0.36), np.float32)
    surface = surface * (1.0 - dark * wet[:, :, None])
    return surface + gleam[:, :, None] * np.asarray((0.26, 0.31, 0.36), np.float32)


def light_up(surface: Colour, light: str, rng: np.random.Generator) -> Colour:
    """Multiply by the light of a scene: `plain`, `sunlight` or `shade`."""
    height, width = surface.shape[:2]
    angle = float(rng.uniform(0, 2 * np.pi))
    across = _ramp(height, width, angle)
    if light == "plain":
        return surface * (1.0 + 0.07 * float(rng.uniform(0, 1)) * across)[:, :, None]
    if light == "shade":
        tint = np.asarray((0.50, 0.55, 0.64), np.float32) * float(rng.uniform(0.88, 1.08))
        shaded: Colour = surface * tint * (1.0 + 0.10 * across)[:, :, None]
        return shaded
    sun = np.asarray((1.16, 1.09, 0.94), np.float32) * float(rng.uniform(0.98, 1.08))
    dark = np.asarray((0.58, 0.62, 0.72), np.float32) * float(rng.uniform(0.9, 1.0))
    steep = float(rng.choice((-1.0, 1.0))) * float(rng.uniform(0.5, 1.05)) + np.pi / 2
    edge = _ramp(height, width, steep + (np.pi if rng.random() < 0.5 else 0.0))
    # An eave or a neighbouring house keeps one side in shadow; half of the time the sky is open.
    line = float(rng.uniform(-0.75, -0.3)) if rng.random() < 0.7 else -9.0
    lit = np.clip((edge - line) * 14.0, 0.0, 1.0)[:, :, None]
    glow = (1.0 + 0.10 * across)[:, :, None]
    return surface * (sun * lit + dark * (1.0 - lit)) * glow


def _ramp(height: int, width: int, angle: float) -> Plane:
    y = np.linspace(-1.0, 1.0, height, dtype=np.float32)[:, None]
    x = np.linspace(-1.0, 1.0, width, dtype=np.float32)[None, :]
    return np.asarray(x * np.cos(angle) + y * np.sin(angle), dtype=np.float32)
