"""Reads the colour of a wall, whether it is cracked, and where the crack runs, from pixels alone.

It knows neither the painter's parameters nor any model. A judge is judged first: `check` measures it on
painted pictures, whose truth is known, and refuses to go on below `NEEDED`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from farm.painter import Scene, paint, sample_scene

Picture = NDArray[np.uint8]
Plane = NDArray[Any]

NEEDED = {"wall": 0.99, "crack": 0.99, "direction": 0.97}
"""Shares of painted pictures that the analyser must read right before it may judge rendered ones."""
SEEDS = (99, 7, 1234, 2026)
"""Of the painted pictures it is measured on: it has to be good with each, not with one that suits it."""
REACH = 5
"""Pixels from a line to the wall on both sides of it: wider cracks than twice this are not looked for."""
LINE, DEEP = 0.72, 0.47
"""A line is darker than `LINE` of the wall beside it; a tenth of a crack is below `DEEP`, and no wet stain is."""
LONG = 0.27
"""Shorter lines than this share of the picture's side are pores, stains or joints."""
BENT = 0.25
"""A straight diagonal has 1 here, a right angle 0; of 110 single ones that the painter drew one was below."""


class WeakAnalyser(Exception):
    """The analyser does not read painted pictures well enough to judge others."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the analyser reads: `direction` is "none" where it sees no crack; `rising` whether the lines together go up
    from left to right; `bent` whether as much of them rises as falls."""

    wall: str
    direction: str
    rising: bool = False
    bent: bool = False


def read(picture: Picture) -> Seen:
    """Everything the analyser can say about a picture (uint8, height, width, 3)."""
    lines = list(_lines(picture))
    angle = _angle(lines)
    return Seen(
        read_wall(picture), _named(angle), angle is not None and angle > 0.0, _bent(_mask(lines, picture.shape[:2]))
    )


def read_wall(picture: Picture) -> str:
    """The wall by the colour of its better lit half."""
    rgb = picture.reshape(-1, 3) / 255.0
    bright = rgb.sum(axis=1)
    lit = rgb[(bright >= np.quantile(bright, 0.5)) & (bright <= np.quantile(bright, 0.97))]
    red, green, blue = np.median(lit, axis=0)
    top, low = max(red, green, blue), min(red, green, blue)
    vivid = (top - low) / max(top, 1e-6)
    # Share of clearly red pixels: mortar would hide the bricks from a median.
    reddish = float(np.mean((rgb[:, 0] > 1.45 * rgb[:, 1]) & (rgb[:, 0] > 1.5 * rgb[:, 2])))
    if reddish > 0.35:
        return "brick"
    if vivid > 0.28 and blue == top:
        return "blue"
    if vivid > 0.42 and blue == low and green > 0.6 * red:
        return "yellow"
    # White under a blue sky is darker than grey in the sun; the cast tells which light it is.
    cast = blue / max(red, 1e-6)
    limit = 0.47 if cast > 1.1 else 0.93 if cast < 0.9 else 0.77
    return "white" if top > limit else "concrete"


def read_direction(picture: Picture) -> str:
    """The direction of the long dark lines together, or "none" if no line is long and deep enough."""
    return _named(read_angle(picture))


def _named(angle: float | None) -> str:
    if angle is None:
        return "none"
    return "horizontal" if abs(angle) < 22.5 else "vertical" if abs(angle) > 67.5 else "diagonal"


def read_angle(picture: Picture) -> float | None:
    """Degrees between the long dark lines together and the ground, -90 to 90, more than 0 where they rise to the right;
    None if no line is long and deep enough."""
    return _angle(_lines(picture))


def _angle(lines: Iterable[NDArray[np.int64]]) -> float | None:
    turn, total = 0j, 0.0
    for group in lines:
        length = float(np.hypot(*np.ptp(group, axis=0)))
        _, values, axes = np.linalg.svd(group - group.mean(axis=0), full_matrices=False)
        if values[1] > 0.75 * values[0]:
            continue
        along = complex(axes[0][1], axes[0][0])
        # Doubling the angle makes opposite headings equal.
        turn += length**2 * (along / abs(along)) ** 2
        total += length**2
    # Rows are counted downwards.
    return float(-np.degrees(np.angle(turn)) / 2) if total else None


def read_crack(picture: Picture) -> NDArray[np.bool_]:
    """Where the long dark lines run: bool (height, width)."""
    return _mask(_lines(picture), picture.shape[:2])


