"""What a trainer says when it stops."""

from __future__ import annotations

import sys
from collections.abc import Callable

UNFINISHED = 3
"""Exit status of a program that ended because its time was over; the same command goes on."""


class TrainingError(Exception):
    """Training cannot go on; the last good checkpoint is still there."""


class UnfinishedError(TrainingError):
    """The time given was over before the last step. What comes next must not begin with half of it."""


def reason(error: Exception) -> str | None:
    """In one sentence, what stopped a trainer from outside: a disk, the memory, a process that was killed.

    None for anything else: a fault of the program, of which the traceback is wanted.
    """
    # Only where something went wrong: whoever reads pictures needs neither torch nor pipelines for it.
    from safetensors import SafetensorError

    from workers.pipelines.device import is_out_of_memory

    text = str(error).strip() or type(error).__name__
    first = text.splitlines()[0]
    if isinstance(error, TrainingError):
        return text
    # An OSError of its own, from Rust.
    if isinstance(error, SafetensorError):
        return f"cannot read or write weights: {first}"
    if isinstance(error, OSError):
        return f"{error.filename}: {why(error)}" if error.filename is not None else first
    if is_out_of_memory(error):
        # What follows is how full torch found the device, sentence after sentence.
        return f"no memory is left ({'. '.join(first.split('. ')[:2]).rstrip('.')})"
    # torch says it from a signal handler, so that it comes up anywhere.
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return f"a process that reads pictures died ({first.rstrip('.')})"
    return None


def why(error: OSError) -> str:
    """What the system says, without number and path.

    >>> why(PermissionError(13, "Permission denied", "a.txt"))
    'Permission denied'
    """
    return error.strerror or str(error)


def exit_status(work: Callable[[], str]) -> int:
    """Does a trainer's work and tells what it made, or on stderr why there is nothing.

    0, or UNFINISHED when its time was over, or 1 when it cannot go on.
    """
    try:
        made = work()
    except UnfinishedError as pause:
        sys.stderr.write(f"{pause}\n")
        return UNFINISHED
    except Exception as error:
        said = reason(error)
        if said is None:
            raise
        sys.stderr.write(f"training stopped: {said}\n")
        return 1
    sys.stdout.write(f"{made}\n")
    return 0
