"""Which picture comes when, cut to size: a function of seed and position alone, whatever was stopped and resumed."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from workers.training.data import Source
from workers.training.errors import TrainingError


@dataclass(frozen=True, slots=True)
class Cut:
    """How pictures are made one size: `crop` is center or random, `flip` mirrors half of them."""

    width: int
    height: int
    crop: str = "center"
    flip: bool = False


@dataclass(frozen=True, slots=True)
class Example:
    """One picture for one step.

    `pixels` is uint8 (height, width, 3), or None where latents are cached. `sizes` is what SDXL is conditioned on:
    original height and width, top and left of the crop, target height and width.
    """

    number: int
    caption: str
    mirrored: bool
    pixels: NDArray[np.uint8] | None
    sizes: tuple[int, int, int, int, int, int]


def cut(picture: Image.Image, how: Cut, *, mirrored: bool, place: float) -> tuple[Image.Image, tuple[int, ...]]:
    """The picture scaled to cover the size and cropped; `place` 0..1 is where along what is too long.

    Mirrored first, as diffusers' scripts do, so that the crop's place is the place in what is seen.
    """
    original = picture.height, picture.width
    if mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = max(how.width / picture.width, how.height / picture.height)
    wide, high = max(how.width, round(picture.width * scale)), max(how.height, round(picture.height * scale))
    if (wide, high) != picture.size:
        picture = picture.resize((wide, high), Image.Resampling.LANCZOS)
    left, top = round((wide - how.width) * place), round((high - how.height) * place)
    cropped = picture.crop((left, top, left + how.width, top + how.height))
    return cropped, (*original, top, left, how.height, how.width)


@lru_cache(maxsize=2)
def order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The pictures of an epoch, shuffled."""
    return np.random.default_rng((seed, 11, epoch)).permutation(count)


class Positions(Dataset[Any]):
    """Example or TrainingError by position 0, 1, 2, ... in an endless row of shuffled epochs.

    An error is a value here, because a reading process would wrap it into its own traceback.
    """

    def __init__(self, source: Source, how: Cut, *, seed: int, drop: float, read: bool) -> None:
        self.source, self.how, self.seed, self.drop, self.read = source, how, seed, drop, read

    def __getitem__(self, position: int) -> Example | TrainingError:
        count = len(self.source)
        number = int(order(count, self.seed, position // count)[position % count])
        # Drawn in this order whatever is needed: options must not move each other's random numbers.
        dropped, mirrored, place, wording = np.random.default_rng((self.seed, 12, position)).random(4)
        captions = self.source.captions(number)
        text = "" if dropped < self.drop else captions[int(wording * len(captions))]
        try:
            return self.example(number, text, mirrored=self.how.flip and mirrored < 0.5, place=float(place))
        except TrainingError as error:
            return error

    def example(self, number: int, caption: str, *, mirrored: bool, place: float = 0.5) -> Example:
        """A picture cut to size, or only its number where pixels are not needed. Raises TrainingError."""
        if not self.read:
            return Example(number, caption, mirrored, None, (0,) * 6)
        where = place if self.how.crop == "random" else 0.5
        picture, sizes = cut(self.source.open(number), self.how, mirrored=mirrored, place=where)
        a, b, c, d, e, f = sizes
        return Example(number, caption, mirrored, np.array(picture), (a, b, c, d, e, f))


class Rows(Sampler[list[int]]):
    """The positions of one process, pass after pass, from pass `first` on, without end."""

    def __init__(self, size: int, process: int, processes: int, first: int) -> None:
        self.size, self.process, self.processes, self.first = size, process, processes, first

    def __iter__(self) -> Iterator[list[int]]:
        number = self.first
        while True:
            start = (number * self.processes + self.process) * self.size
            yield list(range(start, start + self.size))
            number += 1


def passes(data: Positions, rows: Rows, loaders: int) -> Generator[list[Example]]:
    """The examples of each pass. Raises TrainingError for a picture that cannot be read."""
    reader: DataLoader[Any] = DataLoader(
        data,
        batch_sampler=rows,
        num_workers=loaders,
        collate_fn=_together,
        # A fork would inherit the device.
        multiprocessing_context="spawn" if loaders else None,
    )
    with _deaf() if loaders else nullcontext():
        given = iter(reader)
    for found in given:
        if isinstance(found, TrainingError):
            raise found
        yield found


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes that are started in here never hear these signals; this one hears them afterwards.

    Ctrl-C reaches every process of a terminal, and a SIGTERM of systemd or Slurm every one of the group. A reader has
    to live until its trainer is done with the step, and may hear of it before it has come to its first line: so it
    inherits what it must not hear.
    """
    # Whoever starts multiprocessing's tracker lets the two signals through again: it has to run before.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _together(found: Sequence[Example | TrainingError]) -> list[Example] | TrainingError:
    made: list[Example] = []
    for each in found:
        if isinstance(each, TrainingError):
            return each
        made.append(each)
    return made
