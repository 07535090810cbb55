"""When a failed attempt is repeated: exponential, bounded, jittered. Pure."""

from datetime import timedelta
from random import Random


def backoff(failures: int, first: timedelta, longest: timedelta, random: Random) -> timedelta:
    """How long to wait before the try after the `failures`-th failure (>= 1).

    The pause doubles with each failure up to `longest`; of that, half is fixed and half drawn, so that jobs which
    failed together do not come back together.

    >>> backoff(1, timedelta(seconds=2), timedelta(minutes=5), Random(0)) <= timedelta(seconds=2)
    True
    >>> backoff(50, timedelta(seconds=2), timedelta(minutes=5), Random(0)) >= timedelta(minutes=2.5)
    True
    """
    if failures < 1:
        raise ValueError("failures counts from 1")
    whole = min(first * (1 << min(failures - 1, 32)), longest)
    return whole / 2 + whole / 2 * random.random()
