"""What the client does between requests: retry, wait, page, save. Written once, as generators that do no I/O.

A flow yields an effect (send this, sleep so long, run this blocking function) and is sent its result; its return value
is the answer. `Farm` carries effects out with threads and blocking sockets, `AsyncFarm` with asyncio, and neither
decides anything.
"""

import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from random import Random
from typing import Any, Generic, TypeVar

import httpx

from farm.backoff import backoff
from farm.client.calls import Call
from farm.client.problems import error_from
from farm.errors import FarmError, TransientError, Unavailable
from farm.views import BatchView, JobView

T = TypeVar("T")

TRIES = 5
"""How often one repeatable request is sent at most."""
FIRST_PAUSE = timedelta(seconds=0.2)
LONGEST_PAUSE = timedelta(seconds=5)
PATIENCE = 60.0
"""Seconds that `wait` puts up with a farm that does not answer: an API that restarts loses nobody's work."""
POLL_FIRST, POLL_LONGEST, POLL_GROWTH = 0.1, 2.0, 1.3
"""Seconds between two looks at a job or batch. Looking costs the farm the same however large the batch is."""

NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
"""Failures before a byte of the request left: repeating it is safe whatever it was."""


@dataclass(frozen=True)
class Answer:
    """A response read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Send(Generic[T]):
    """Effect: make this request; the result is an Answer, or an httpx.TransportError is thrown in."""

    call: Call[T]


@dataclass(frozen=True)
class Sleep:
    """Effect: let so many seconds pass."""

    seconds: float


@dataclass(frozen=True)
class Block(Generic[T]):
    """Effect: run this function, which touches the disk; the result is what it returns."""

    function: Callable[[], T]


Flow = Generator[Send[Any] | Sleep | Block[Any], Any, T]


def request(call: Call[T], random: Random, tries: int = TRIES) -> Flow[T]:
    """Send it, again if that is safe and can help, and read the answer. Raises what the farm says went wrong."""
    failures = 0
    while True:
        answer: Answer | None = None
        failure: Exception
        try:
            answer = yield Send(call)
            if answer.status < 400:
                return _read(call, answer)
            failure = error_from(answer.status, answer.body)
            again = call.repeatable and isinstance(failure, TransientError)
        except httpx.TransportError as error:
            failure = Unavailable(f"no answer from the farm ({_where(call, error)}): {error or type(error).__name__}")
            again = isinstance(error, NEVER_SENT) or call.repeatable
        failures += 1
        if not again or failures >= tries:
            raise failure
        yield Sleep(_pause(failures, answer, random))


def _read(call: Call[T], answer: Answer) -> T:
    try:
        return call.read(answer.body)
    except ValueError as error:
        raise FarmError(f"{call.method} {call.path}: this is no answer of a farm ({error})") from error


def _pause(failures: int, answer: Answer | None, random: Random) -> float:
    """Seconds before the next try: at least what the farm asks for in Retry-After, within our own bound."""
    seconds = backoff(failures, FIRST_PAUSE, LONGEST_PAUSE, random).total_seconds()
    asked = answer.headers.get("retry-after", "") if answer else ""
    return max(seconds, min(float(asked), LONGEST_PAUSE.total_seconds())) if asked.isdecimal() else seconds


def _where(call: Call[Any], error: httpx.TransportError) -> str:
    try:
        url = error.request.url
    except RuntimeError:  # httpx: no request is bound to this error
        return call.path.split("?")[0]
    return f"{url.scheme}://{url.netloc.decode()}"


def job_done(job: JobView) -> bool:
    return job.state.terminal


def batch_done(batch: BatchView) -> bool:
    return batch.done


V = TypeVar("V", JobView, BatchView)


def wait(
    look: Call[V],
    done: Callable[[V], bool],
    timeout: float | None,
    on_progress: Callable[[V], object] | None,
    random: Random,
) -> Flow[V]:
    """Look until it is done; tell `on_progress` each view that is new. Raises TimeoutError after `timeout` seconds.

    It always looks at least once: a view from before a retry may say done when the farm no longer does.
    """
    answered = started = time.monotonic()
    interval = POLL_FIRST
    seen: V | None = None
    while True:
        try:
            fresh = yield from request(look, random, tries=1)
            answered = time.monotonic()
            if on_progress and fresh != seen:
                on_progress(fresh)
            seen = fresh
            if done(fresh):
                return fresh
        except TransientError:
            if seen is None or time.monotonic() - answered > PATIENCE:
                raise
        left = float("inf") if timeout is None else started + timeout - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"not done after {timeout:g} s: {look.path}")
        yield Sleep(min(interval, left))
        interval = min(interval * POLL_GROWTH, POLL_LONGEST)
