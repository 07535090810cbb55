"""Shares of failed jobs, as webhooks and batches are set to."""


def reached(failed: int, jobs: int, share: float) -> bool:
    """Whether so many of these jobs failed as the share (above 0, at most 1) says; one at least.

    A share such as 0.7 of 10 is a little more than 7 in floating point.

    >>> reached(7, 10, 0.7), reached(6, 10, 0.7), reached(0, 10, 1e-9)
    (True, False, False)
    """
    return failed > 0 and failed >= share * jobs - 1e-6
