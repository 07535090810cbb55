"""From examples to what a loss takes: latents and conditions on the device, encoded now or read from the cache."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from workers.training.base import Base, Condition
from workers.training.disk import reserve
from workers.training.errors import TrainingError, why
from workers.training.examples import Example, Positions

Say = Callable[[str], None]
Shapes = Mapping[str, tuple[tuple[int, ...], Any]]
"""Shape and number type by name of file."""
NOTE = "cache.json"
"""What the cache was made for; it comes last, so that a cache without one is not whole."""
CHUNK = 16
"""Pictures or captions encoded between two lines of progress, at most."""


@dataclass(frozen=True)
class Cache:
    """Encoded pictures and captions on disk, float16.

    `moments` (n, 2c, h, w) and `sizes` (n, 6), mirrored ones after all others; `states` (m, 77, width) and `pooled`
    (m, width or 0) by `rows` of captions.
    """

    moments: NDArray[np.float16]
    sizes: NDArray[np.int32]
    states: NDArray[np.float16]
    pooled: NDArray[np.float16]
    rows: Mapping[str, int]
    mirrored: int


class Feed:
    """Encodes examples with the base's own autoencoder and text encoders, on their device."""

    def __init__(self, base: Base, accelerator: Accelerator, *, text_learns: bool, cache: Cache | None) -> None:
        self.base, self.accelerator, self.text_learns, self.cache = base, accelerator, text_learns, cache

    def __call__(self, examples: Sequence[Example]) -> tuple[Tensor, Condition, Condition]:
        """Clean latents, what is told of each, and the same without captions. Draws from torch's host generator."""
        device = self.accelerator.device
        cache = self.cache
        if cache is None:
            moments = self.base.moments(np.stack([each.pixels for each in examples if each.pixels is not None]))
            sizes = torch.tensor([each.sizes for each in examples])
        else:
            rows = [each.number + cache.mirrored * each.mirrored for each in examples]
            moments = torch.from_numpy(cache.moments[rows]).to(device)
            sizes = torch.from_numpy(cache.sizes[rows])
        told = self._told([each.caption for each in examples], sizes.to(device))
        empty = told if self.text_learns else self._told([""] * len(examples), sizes.to(device))
        return self.base.latents(moments), told, empty

    def _told(self, captions: Sequence[str], sizes: Tensor) -> Condition:
        seen = sizes if self.base.xl else None
        device = self.accelerator.device
        if self.cache is not None:
            rows = [self.cache.rows[each] for each in captions]
            states = torch.from_numpy(self.cache.states[rows]).to(device, self._dtype)
            pooled = torch.from_numpy(self.cache.pooled[rows]).to(device, self._dtype) if self.base.xl else None
            return Condition(states, pooled, seen)
        tokens, full = self.base.tokens(captions)
        if self.text_learns:
            return Condition(None, None, seen, tuple(each.to(device) for each in tokens), full.to(device))
        with torch.no_grad():
            made = self.base.network.read(tokens, full.to(device))
        return Condition(*made, seen)

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.base.pipeline.encoders[0].model.dtype
        return dtype


def open_cache(
    folder: Path, data: Positions, key: str, base: Base, accelerator: Accelerator, say: Say
) -> Cache:  # fmt: skip
    """The cache in `folder` if it is whole and was made for this `key`, else a new one; every process makes its share.

    Raises TrainingError when a picture cannot be read, and when the disk is full or fails.
    """
    source, flip = data.source, data.how.flip
    captions = sorted({text for i in range(len(source)) for text in source.captions(i)} | {""})
    count = len(source)
    first = data.example(0, "", mirrored=False)
    assert first.pixels is not None  # noqa: S101 (the caller reads pixels here)
    with torch.no_grad():
        state, pooled = base.network.read(*_on(base.tokens([""]), accelerator.device))
    total = count * (1 + flip)
    shapes: Shapes = {
        "moments": ((total, *base.moments(first.pixels[None]).shape[1:]), np.float16),
        "sizes": ((total, 6), np.int32),
        "states": ((len(captions), *state.shape[1:]), np.float16),
        "pooled": ((len(captions), 0 if pooled is None else pooled.shape[1]), np.float16),
    }
    wanted = {"key": key, "shapes": {k: list(v[0]) for k, v in shapes.items()}}
    if not _usable(folder, wanted, shapes):
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _forget(folder)
            for name, shape in shapes.items():
                reserve(folder / name, _bytes(*shape), "the cache")
        accelerator.wait_for_everyone()
        _fill(_maps(folder, shapes, "r+"), data, captions, base, accelerator, say)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _keep(folder, wanted)
    return Cache(**_maps(folder, shapes, "r"), rows={text: i for i, text in enumerate(captions)}, mirrored=count)


def _fill(
    maps: Mapping[str, Any], data: Positions, captions: Sequence[str], base: Base, accelerator: Accelerator, say: Say
) -> None:
    """Encode this process's share."""
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    count = len(data.source)
    numbers, texts = list(range(len(maps["moments"])))[mine], list(range(len(captions)))[mine]
    with torch.no_grad():
        for start in range(0, len(texts), CHUNK):
            rows = texts[start : start + CHUNK]
            state, pooled = base.network.read(*_on(base.tokens([captions[i] for i in rows]), accelerator.device))
            maps["states"][rows] = state.float().cpu().numpy()
            if pooled is not None:
                maps["pooled"][rows] = pooled.float().cpu().numpy()
    for start in range(0, len(numbers), CHUNK):
        rows = numbers[start : start + CHUNK]
        made = [data.example(i % count, "", mirrored=i >= count) for i in rows]
        moments = base.moments(np.stack([each.pixels for each in made if each.pixels is not None]))
        maps["moments"][rows] = moments.cpu().numpy()
        maps["sizes"][rows] = [each.sizes for each in made]
        if start // CHUNK % 16 == 0:
            say(f"cache: {start + len(rows)}/{len(numbers)} pictures encoded")


def _on(made: tuple[tuple[Tensor, ...], Tensor], device: torch.device) -> tuple[tuple[Tensor, ...], Tensor]:
    return made[0], made[1].to(device)


def _usable(folder: Path, wanted: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether a whole cache lies there that was made as wanted. Half a note, or a file too short, is none."""
    try:
        note = json.loads((folder / NOTE).read_text("utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in shapes}
    except (OSError, ValueError):
        return False
    return bool(note == wanted) and sizes == {name: _bytes(*shape) for name, shape in shapes.items()}


def _forget(folder: Path) -> None:
    """What lies there is no cache from now on."""
    try:
        (folder / NOTE).unlink(missing_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot remove {folder / NOTE}: {why(error)}") from error


def _keep(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Note how the cache was made; until then it is none."""
    half = folder / f"{NOTE}.part"
    try:
        half.write_text(json.dumps(wanted), "utf-8")
        half.replace(folder / NOTE)
    except OSError as error:
        half.unlink(missing_ok=True)
        raise TrainingError(f"cannot write {folder / NOTE}: {why(error)}") from error


def _bytes(shape: tuple[int, ...], kind: Any) -> int:
    return math.prod(shape) * int(np.dtype(kind).itemsize)


def _maps(folder: Path, shapes: Shapes, mode: Any) -> dict[str, Any]:
    """The cache's files in memory. Raises TrainingError when the disk does not give them."""
    try:
        return {
            # An empty file cannot be mapped.
            name: np.memmap(folder / name, kind, mode, shape=shape) if np.prod(shape) else np.zeros(shape, kind)
            for name, (shape, kind) in shapes.items()
        }
    except OSError as error:
        raise TrainingError(f"cannot open the cache {folder}: {why(error)}") from error
