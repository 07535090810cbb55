"""Pictures with captions to learn from: a folder, WebDataset shards, or the painter."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import ExifTags, Image

from farm.painter import caption, paint, sample_scene
from workers.training import folders, shards
from workers.training.errors import TrainingError
from workers.training.folders import Captions

BROKEN = (OSError, ValueError, SyntaxError, TypeError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for a file that is no picture, is cut short in its pixels, tags or EXIF, or is absurdly large."""
_FLIP = Image.Transpose
TURNS = {
    2: _FLIP.FLIP_LEFT_RIGHT, 3: _FLIP.ROTATE_180, 4: _FLIP.FLIP_TOP_BOTTOM, 5: _FLIP.TRANSPOSE,
    6: _FLIP.ROTATE_270, 7: _FLIP.TRANSVERSE, 8: _FLIP.ROTATE_90,
}  # fmt: skip
"""What makes a picture upright, by EXIF's number for how the camera was held."""
NO_WHITE = {"F": "32-bit fractions", "I": "32-bit whole numbers"}
"""Modes of grey pictures that say nowhere which number is white: Pillow would make everything from 255 on white."""
BITS, PHOTOMETRIC = 258, 262
"""TIFF's tags for the bits of a number, and for which end of them is white: 0 where the lowest is."""
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
    """What the data is, by names, sizes in bytes and captions: equal for equal files in equal order.

    Raises TrainingError when a file has gone.
    """
    found = hashlib.sha256()
    for number in range(len(source)):
        # By the last part of the name: the folder may have moved. And not by time, which a copy has of its own.
        name = Path(source.label(number)).name
        found.update(json.dumps([name, _size(source, number), *source.captions(number)]).encode())
    return found.hexdigest()


def _size(source: Source, number: int) -> int:
    """Bytes of a picture's file; 0 for one that is painted."""
    if isinstance(source, Tars):
        return source.items[number].size
    if not isinstance(source, Folder):
        return 0
    path = source.items[number][0]
    try:
        return path.stat().st_size
    except OSError as error:
        raise TrainingError(f"{path} cannot be read as a picture: {error}") from error


def upright(picture: Image.Image) -> Image.Image:
    """RGB as a person sees it: turned as the camera says, transparency on white, 16-bit grey scaled to 8 bits.

    Raises ValueError for pictures of 32-bit numbers, and whatever else is in BROKEN.
    """
    _check_white(picture)
    picture.load()
    # Not by ImageOps.exif_transpose: it writes all of EXIF anew, and fails for a tag that nobody needs here.
    turn = TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    turned = _eight_bits(picture) if picture.mode.startswith("I;16") else picture
    if turn is not None:
        turned = turned.transpose(turn)
    if turned.mode in {"RGBA", "LA", "PA"} or "transparency" in turned.info:
        clear = turned.convert("RGBA")
        backdrop = Image.new("RGBA", clear.size, (255, 255, 255, 255))
        turned = Image.alpha_composite(backdrop, clear)
    return turned.convert("RGB")


def some(names: Sequence[str], most: int = 10) -> str:
    """The first names, and how many more there are.

    >>> some(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _check_white(picture: Image.Image) -> None:
    """Raises ValueError for a picture that does not say which of its numbers is white."""
    if numbers := NO_WHITE.get(picture.mode):
        raise ValueError(
            f"it holds {numbers} (mode {picture.mode}) and does not say which is white: "
            "save it as grey or RGB of 8 or 16 bits"
        )


def _eight_bits(picture: Image.Image) -> Image.Image:
    """A 16-bit grey picture as an 8-bit one; the number that a PNG names as transparent becomes white."""
    # TIFFs of scanners and X-rays may have 12.
    tags = getattr(picture, "tag_v2", {})
    white = 4095 if tags.get(BITS) == (12,) else 65535
    numbers = np.asarray(picture).astype(np.uint32)
    grey = ((numbers * 255 + white // 2) // white).clip(0, 255).astype(np.uint8)
    # Of 8 bits Pillow turns them around itself.
    if tags.get(PHOTOMETRIC) == 0:
        grey = 255 - grey
    clear = picture.info.get("transparency")
    if clear is not None:
        grey[numbers == clear] = 255
    return Image.fromarray(grey)


def _look(paths: Iterable[Path]) -> None:
    """Open every file without decoding it: hours later would be a bad time to learn that one is no picture."""
    broken = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                _check_white(picture)
        except BROKEN as error:
            broken.append(f"{path} ({error})")
    if broken:
        raise TrainingError(f"{len(broken)} files cannot be read as pictures: {some(broken)}")
