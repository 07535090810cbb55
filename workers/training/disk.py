"""Room on the disk, taken before it is written to; and folders that change only when all of the new is there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workers.training.errors import TrainingError, why

PIECE = 1 << 20
"""Bytes of zeros written at once."""


def reserve(path: Path, size: int, what: str, head: bytes = b"") -> None:
    """A file of `head` and `size` bytes more, their space really taken: writing to a map of a file with holes kills the
    process when the disk is full.

    Raises TrainingError, which says `what` the room is for, when there is none; the file is gone then.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(head)
            file.flush()
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), len(head), size)
            else:
                # macOS knows no such call.
                for start in range(0, size, PIECE):
                    file.write(bytes(min(PIECE, size - start)))
    except OSError as error:
        path.unlink(missing_ok=True)
        raise TrainingError(f"cannot take {size} bytes for {what} {path}: {why(error)}") from error


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """A folder to write in. If all goes well, each of its files takes the place of the one in `folder`, which may hold
    more than these; if not, nothing is replaced."""
    # Of the folder itself, where a link leads to it: beside a link may be another disk.
    half = folder.resolve()
    half = half.with_name(f"{half.name}.part")
    shutil.rmtree(half, ignore_errors=True)
    try:
        half.mkdir(parents=True)
        yield half
        for path in sorted(path for path in half.rglob("*") if path.is_file()):
            place = folder / path.relative_to(half)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
    finally:
        shutil.rmtree(half, ignore_errors=True)
