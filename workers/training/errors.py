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


def exit_status(work: Callable[[], str]) -> int:
    """Does a trainer's work and tells what it made, or on stderr why there is nothing.

    0, or UNFINISHED when its time was over, or 1 when it cannot go on.
    """
    try:
        made = work()
    except UnfinishedError as pause:
        sys.stderr.write(f"{pause}\n")
        return UNFINISHED
    except (TrainingError, OSError) as error:
        sys.stderr.write(f"training stopped: {error}\n")
        return 1
    sys.stdout.write(f"{made}\n")
    return 0
