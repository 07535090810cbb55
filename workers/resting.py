"""Leaving a pipeline to others: what this worker fails several times in a row, it does not claim for a while.

Counted by checkpoint and by lane, as claims choose by these: a checkpoint that cannot be loaded here fails in every
lane of it, a size that does not fit fails in its own lanes only, whatever succeeds beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from threading import Lock
from time import monotonic
from typing import Any, Literal

import structlog

from farm.backoff import backoff
from farm.errors import IntegrityFailed, InvalidModel, OutOfMemory, RenderFailed
from farm.jobs import Claimed, Result
from farm.settings import Settings
from farm.states import Outcome

UNFORESEEN = "internal"
"""The code of an error that nobody foresaw; see `Executor`."""
OF_THE_ENGINE = frozenset(
    {OutOfMemory.code, RenderFailed.code, IntegrityFailed.code, InvalidModel.code, UNFORESEEN},
)
"""Codes of failures that another worker might not have. A server that is away, or an upload that is gone, is away and
gone for all."""

MOST = 1000
"""Checkpoints and lanes whose failures are counted; the oldest are forgotten."""

log = structlog.get_logger(__name__)

_jitter = Random()  # noqa: S311  # spreads tries, guards nothing


@dataclass
class _Row:
    """Failures in a row of one checkpoint or lane, with the last one's code, and until when we rest from it."""

    of: Literal["checkpoint", "lane"]
    checkpoint: str
    failures: int = 0
    code: str = ""
    until: float = float("-inf")


class Rests:
    """Which checkpoints and lanes this worker rests from. Threads may share it. In seconds of `clock`."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._lock = Lock()
        self._rows: dict[str, _Row] = {}

    def learn(self, claimed: Claimed, results: Sequence[Result]) -> bool:
        """What came of a micro-batch: one picture of it ends the row, none for the engine's fault makes it longer.

        Answers whether anything changed that others should hear soon. What was cancelled, given back, or failed for
        other reasons says nothing.
        """
        recipe = claimed.jobs[0].recipe
        keys: tuple[tuple[str, Literal["checkpoint", "lane"]], ...] = (
            (recipe.checkpoint, "checkpoint"),
            (claimed.lane, "lane"),
        )
        if any(result.outcome is Outcome.SUCCEEDED for result in results):
            with self._lock:
                ended = [row for key, _ in keys if (row := self._rows.pop(key, None)) is not None]
            rested = [row for row in ended if row.failures >= self._settings.rest_after]
            for row in rested:
                log.info("renders again what it rested from", of=row.of, checkpoint=row.checkpoint, lane=claimed.lane)
            return bool(rested)
        codes = [result.error_code for result in results if result.error_code in OF_THE_ENGINE]
        if not codes:
            return False
        with self._lock:
            rests = [self._failed(key, of, recipe.checkpoint, codes[0]) for key, of in keys]
            while len(self._rows) > MOST:
                del self._rows[next(iter(self._rows))]
        return any(rests)

    def _failed(self, key: str, of: Literal["checkpoint", "lane"], checkpoint: str, code: str) -> bool:
        row = self._rows.setdefault(key, _Row(of, checkpoint))
        row.failures, row.code = row.failures + 1, code
        beyond = row.failures - self._settings.rest_after
        if beyond < 0:
            return False
        pause = backoff(beyond + 1, self._settings.rest, self._settings.rest_max, _jitter).total_seconds()
        row.until = self._clock() + pause
        log.warning(
            "rests from what it fails, while other workers can take it",
            of=of,
            hash=key,
            checkpoint=checkpoint,
            failures=row.failures,
            code=code,
            seconds=round(pause, 1),
        )
        return True

    @property
    def keys(self) -> frozenset[str]:
        """Hashes of checkpoints and lanes that are rested from just now."""
        return frozenset(one["hash"] for one in self.told())

    def told(self) -> list[dict[str, Any]]:
        """The same for others to read: `of` (checkpoint or lane), `hash`, `checkpoint`, `failures` in a row, `code` of
        the last one, `seconds` left."""
        now = self._clock()
        with self._lock:
            return [
                {
                    "of": row.of,
                    "hash": key,
                    "checkpoint": row.checkpoint,
                    "failures": row.failures,
                    "code": row.code,
                    "seconds": round(row.until - now, 1),
                }
                for key, row in self._rows.items()
                if row.until > now
            ]
