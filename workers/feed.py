"""What Flower sees: one task event trail per micro-batch, under the claim's id, with arguments a person can read.

Celery's own events would tell of doorbells, which say nothing and may find no work at all. These tell of claims,
whoever woke the thread. They go out in a thread of their own, so that a broker that hangs delays no picture.
"""

from collections.abc import Sequence
from queue import Full, Queue
from threading import Thread
from typing import Any

import structlog
from celery import Celery

from farm import doorbell
from farm.jobs import Claimed, Result
from farm.states import Outcome

MOST_WAITING = 256
"""Events kept while the broker is away; later ones are dropped."""
PROMPT_LETTERS = 60

log = structlog.get_logger(__name__)


class Feed:
    """A Watcher of the executor that tells Celery's event exchange. `hostname` is the Celery worker's own."""

    def __init__(self, app: Celery, hostname: str, pool: str) -> None:
        self._app = app
        self._hostname = hostname
        self._pool = pool
        self._waiting: Queue[tuple[str, dict[str, Any]]] = Queue(MOST_WAITING)

    def start(self) -> None:
        Thread(target=self._run, name="feed", daemon=True).start()

    def began(self, claimed: Claimed) -> None:
        uuid = str(claimed.claim_id)
        told = {"name": doorbell.TASK, "args": "()", "kwargs": readable(claimed, self._pool), "retries": 0}
        self._tell("task-received", uuid=uuid, root_id=uuid, parent_id=None, eta=None, expires=None, **told)
        self._tell("task-started", uuid=uuid)

    def ended(self, claimed: Claimed, results: Sequence[Result], seconds: float) -> None:
        outcomes: dict[str, int] = {}
        for result in results:
            outcomes[result.outcome.value] = outcomes.get(result.outcome.value, 0) + 1
        told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
        bad = [one for one in results if one.outcome in (Outcome.RETRY, Outcome.FAILED)]
        uuid = str(claimed.claim_id)
        if bad and len(bad) == len(results):
            self._tell("task-failed", uuid=uuid, exception=f"{told}: {bad[0].error_message[:200]!r}", traceback="")
        else:
            self._tell("task-succeeded", uuid=uuid, result=told, runtime=seconds)

    def _tell(self, event: str, **fields: Any) -> None:
        try:
            self._waiting.put_nowait((event, fields))
        except Full:
            log.debug("event dropped: the broker is away", about=event)

    def _run(self) -> None:
        while True:
            event, fields = self._waiting.get()
            try:
                with (
                    self._app.connection_for_write() as connection,
                    self._app.events.Dispatcher(connection, hostname=self._hostname, buffer_while_offline=False) as to,
                ):
                    while True:
                        to.send(event, **fields)
                        event, fields = self._waiting.get()
            except Exception as error:  # noqa: BLE001  # events are for onlookers: any trouble costs the event, no more
                log.debug("event not sent", error=repr(error)[:300])


def readable(claimed: Claimed, pool: str) -> str:
    """A micro-batch in one line: pool, lane, how many jobs, checkpoint, adapters, steps and size, first prompt.

    As Python writes texts, so that no control or bidi character of a prompt goes out.
    """
    first = claimed.jobs[0]
    recipe, prompt = first.recipe, first.recipe.prompt
    told = {
        "pool": pool,
        "jobs": len(claimed.jobs),
        "lane": claimed.lane[:8],
        "checkpoint": first.names.get("checkpoint", recipe.checkpoint[:8]),
        "adapters": [use["name"] for use in first.names.get("adapters", [])],
        "steps": recipe.steps,
        "size": f"{recipe.width}x{recipe.height}",
        "prompt": prompt if len(prompt) <= PROMPT_LETTERS else prompt[: PROMPT_LETTERS - 1] + "…",
    }
    return repr(told)
