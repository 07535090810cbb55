"""Room on the disk, taken before it is written to."""

from __future__ import annotations

import os
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
