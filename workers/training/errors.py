"""What a trainer says when it stops."""


class TrainingError(Exception):
    """Training cannot go on; the last good checkpoint is still there."""
