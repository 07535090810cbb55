"""What is asked about a painted wall: of its caption, and of what a model made of the caption."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from farm.painter import Scene, caption, sample_scene
from farm.painter.scene import DIRECTIONS, FORMS, LIGHTS, WALLS, WIDTHS
from workers.training.diffusion import Meanings
from workers.training.errors import TrainingError
from workers.training.pool import Pool
from workers.training.sharpen import UNKNOWN

LEANS = ("falling", "rising")
DIAGONAL = DIRECTIONS.index("diagonal")
CROSSED = len(DIRECTIONS)
"""A fifth answer to where cracks run: two ways at once. No caption asks for it."""

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


def crossed(pool: Pool, count: int, rng: np.random.Generator) -> tuple[Pool, dict[str, NDArray[np.int64]]]:
    """Walls of a pool that got the cracks of another picture of such a wall too, and the right answers about them.

    Painted walls have no cracks that run two ways; a reader that only knows those takes a picture with a stray crack
    for whatever it has most of. Half of the walls are wet: models draw strays where water runs. Of every other crack
    only half is put there. Two cracks that run the same way are among them, so that being put together is no sign of
    anything. Raises TrainingError when no wall of the pool is cracked.
    """
    scenes, leans = pool.scenes, lean(pool)
    like: dict[tuple[str, str], list[int]] = {}
    for number, scene in enumerate(scenes):
        if scene.cracked:
            like.setdefault((scene.wall, scene.light), []).append(number)
    if not like:
        raise TrainingError(f"none of {len(scenes)} walls is cracked: there are no cracks to put together")
    fit = [number for number, scene in enumerate(scenes) if (scene.wall, scene.light) in like]
    wet = [number for number in fit if scenes[number].water]
    dry = [number for number in fit if not scenes[number].water]
    under = [int(rng.choice((wet, dry)[number % 2] or fit)) for number in range(count)]
    over = [int(rng.choice(like[scenes[number].wall, scenes[number].light])) for number in under]
    pixels = pool.pixels[under]
    for number, (picture, taken) in enumerate(zip(pixels, over, strict=True)):
        other = pool.pixels[taken]
        crack = other[:, :, 3] > 0
        if number % 4 > 1:
            crack &= _half(crack, rng)
        picture[crack, :3] = np.minimum(picture[crack, :3], other[crack, :3])
        picture[crack, 3] = 255
    known = answers([scenes[number] for number in under])
    known["width"][:] = known["form"][:] = UNKNOWN
    added = answers([scenes[number] for number in over])["direction"]
    first, second, bare = leans[under], leans[over], known["direction"] == DIRECTIONS.index("none")
    same = (known["direction"] == added) & (first == second)
    known["direction"] = np.where(bare | same, added, CROSSED)
    known["lean"] = np.where(bare | same, second, UNKNOWN)
    return Pool(pixels, [scenes[number] for number in under]), known


def bent(pool: Pool, count: int, rng: np.random.Generator) -> tuple[Pool, dict[str, NDArray[np.int64]]]:
    """Walls without cracks that got the halves of two diagonal ones, which meet in the middle, and the right answers.

    Models draw such cracks where they were not sure whether one rises or falls. Of every third picture both halves lean
    the same way, so that being put together is no sign of anything. Where little of a crack lies in its half, nothing
    is asked. Raises TrainingError when the pool has no such wall with cracks of both kinds on walls like it.
    """
    scenes, leans = pool.scenes, lean(pool)
    leaning: dict[tuple[str, str, int], list[int]] = {}
    for number, scene in enumerate(scenes):
        leaning.setdefault((scene.wall, scene.light, int(leans[number])), []).append(number)
    ways = range(len(LEANS))
    whole = [number for number, scene in enumerate(scenes) if not scene.cracked]
    whole = [at for at in whole if all((scenes[at].wall, scenes[at].light, way) in leaning for way in ways)]
    if not whole:
        raise TrainingError(f"none of {len(scenes)} walls is whole and has diagonal cracks of both kinds to take")
    under = [int(rng.choice(whole)) for _ in range(count)]
    pixels = pool.pixels[under]
    known = answers([scenes[number] for number in under])
    known |= {name: np.full(count, UNKNOWN, np.int64) for name in ("width", "form", "direction", "lean")}
    for number, picture in enumerate(pixels):
        first = int(rng.choice(ways))
        second = first if number % 3 == 0 else 1 - first
        side = _side(picture.shape[:2], rng)
        scene, enough = scenes[under[number]], True
        for way, place in ((first, side), (second, ~side)):
            other = pool.pixels[int(rng.choice(leaning[scene.wall, scene.light, way]))]
            crack = other[:, :, 3] > 0
            enough &= bool((crack & place).sum() > 0.25 * crack.sum())
            picture[crack & place] = other[crack & place]
        if enough:
            known["direction"][number] = DIAGONAL if first == second else CROSSED
            known["lean"][number] = first if first == second else UNKNOWN
    return Pool(pixels, [scenes[number] for number in under]), known


def _side(shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.bool_]:
    """The places left of the middle or right of it, above it or below it."""
    rows, columns = np.indices(shape)
    half: NDArray[np.bool_] = columns * 2 < shape[1] if rng.random() < 0.5 else rows * 2 < shape[0]
    return half if rng.random() < 0.5 else ~half


def _half(crack: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.bool_]:
    """The places on one side of a line through the middle of a crack."""
    turn = rng.uniform(0.0, 2 * np.pi)
    rows, columns = np.indices(crack.shape)
    along = rows * np.cos(turn) + columns * np.sin(turn)
    side: NDArray[np.bool_] = along <= (along[crack].mean() if crack.any() else 0.0)
    return side
