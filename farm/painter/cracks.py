"""Cracks: noisy paths, drawn four times too large and averaged down."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from farm.painter.noise import Plane
from farm.painter.scene import Scene

_OVER = 4
_STEP = 3.0
_WIDTH = {"hairline": (0.9, 1.3), "thin": (1.7, 2.5), "wide": (3.6, 6.0)}
_ANGLE = {"vertical": math.pi / 2, "horizontal": 0.0}

Path = NDArray[np.float64]


def coverage(scene: Scene, width: int, height: int, rng: np.random.Generator) -> Plane:
    """How much of each pixel is crack: float32 (height, width) in 0..1; zeros if uncracked."""
    if not scene.cracked:
        return np.zeros((height, width), np.float32)
    canvas = Image.new("L", (width * _OVER, height * _OVER), 0)
    draw = ImageDraw.Draw(canvas)
    thick = float(rng.uniform(*_WIDTH[scene.width]))
    angle = _heading(scene.direction, rng)
    middle = np.array([width, height]) / 2 + rng.uniform(-0.16, 0.16, 2) * (width, height)
    if scene.form == "several":
        _several(draw, rng, middle, angle=angle, thick=thick, size=(width, height))
    else:
        start, end = _chord(middle, angle, width, height, rng)
        path = _wander(start, end, rng)
        if scene.form == "split":
            _split(draw, rng, path, angle=angle, thick=thick, size=(width, height))
        else:
            _stroke(draw, path, thick, rng, taper=(0.7, 0.5))
            if scene.form == "branching":
                _branches(draw, rng, path, angle, thick)
    return np.asarray(canvas.reduce(_OVER), dtype=np.float32) / 255.0


def _heading(direction: str, rng: np.random.Generator) -> float:
    if direction == "diagonal":
        return float(rng.choice((-1.0, 1.0)) * (math.pi / 4 + rng.uniform(-0.14, 0.14)))
    return _ANGLE[direction] + float(rng.uniform(-0.16, 0.16))


def _unit(angle: float) -> Path:
    return np.array([math.cos(angle), math.sin(angle)])


def _to_edge(point: Path, way: Path, width: int, height: int) -> float:
    """Distance from `point` along `way` to the border of the picture."""
    far = []
    for at, step, size in ((point[0], way[0], width), (point[1], way[1], height)):
        if abs(step) > 1e-6:
            far.append(((size if step > 0 else 0) - at) / step)
    return float(max(min(far), 0.0))


def _chord(middle: Path, angle: float, width: int, height: int, rng: np.random.Generator) -> tuple[Path, Path]:
    way = _unit(angle)
    # Values above one run out of the picture: most cracks do not end on it.
    before, after = np.minimum(rng.uniform(0.72, 1.3, 2), 1.06)
    return (
        middle - way * _to_edge(middle, -way, width, height) * before,
        middle + way * _to_edge(middle, way, width, height) * after,
    )


def _wander(start: Path, end: Path, rng: np.random.Generator, rough: float = 1.0) -> Path:
    """A path of points (n, 2) from `start` to `end`: a random bridge with small kinks."""
    line = end - start
    length = float(np.hypot(*line))
    count = max(int(length / _STEP), 4)
    # Few strong steps among many weak ones: concrete breaks in kinks, not in waves.
    steps = rng.standard_normal(count) * np.where(rng.random(count) < 0.25, 2.1, 0.7)
    walk = np.cumsum(steps * rough)
    along = np.linspace(0.0, 1.0, count)
    bridge = walk - along * walk[-1] + rng.standard_normal(count) * 0.4
    bridge[0] = bridge[-1] = 0.0
    normal = np.array([-line[1], line[0]]) / max(length, 1e-6)
    return np.asarray(start + along[:, None] * line + bridge[:, None] * normal)


def _stroke(
    draw: ImageDraw.ImageDraw,
    path: Path,
    thick: float,
    rng: np.random.Generator,
    taper: tuple[float, float],
) -> None:
    """Draw a path; `taper` is the share of the thickness left at its start and its end."""
    count = len(path)
    slow = np.interp(np.arange(count), np.linspace(0, count, 6), rng.uniform(0.72, 1.2, 6)) * rng.uniform(
        0.7, 1.3, count
    )
    ends = np.interp(np.linspace(0, 1, count), (0, 0.3, 0.75, 1), (taper[0], 1, 1, taper[1]))
    widths = np.maximum(thick * slow * ends, 0.75) * _OVER
    points = path * _OVER
    for i in range(count - 1):
        x0, y0 = points[i]
        x1, y1 = points[i + 1]
        draw.line((x0, y0, x1, y1), fill=255, width=max(int(widths[i] + 0.5), 2))
        half = min(widths[i], widths[i + 1]) / 2
        if half > 2.5:
            draw.ellipse((x1 - half, y1 - half, x1 + half, y1 + half), fill=255)


def _branches(draw: ImageDraw.ImageDraw, rng: np.random.Generator, path: Path, angle: float, thick: float) -> None:
    count = int(rng.integers(3, 6))
    side = float(rng.choice((-1.0, 1.0)))
    for place in rng.permutation(np.linspace(0.15, 0.85, count)):
        root = path[int(place * (len(path) - 1))]
        back = math.pi if rng.random() < 0.3 else 0.0
        turn = angle + back + side * float(rng.uniform(0.55, 1.0))
        side = -side
        tip = root + _unit(turn) * float(rng.uniform(18.0, 42.0))
        branch = _wander(root, tip, rng, rough=0.8)
        _stroke(draw, branch, max(thick * 0.55, 0.85), rng, taper=(1.0, 0.3))


def _split(
    draw: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    path: Path,
    *,
    angle: float,
    thick: float,
    size: tuple[int, int],
) -> None:
    """One trunk that forks into two arms of about its own width."""
    if rng.random() < 0.5:
        path, angle = path[::-1], angle + math.pi
    fork = int(len(path) * float(rng.uniform(0.28, 0.55)))
    _stroke(draw, path[: fork + 1], thick, rng, taper=(0.8, 1.0))
    root = path[fork]
    for side in (-1.0, 1.0):
        way = _unit(angle + side * float(rng.uniform(0.24, 0.42)))
        reach = _to_edge(root, way, *size) * min(float(rng.uniform(0.8, 1.25)), 1.05)
        arm = _wander(root, root + way * max(reach, 20.0), rng, rough=0.9)
        _stroke(draw, arm, thick * 0.85, rng, taper=(1.0, 0.45))


def _several(
    draw: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    middle: Path,
    *,
    angle: float,
    thick: float,
    size: tuple[int, int],
) -> None:
    width, height = size
    count = int(rng.integers(2, 4))
    normal = _unit(angle + math.pi / 2)
    gap = min(width, height) * float(rng.uniform(0.22, 0.3))
    for i in range(count):
        shift = (i - (count - 1) / 2) * gap + float(rng.uniform(-4, 4))
        centre = np.clip(middle + normal * shift, 4, (width - 4, height - 4))
        start, end = _chord(centre, angle + float(rng.uniform(-0.1, 0.1)), width, height, rng)
        _stroke(draw, _wander(start, end, rng), thick * 0.9, rng, taper=(0.6, 0.5))
