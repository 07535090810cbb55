"""What a trainer says when it stops."""

UNFINISHED = 3
"""Exit status of a program that ended because its time was over; the same command goes on."""


class TrainingError(Exception):
    """Training cannot go on; the last good checkpoint is still there."""


class UnfinishedError(TrainingError):
    """The time given was over before the last step. What comes next must not begin with half of it."""
