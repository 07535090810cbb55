"""Pictures with captions to learn from: a folder, WebDataset shards, or the painter."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

from farm.painter import caption, paint, sample_scene
from workers.training import folders, shards
from workers.training.errors import TrainingError
from workers.training.folders import Captions

BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for a file that is no picture, is cut short, or is absurdly large."""
PAINTED = 10_000
"""Painted walls, unless `painter:COUNT` says otherwise."""


class Source(Protocol):
    """Pictures by number. Safe to send to another process."""

    def __len__(self) -> int: ...

    def captions(self, number: int) -> Captions:
        """One or several wordings, of which a step takes one."""

    def label(self, number: int) -> str:
        """What to call the picture in an error."""

    def open(self, number: int) -> Image.Image:
        """The picture, RGB, upright. Raises TrainingError when it cannot be read."""


@dataclass(frozen=True)
class Folder:
    """Files on disk."""

    root: Path
    items: Sequence[tuple[Path, Captions]]

    def __len__(self) -> int:
        return len(self.items)

    def captions(self, number: int) -> Captions:
        return self.items[number][1]

    def label(self, number: int) -> str:
        return str(self.items[number][0])

    def open(self, number: int) -> Image.Image:
        path = self.items[number][0]
        try:
            with Image.open(path) as picture:
                return upright(picture)
        except BROKEN as error:
            raise TrainingError(f"{path} cannot be read as a picture: {error}") from error


@dataclass(frozen=True)
class Tars:
    """Samples inside tar files, read in place: nothing is unpacked."""

    items: Sequence[shards.Sample]

    def __len__(self) -> int:
        return len(self.items)

    def captions(self, number: int) -> Captions:
        return self.items[number].captions

    def label(self, number: int) -> str:
        item = self.items[number]
        return f"{item.shard}:{item.name}"

    def open(self, number: int) -> Image.Image:
        try:
            with Image.open(io.BytesIO(self.items[number].read())) as picture:
                return upright(picture)
        except BROKEN as error:
            raise TrainingError(f"{self.label(number)} cannot be read as a picture: {error}") from error


@dataclass(frozen=True)
class Painter:
    """Walls painted when they are asked for; wall `n` is the same whenever it is."""

    count: int
    width: int
    height: int
    seed: int
    wordings: int = 4
    _kept: dict[int, Captions] = field(default_factory=dict, compare=False, repr=False)

    def __len__(self) -> int:
        return self.count

    def captions(self, number: int) -> Captions:
        if number not in self._kept:
            rng = np.random.default_rng((self.seed, number))
            scene = sample_scene(rng)
            self._kept[number] = tuple(caption(scene, rng) for _ in range(self.wordings))
        return self._kept[number]

    def label(self, number: int) -> str:
        return f"painted wall {number}"

    def open(self, number: int) -> Image.Image:
        scene = sample_scene(np.random.default_rng((self.seed, number)))
        return Image.fromarray(paint(scene, self.width, self.height, self.seed * 10_000_019 + number).picture)


def open_source(said: str, column: str, size: tuple[int, int], seed: int) -> Source:
    """The pictures that `--data` names, every caption read and every picture file of a folder looked at.

    `size` is the width and height of painted walls. Raises TrainingError when there are none, when captions are
    missing, and when files are no pictures, naming the first of them.
    """
    kind, _, count = said.partition(":")
    if kind == "painter" and not Path(said).exists():
        if count and not (count.isdecimal() and int(count)):
            raise TrainingError(f"--data {said}: write painter:COUNT with a number from 1, such as painter:5000")
        walls = Painter(int(count or PAINTED), *size, seed)
        try:
            walls.open(0)
        except ValueError as error:
            raise TrainingError(f"--data {said}: {error}") from error
        return walls
    tars = shards.files(said)
    source: Source
    if tars:
        source = Tars([sample for path in tars for sample in shards.index(path, column)])
    else:
        root = Path(said)
        if not root.is_dir():
            raise TrainingError(f"--data {said}: no such folder or shards; or write painter for painted walls")
        source = Folder(root, folders.items(root, column))
        _look(path for path, _ in source.items)
    if not len(source):
        raise TrainingError(f"--data {said}: holds no pictures ({', '.join(sorted(folders.ENDINGS))})")
    missing = [
        source.label(i) for i in range(len(source)) if not all(map(str.strip, source.captions(i) or ("",)))
    ]  # fmt: skip
    if missing:
        raise TrainingError(
            f"--data {said}: {len(missing)} of {len(source)} pictures have no caption: {some(missing)}. Put it into "
            f"metadata.jsonl or metadata.csv (columns file_name and {column}), or into a .txt beside the picture"
        )
    return source


def fingerprint(source: Source) -> str:
    """What the data is, by names and captions: equal for equal order and wording."""
    found = hashlib.sha256()
    for number in range(len(source)):
        # By the last part of the name: the folder may have moved.
        name = Path(source.label(number)).name
        found.update(json.dumps([name, *source.captions(number)]).encode())
    return found.hexdigest()


def upright(picture: Image.Image) -> Image.Image:
    """RGB as a person sees it: turned as the camera says, transparency on white."""
    turned = ImageOps.exif_transpose(picture)
    if turned.mode in {"RGBA", "LA", "PA"} or "transparency" in turned.info:
        clear = turned.convert("RGBA")
        white = Image.new("RGBA", clear.size, (255, 255, 255, 255))
        turned = Image.alpha_composite(white, clear)
    return turned.convert("RGB")


def some(names: Sequence[str], most: int = 10) -> str:
    """The first names, and how many more there are.

    >>> some(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _look(paths: Iterable[Path]) -> None:
    """Open every file without decoding it: hours later would be a bad time to learn that one is no picture."""
    broken = []
    for path in paths:
        try:
            with Image.open(path):
                pass
        except BROKEN as error:
            broken.append(f"{path} ({error})")
    if broken:
        raise TrainingError(f"{len(broken)} files cannot be read as pictures: {some(broken)}")