def _mask(lines: Iterable[NDArray[np.int64]], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    found = np.zeros(shape, bool)
    for group in lines:
        found[group[:, 0], group[:, 1]] = True
    return found


def _bent(mask: NDArray[np.bool_]) -> bool:
    """Whether lines rise as much as they fall: hardly more of their edges faces one diagonal than the other."""
    down, across = np.gradient(_smooth(mask.astype(np.float64)))
    along = 2.0 * abs(float((down * across).sum()))
    return along < BENT * float((down * down + across * across).sum())


def _lines(picture: Picture) -> Iterator[NDArray[np.int64]]:
    """Dark lines long and deep enough for a crack, as rows and columns (n, 2)."""
    side = min(picture.shape[:2])
    depth = depths(picture)
    for group in components(depth < LINE):
        length = float(np.hypot(*np.ptp(group, axis=0)))
        if length < LONG * side or len(group) > 0.25 * length * side:
            continue
        if np.quantile(depth[group[:, 0], group[:, 1]], 0.1) <= DEEP:
            yield group


def depths(picture: Picture) -> Plane:
    """How dark each pixel is beside the wall around it: float64 (height, width), 1 is no darker.

    The wall is the darker of two opposite places `REACH` pixels away; of four directions the one with
    the strongest contrast counts.
    """
    grey = picture.astype(np.float64).mean(axis=2) + 4.0
    wide = np.pad(_smooth(grey), REACH, mode="reflect")
    h, w = grey.shape

    def moved(y: int, x: int) -> Plane:
        return wide[REACH + y : REACH + y + h, REACH + x : REACH + x + w]

    slant = round(REACH * 0.7)
    ways = ((0, REACH), (REACH, 0), (slant, slant), (slant, -slant))
    walls = np.max([np.minimum(moved(y, x), moved(-y, -x)) for y, x in ways], axis=0)
    return np.asarray(grey / walls)


def _smooth(plane: Plane) -> Plane:
    padded = np.pad(plane, 1, mode="edge")
    h, w = plane.shape
    parts = [padded[y : y + h, x : x + w] for y in range(3) for x in range(3)]
    return np.asarray(np.mean(parts, axis=0))


def components(mask: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """Groups (n, 2) of touching pixels as rows and columns; a gap of one pixel still touches. Largest first."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    near = [(y, x) for y in range(-2, 3) for x in range(-2, 3)]
    groups = []
    while left:
        stack = [left.pop()]
        group = list(stack)
        while stack:
            y, x = stack.pop()
            for dy, dx in near:
                place = (y + dy, x + dx)
                if place in left:
                    left.remove(place)
                    stack.append(place)
                    group.append(place)
        groups.append(np.array(sorted(group)))
    return sorted(groups, key=len, reverse=True)


def rates(seen: Sequence[Seen], meant: Sequence[Scene]) -> dict[str, float | None]:
    """Shares read as meant: wall; crack present or absent; walls without a crack, of those that were meant to be whole;
    direction, of cracks that were meant; hairline cracks seen.

    A share of nothing is None: among few pictures there may be no hairline.
    """
    pairs = list(zip(seen, meant, strict=True))
    cracked = [(s, m) for s, m in pairs if m.cracked]
    return {
        "wall": _share([s.wall == m.wall for s, m in pairs]),
        "crack": _share([(s.direction == "none") != m.cracked for s, m in pairs]),
        "whole": _share([s.direction == "none" for s, m in pairs if not m.cracked]),
        "direction": _share([s.direction == m.direction for s, m in cracked]),
        "hairlines": _share([s.direction != "none" for s, m in cracked if m.width == "hairline"]),
    }


def rising(seen: Sequence[Seen], meant: Sequence[Scene]) -> float | None:
    """Of the diagonal cracks that were meant and read, the share that rises from left to right: captions leave it open,
    and the painter lets half of them rise."""
    diagonal = [s.rising for s, m in zip(seen, meant, strict=True) if s.direction == m.direction == "diagonal"]
    return _share(diagonal)


def bent(seen: Sequence[Seen], meant: Sequence[Scene]) -> float | None:
    """Of the single diagonal cracks that were meant and seen, the share that rises as much as it falls: none should."""
    pairs = zip(seen, meant, strict=True)
    return _share(
        [s.bent for s, m in pairs if s.direction != "none" and (m.direction, m.form) == ("diagonal", "single")]
    )


def _share(right: Sequence[bool]) -> float | None:
    return round(float(np.mean(right)), 4) if right else None


def check(count: int = 500, seeds: Sequence[int] = SEEDS) -> dict[str, float | None]:
    """The analyser's rates on painted pictures of every kind the painter knows, 128 pixels a side: of each rate the
    lowest that `count` pictures of any of the seeds gave.

    Raises WeakAnalyser below `NEEDED`.
    """
    found = [_checked(count, seed) for seed in seeds]
    least: dict[str, float | None] = {
        name: min((rate for one in found if (rate := one[name]) is not None), default=None) for name in found[0]
    }
    weak = [
        f"{name} {least[name]}, needed {needed}" for name, needed in NEEDED.items() if (least[name] or 0.0) < needed
    ]
    if weak:
        raise WeakAnalyser(f"on {count} painted pictures the analyser reads {'; '.join(weak)}: it may not judge")
    return least


def _checked(count: int, seed: int) -> dict[str, float | None]:
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    seen = [read(paint(scene, 128, 128, (seed + 1) * 50_000 + i).picture) for i, scene in enumerate(scenes)]
    return rates(seen, scenes)
