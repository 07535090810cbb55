"""A fixed pool of painted pictures on disk, and their latents once there is an autoencoder."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from farm.painter import Scene, caption, paint, sample_scene
from workers.training.disk import reserve
from workers.training.errors import TrainingError, why


@dataclass(frozen=True, slots=True)
class Pool:
    """`pixels` is uint8 (count, side, side, 4): RGB and the crack mask as 0 or 255."""

    pixels: NDArray[np.uint8]
    scenes: list[Scene]

    def captions(self, chosen: NDArray[np.int64], rng: np.random.Generator) -> list[str]:
        """A new wording for each chosen picture: the pool has far more sentences than pictures."""
        return [caption(self.scenes[int(i)], rng) for i in chosen]

    def importance(self, grid: int, cracks: float) -> NDArray[np.float16]:
        """How much each of grid x grid places counts, (count, grid, grid): 1, or 1 + `cracks` where a crack is.

        A crack covers a hundredth of the picture and is what the picture is about.
        """
        places = []
        for start in range(0, len(self.pixels), 256):
            mask = self.pixels[start : start + 256, :, :, 3]
            cell = mask.shape[1] // grid
            cells = mask.reshape(len(mask), grid, cell, grid, cell).max((2, 4)) > 0
            places.append((1.0 + cracks * cells).astype(np.float16))
        return np.concatenate(places)


def open_pool(folder: Path, count: int, side: int, seed: int) -> Pool:
    """The pool of `count` pictures in `folder`, painted now if it is not there yet.

    Raises TrainingError for less than one picture, when the disk has no room or fails, and for a pool that another
    release painted.
    """
    if count < 1:
        raise TrainingError(f"the pool needs at least one picture, not {count}")
    rng = np.random.default_rng((seed, 77))
    scenes = [sample_scene(rng) for _ in range(count)]
    path = folder / f"pool-{count}-{side}-{seed}.npy"
    if not path.exists():
        half, shape = path.with_suffix(".part.npy"), (count, side, side, 4)
        reserve(half, math.prod(shape), "the pool", _head(shape))
        try:
            pixels = np.load(half, mmap_mode="r+")
            for i, scene in enumerate(scenes):
                pixels[i] = _wall(scene, side, seed, i)
            pixels.flush()
            half.rename(path)
        except OSError as error:
            raise TrainingError(f"cannot write the pool {path}: {why(error)}") from error
    pool = Pool(np.load(path, mmap_mode="r"), scenes)
    # What was learned from these walls goes on only from the same ones; a few tell whether they are.
    for i in {0, count // 2, count - 1}:
        if not np.array_equal(pool.pixels[i], _wall(scenes[i], side, seed, i)):
            raise TrainingError(f"{path} was painted by another release: use another working folder, or that release")
    return pool


def _wall(scene: Scene, side: int, seed: int, number: int) -> NDArray[np.uint8]:
    """The wall of this number with its mask (side, side, 4)."""
    painted = paint(scene, side, side, seed * 10_000_019 + number)
    return np.dstack((painted.picture, painted.mask * np.uint8(255)))


def _head(shape: tuple[int, ...]) -> bytes:
    """What a .npy file of bytes of this shape begins with."""
    made = io.BytesIO()
    np.lib.format.write_array_header_1_0(made, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return made.getvalue()
