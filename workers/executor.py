"""One micro-batch, start to finish: claim, stage, render, store, finish.

Two threads share one executor: while one renders inside the device lock, the other encodes and uploads what was
rendered before.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from threading import BoundedSemaphore, Event, Lock
from time import monotonic
from typing import Any, Protocol
from uuid import UUID

import structlog

from farm import doorbell, jobs
from farm.db import Database
from farm.errors import FarmError, NotFound, PermanentError, RenderFailed, Unavailable
from farm.ids import new_id
from farm.jobs import Claimed, ClaimedJob, Result, Warm
from farm.logs import about
from farm.recipe import Recipe
from farm.settings import Settings
from farm.states import Outcome
from farm.storage import Store
from workers.exits import Exit, end_process
from workers.gate import Gate, Pace, Turn
from workers.lease import Held, Lease
from workers.leaving import Leaving
from workers.pictures import Pixels
from workers.resting import UNFORESEEN
from workers.sources import Sources
from workers.storing import Answer, Storing

THREADS = 2
"""Micro-batches in work at once: one on the device, one on its way to S3."""
ASK_AGAIN_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0)
"""Pauses between tries while Postgres is away; the last one repeats."""

ALONE_LOOK_SECONDS = 0.05

log = structlog.get_logger(__name__)


class Renderer(Protocol):
    """What turns recipes into pictures. `stage` runs outside the device lock, `render` inside it.

    `micro_batch`: most images denoised together, where the settings leave that open.
    """

    @property
    def micro_batch(self) -> int: ...

    def warm_state(self) -> Any: ...

    def warm(self) -> list[dict[str, Any]]: ...

    def cache(self) -> dict[str, Any]: ...

    def stage(self, recipes: Sequence[Recipe], pictures: Mapping[str, Pixels]) -> Any: ...

    def render(
        self, staged: Any, recipes: Sequence[Recipe], on_step: Callable[[int, int], Collection[int]]
    ) -> Sequence[Pixels | None]: ...


class Watcher(Protocol):
    """Told of every micro-batch as it goes; answers at once and raises nothing."""

    def began(self, claimed: Claimed) -> None: ...

    def ended(self, claimed: Claimed, results: Sequence[Result], seconds: float) -> None: ...


class Executor:
    """Everything one worker process does with jobs. `work` may be called by any thread at any time."""

    def __init__(
        self,
        database: Database,
        store: Store,
        renderer: Renderer,
        settings: Settings,
        worker_id: UUID,
        *,
        leaving: Leaving | None = None,
        lease: Lease | None = None,
        watcher: Watcher | None = None,
        end: Callable[[Exit, str], None] = end_process,
    ) -> None:
        self.database = database
        self._renderer = renderer
        self.settings = settings
        self.worker = worker_id
        self.leaving = leaving or Leaving(settings.grace.total_seconds(), end=end)
        self.lease = lease or Lease(
            database, settings, worker_id, self.leaving, warm=renderer.warm, cache=renderer.cache, end=end
        )
        self._watcher = watcher
        self._storing = Storing(store, settings)
        self._sources = Sources(store, settings)
        self._slots = BoundedSemaphore(THREADS)
        self._device = Lock()
        self._gate = Gate(self.leaving)
        self._pace = Pace()
        self._unanswered: UUID | None = None
        self.more_work = Event()
        """Set when a claim left work behind, so that a second thread comes without waiting for a doorbell."""
        self.claims = 0
        """Micro-batches claimed so far."""

    def work(self) -> None:
        """Work until there is nothing to claim. Returns at once when enough threads are at it already."""
        if not self._slots.acquire(blocking=False):
            return
        try:
            while self.work_once():
                pass
        finally:
            self._slots.release()

    def work_once(self) -> bool:
        """Claim one micro-batch and see it through; answers whether there was one."""
        with self._gate.turn() as turn:
            started = monotonic()
            claimed = self._claim() if turn else None
            if claimed is None:
                return False
            with about(claim=claimed.claim_id, worker=self.worker), self.lease.hold(claimed) as held:
                if self._watcher is not None:
                    self._watcher.began(claimed)
                results = self._see_through(held, turn, started)
                self._finish(held, results)
                if self.lease.rests.learn(claimed, results):
                    self.lease.beat_soon()
                if self._watcher is not None:
                    self._watcher.ended(claimed, results, monotonic() - started)
        return True

    def try_out(self, recipe: Recipe, pictures: Mapping[str, Pixels]) -> Pixels:
        """Render one picture that is no job, between micro-batches: what a model must pass before jobs may name it.

        `pictures` holds what the recipe draws from, by hash. Raises what staging and rendering raise.
        """
        staged = self._renderer.stage([recipe], pictures)
        with self._device:
            (picture,) = self._renderer.render(staged, [recipe], lambda _step, _steps: ())
        if picture is None:
            raise RenderFailed("the pipeline answered no picture")
        return picture

    def _claim(self) -> Claimed | None:
        warm = self.warm()
        # Without an answer to our COMMIT the jobs may be ours already: the same id again finds them.
        claim_id = self._unanswered or new_id()
        self._unanswered = claim_id
        try:
            with self.database.transaction() as conn:
                claimed = jobs.claim(
                    conn,
                    claim_id=claim_id,
                    worker=self.worker,
                    pool=self.settings.pool,
                    warm=warm,
                    limit=self.settings.micro_batch or self._renderer.micro_batch,
                    settings=self.settings,
                )
        except Unavailable as error:
            log.warning("could not ask for work", error=error.message)
            return None
        self._unanswered = None
        self.claims += claimed is not None
        if claimed is not None and claimed.more:
            doorbell.ring(self.settings, self.settings.pool)
            self.more_work.set()
        return claimed

    def warm(self) -> Warm:
        """What is warm, and what the other thread holds: the device will be warm for it by the time we get it."""
        # The pace first: one that is known beside lanes that are not would leave our own next jobs to others.
        pace = self._pace.render.seconds
        held = [job.recipe for one in self.lease.held for job in one.jobs]
        state = self._renderer.warm_state()
        return Warm(
            {**state.lanes, **{recipe.lane: recipe.adapter_set for recipe in held}},
            frozenset(state.checkpoints).union(recipe.checkpoint for recipe in held),
            pace,
            state.mixes,
            frozenset(state.apart),
            self.lease.rests.keys,
        )

    def _see_through(self, held: Held, turn: Turn, started: float) -> list[Result]:
        """Every job's result, in order; never raises."""
        answers = self._answers(held, held.jobs, turn, started)
        turn.over()
        held.enter("store", self.settings.limit_store.total_seconds())
        results = self._storing.store(held, answers, self._unrendered, self.leaving)
        self._pace.store.took(held.seconds)
        return results

    def _answers(self, held: Held, some: Sequence[ClaimedJob], turn: Turn, started: float) -> list[Answer]:
        """Per job its picture, None where it was dropped, or the error that is to blame."""
        recipes = [job.recipe for job in some]
        try:
            held.enter("load", self.settings.limit_load.total_seconds())
            staged = self._renderer.stage(recipes, self._sources.fetch(some))
            self._pace.ahead.took(monotonic() - started)
        except Exception as error:  # noqa: BLE001  # a job must end with a reason whatever the libraries raise
            self._report(error)
            if len(some) == 1 or not isinstance(error, NotFound):
                return [error] * len(some)
            return self._one_by_one(held, some, turn)
        try:
            return list(self._render(held, some, staged, turn))
        except Exception as error:  # noqa: BLE001
            self._report(error)
            if len(some) == 1 or not _may_be_ones_fault(error):
                return [error] * len(some)
        return self._one_by_one(held, some, turn)

    def _one_by_one(self, held: Held, some: Sequence[ClaimedJob], turn: Turn) -> list[Answer]:
        # One recipe may have spoiled it for all, so each gets its own chance before anybody spends an attempt.
        log.info("rendering one by one", jobs=len(some))
        return [answer for job in some for answer in self._answers(held, [job], turn, monotonic())]

    def _render(self, held: Held, some: Sequence[ClaimedJob], staged: Any, turn: Turn) -> Sequence[Pixels | None]:
        step_limit = self.settings.limit_step.total_seconds()
        held.enter("wait")
        if some[0].alone:
            turn.keep()
            self._be_alone()
        with self._device:
            if held.lost or self.leaving.requested.is_set():
                _close(staged)
                return [None] * len(some)
            first = step_limit if some[0].recipe.lane in self._renderer.warm_state().lanes else None
            # A cold pipeline moves to the device and may be compiled before its first step.
            held.enter("merge", first or self.settings.limit_load.total_seconds())
            began = monotonic()

            def on_step(step: int, steps: int) -> Collection[int]:
                last = step >= steps
                held.enter("decode" if last else "step", step_limit)
                each = (monotonic() - began) / step
                to_go = each * (steps - step) + self._pace.decode.seconds
                if last or self._pace.claim_is_due(to_go, each):
                    turn.over()
                return self._dropped(held, some, to_go + self._pace.store.seconds)

            pictures = self._renderer.render(staged, [job.recipe for job in some], on_step)
            if held.phase == "decode":
                self._pace.decode.took(held.seconds)
            self._pace.render.took(monotonic() - began)
            return pictures

    def _be_alone(self) -> None:
        """Wait until the other thread is done: a job under suspicion of crashing must not take others along."""
        while len(self.lease.held) > 1:
            Event().wait(ALONE_LOOK_SECONDS)

    def _dropped(self, held: Held, some: Sequence[ClaimedJob], seconds_to_go: float) -> Collection[int]:
        """Which of these jobs need no picture: cancelled ones, or all when it would come too late."""
        if held.lost or seconds_to_go > self.leaving.seconds_left:
            return range(len(some))
        if not held.cancelled:
            return ()
        return [index for index, job in enumerate(some) if job.id in held.cancelled]

    def _unrendered(self, held: Held, job: ClaimedJob, error: Exception | None) -> Result:
        """Why this job has no picture. A permanent error would come again, every other may pass."""
        if job.id in held.cancelled:
            return Result(job.id, job.attempt, Outcome.CANCELLED)
        if error is None and (held.lost or self.leaving.requested.is_set()):
            return Result(job.id, job.attempt, Outcome.GIVEN_BACK)
        error = error or RenderFailed("the pipeline answered no picture")
        outcome = Outcome.FAILED if isinstance(error, PermanentError) else Outcome.RETRY
        code, message = (error.code, error.message) if isinstance(error, FarmError) else (UNFORESEEN, repr(error))
        return Result(job.id, job.attempt, outcome, error_code=code, error_message=message[:2000])

    def _finish(self, held: Held, results: Sequence[Result]) -> None:
        """Tell the database, however long it is away: only its answer says whether a result counted."""
        held.enter("finish")
        answer: dict[UUID, Any] = {}
        for pause in _patiently():
            try:
                with self.database.transaction() as conn:
                    answer = jobs.finish(conn, claim_id=held.claim_id, results=results, settings=self.settings)
                break
            except Unavailable as error:
                log.warning("holding results", jobs=len(results), error=error.message)
                Event().wait(pause)
        for result in results:
            with about(job=result.job_id, attempt=result.attempt):
                self._log(result, str(answer.get(result.job_id)))

    def _log(self, result: Result, answer: str) -> None:
        if answer != "done":
            log.warning("result came too late: the attempt was lost", outcome=result.outcome.value)
        elif result.outcome in (Outcome.RETRY, Outcome.FAILED):
            log.warning("job failed", outcome=result.outcome.value, code=result.error_code, error=result.error_message)
        else:
            log.debug("job ended", outcome=result.outcome.value)

    def give_back(self) -> None:
        """Give back whatever is still held, for threads that hang while the process must go. Raises nothing."""
        for held in self.lease.held:
            results = [Result(job.id, job.attempt, Outcome.GIVEN_BACK) for job in held.jobs]
            try:
                with self.database.transaction() as conn:
                    jobs.finish(conn, claim_id=held.claim_id, results=results, settings=self.settings)
            except Exception as error:  # noqa: BLE001  # the process ends next; the lease does the rest
                log.warning("not given back", claim=str(held.claim_id), error=repr(error)[:300])

    def drain(self) -> None:
        """Wait until no thread works any more, and let none begin again."""
        for _ in range(THREADS):
            self._slots.acquire()

    def _report(self, error: Exception) -> None:
        if not isinstance(error, FarmError):
            log.error("micro-batch failed", exc_info=error)
            return
        log.warning("micro-batch failed", code=error.code, error=error.message)
        if error.details.get("fatal"):
            # What is on its way to S3 still gets there; a device that is lost stays lost to this process.
            log.critical("the device is lost: finishing what is held, then leaving")
            self.leaving.request(Exit.DEVICE, hurry=False)


def _may_be_ones_fault(error: Exception) -> bool:
    """Whether the other jobs of a micro-batch could be rendered without the one that raised this."""
    if isinstance(error, FarmError):
        return isinstance(error, RenderFailed) and not error.details.get("fatal")
    return True


def _patiently() -> Iterator[float]:
    yield from ASK_AGAIN_SECONDS
    while True:
        yield ASK_AGAIN_SECONDS[-1]


def _close(staged: Any) -> None:
    close = getattr(staged, "close", None)
    if close is not None:
        close()
