"""Tiles of seamless noise, made once per process and cut at random places afterwards."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[Any]

_TILE = 512


@lru_cache(maxsize=16)
def _tile(exponent: float, low: float, seed: int) -> Plane:
    # Shaping white noise in the frequency domain makes the tile wrap around without a seam.
    rng = np.random.default_rng(seed)
    fy = np.fft.fftfreq(_TILE)[:, None] * _TILE
    fx = np.fft.rfftfreq(_TILE)[None, :] * _TILE
    radius = np.maximum(np.hypot(fy, fx), 1.0)
    spectrum = np.fft.rfft2(rng.standard_normal((_TILE, _TILE)))
    spectrum *= np.where(radius < low, 0.0, radius ** (-exponent))
    plane = np.fft.irfft2(spectrum, s=(_TILE, _TILE))
    plane -= plane.mean()
    return np.asarray(plane / plane.std(), dtype=np.float32)


def _cut(tile: Plane, rng: np.random.Generator, height: int, width: int) -> Plane:
    y, x = (int(v) for v in rng.integers(0, _TILE, 2))
    if rng.random() < 0.5:
        tile = tile[:, ::-1]
    if rng.random() < 0.5:
        tile = tile[::-1]
    if y + height <= _TILE and x + width <= _TILE:
        return tile[y : y + height, x : x + width]
    rows = (np.arange(height) + y) % _TILE
    columns = (np.arange(width) + x) % _TILE
    return tile[rows[:, None], columns[None, :]]


def grain(rng: np.random.Generator, height: int, width: int) -> Plane:
    """Sandy roughness, unit variance."""
    return _cut(_tile(0.35, 24.0, 11), rng, height, width)


def mottle(rng: np.random.Generator, height: int, width: int) -> Plane:
    """Patches of about ten pixels, unit variance."""
    return _cut(_tile(1.35, 10.0, 12), rng, height, width)


def blotch(rng: np.random.Generator, height: int, width: int) -> Plane:
    """Clouds of about forty pixels, unit variance."""
    return _cut(_tile(2.1, 4.0, 13), rng, height, width)


def smooth_line(rng: np.random.Generator, length: int, period: float) -> Plane:
    """A wavering line of `length` values, about unit variance, that turns every `period` pixels."""
    knots = max(int(length / period) + 3, 4)
    values = rng.standard_normal(knots)
    at = np.linspace(0.0, knots - 1.001, length)
    left = at.astype(np.intp)
    part = at - left
    part = part * part * (3.0 - 2.0 * part)
    line = values[left] * (1.0 - part) + values[left + 1] * part
    return np.asarray(line, dtype=np.float32)
