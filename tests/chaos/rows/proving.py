"""R13: the suite tests itself. With one safety device switched off it has to find something wrong, each time."""

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta

from tests.chaos.faults import Faults
from tests.chaos.harness import Chaos
from tests.chaos.invariants import Violation
from tests.chaos.rows.killing import freeze_workers

Make = Callable[..., Chaos]


def switch_off(make: Make) -> list[Violation]:
    """R13. Fence, sweeper, lease: what the suite fails to notice is a violation."""
    cases: dict[str, tuple[Callable[[Chaos], None], set[str]]] = {
        "nothing": (_all_on, set()),
        "fence": (_without_fence, {"I3", "I6"}),
        "sweeper": (_without_sweeper, {"I1", "I5"}),
        "renewal of leases": (_without_renewal, {"I1", "I4"}),
        "end of leases": (_without_patience, {"I3"}),
    }
    with ThreadPoolExecutor(len(cases)) as threads:
        found = dict(zip(cases, threads.map(lambda name: _try(make, name, cases[name][0]), cases), strict=True))
    wrong = []
    for name, (_, expected) in cases.items():
        seen = {violation.invariant for violation in found[name]}
        if expected and not seen & expected:
            wrong.append(Violation("R13", f"without {name} the suite found {sorted(seen) or 'nothing'}"))
        if not expected:
            wrong += found[name]
    return wrong


def _try(make: Make, name: str, run: Callable[[Chaos], None]) -> list[Violation]:
    """What is found with that switched off. The slack goes: nothing that is measured here is a promise."""
    # One crash alone is enough for a quarantine, where the case waits for one.
    changes = {"max_crashes": 1} if name == "renewal of leases" else {}
    chaos = make(name=name.replace(" ", "-"), **changes)
    if name != "nothing":
        chaos.slack = 1.0
    with chaos:
        chaos.start("api")
        with suppress(TimeoutError):
            run(chaos)
        chaos.judge()
        return list(chaos.violations)


def _all_on(chaos: Chaos) -> None:
    chaos.start("sweeper")
    freeze_workers(chaos, stops=2, workers=3)


def _without_fence(chaos: Chaos) -> None:
    """A worker is frozen until others have its jobs, and then finishes them all the same."""
    chaos.start("sweeper")
    slow = Faults(step_seconds=0.3, without="fence")
    chaos.keep(1, slow)
    chaos.client.submit(4)
    frozen = chaos.until(chaos.holding)[0]
    frozen.process.send(signal.SIGSTOP)
    chaos.until(lambda: chaos.ask("SELECT 1 FROM attempts WHERE outcome = 'crashed'"), 30)
    chaos.keep(2, Faults(step_seconds=1, without="fence"))
    chaos.until(lambda: chaos.counts().get("running"), 30)
    frozen.process.send(signal.SIGCONT)
    chaos.until(lambda: chaos.violations, 30)


def _without_sweeper(chaos: Chaos) -> None:
    chaos.keep(1, Faults(step_seconds=1))
    chaos.client.submit(4)
    chaos.kill(chaos.until(chaos.holding)[0])
    chaos.until(lambda: chaos.violations, 30)


def _without_renewal(chaos: Chaos) -> None:
    """Jobs that take longer than a lease."""
    chaos.start("sweeper")
    chaos.keep(2, Faults(step_seconds=chaos.settings.lease / timedelta(seconds=2), without="heartbeat"))
    chaos.client.submit(2)
    end = time.monotonic() + 40
    chaos.until(lambda: not chaos.backlog() or time.monotonic() > end, 60)


def _without_patience(chaos: Chaos) -> None:
    chaos.start("sweeper", Faults(without="patience"))
    chaos.keep(1, Faults(step_seconds=1))
    chaos.client.submit(4)
    chaos.until(lambda: chaos.violations, 30)
