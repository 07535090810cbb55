"""What dies is started again, with pauses that grow; what refuses to work is left alone."""

import os
import signal
import sys
import threading
from pathlib import Path
from random import Random

import psutil
import pytest

from farm.errors import StackError
from farm.stack import supervision
from farm.stack.service import Program, Service, ServiceStatus
from farm.stack.supervision import MOST_SILENCES, REFUSED, Supervisor
from tests.stack.watching import wait_until, zombies


class Bench:
    """One supervised program in a folder, and all that was reported of it."""

    def __init__(self, folder: Path, code: str) -> None:
        self.folder = folder
        self.code = code
        self.events: list[tuple[str, str]] = []
        self.deaths = 0
        self.answering = False
        self.supervisor = Supervisor(self._report, Random(1))
        self.service = Service(self.program())
        self.supervisor.watch(self.service, self.program, self._died)

    def program(self) -> Program:
        return Program(
            name="bench",
            arguments=[sys.executable, "-c", self.code],
            environment=dict(os.environ),
            directory=self.folder,
            log=self.folder / "bench.log",
            address="nowhere",
            healthy=(self.folder / "healthy").exists,
            answers=lambda: self.answering,
            patience=20.0,
            grace=5.0,
        )

    def look_until(self, state: str) -> None:
        def there() -> bool:
            self.supervisor.look()
            return self.service.state == state

        wait_until(there)

    def _report(self, status: ServiceStatus, event: str) -> None:
        self.events.append((status["state"], event))

    def _died(self) -> None:
        self.deaths += 1


HEALTHY = "import pathlib, time; pathlib.Path('healthy').touch(); time.sleep(600)"


def test_a_service_that_dies_is_started_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, HEALTHY)
    bench.service.start()
    first = bench.service.pid
    assert first is not None
    psutil.Process(first).kill()
    bench.look_until("restarting")
    assert bench.deaths == 1
    assert bench.service.pid is None
    assert zombies() == []
    bench.look_until("healthy")
    assert bench.service.pid not in (None, first)
    (restarting, why), (healthy, nothing) = bench.events
    assert (restarting, healthy, nothing) == ("restarting", "healthy", "")
    assert why.startswith("ended with signal 9; starting again in 0.")
    bench.service.stop()


def test_a_service_that_hangs_is_ended_and_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "ASK_EVERY", 0.0)
    monkeypatch.setattr(supervision, "HUNG_GRACE", 0.1)
    bench = Bench(tmp_path, HEALTHY)
    bench.service.start()
    first = bench.service.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)  # as deaf to SIGTERM as what hangs
    for _ in range(MOST_SILENCES - 1):
        bench.supervisor.look()
    assert (bench.service.state, bench.events) == ("healthy", [])
    bench.answering = True
    bench.supervisor.look()
    bench.answering = False
    for _ in range(MOST_SILENCES - 1):
        bench.supervisor.look()
    assert bench.events == [], "one answer, and the counting starts anew"
    bench.supervisor.look()
    assert bench.deaths == 1
    assert not psutil.pid_exists(first)
    bench.answering = True
    bench.look_until("healthy")
    assert bench.service.pid not in (None, first)
    assert bench.events[0][1].startswith("hung: 6 times in a row without an answer; starting again in 0.")
    bench.service.stop()


def test_pauses_grow_while_it_keeps_dying(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "raise SystemExit(3)")
    bench.service.spawn()

    def fourth() -> bool:
        bench.supervisor.look()
        return bench.deaths == 4

    wait_until(fourth)
    pauses = [float(event.rsplit(" ", 2)[1]) for _, event in bench.events]
    assert all("exit code 3" in event for _, event in bench.events)
    assert pauses[0] <= 0.5 < pauses[3] <= 4.0


def test_a_service_that_refuses_is_left_alone(tmp_path: Path) -> None:
    bench = Bench(tmp_path, f"raise SystemExit({REFUSED})")
    bench.service.spawn()
    bench.look_until("stopped")
    bench.supervisor.look()
    assert bench.deaths == 1
    ((state, event),) = bench.events
    assert state == "stopped"
    assert "not started again" in event


def test_running_ends_when_asked(tmp_path: Path) -> None:
    bench = Bench(tmp_path, HEALTHY)
    bench.service.start()
    stop = threading.Event()
    stop.set()
    bench.supervisor.run(stop)
    assert bench.service.alive
    bench.service.stop()


def test_a_start_that_fails_says_what_the_log_says(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "raise SystemExit('no room on the wall')")
    with pytest.raises(StackError, match=r"(?s)bench ended with exit code 1 on start.*no room on the wall"):
        bench.service.start()
    assert bench.service.state == "stopped"


def test_asked_to_stop_while_starting(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "import time; time.sleep(600)")
    bench.service.spawn()

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        bench.service.wait_healthy(stop)
    bench.service.stop()
    assert not bench.service.alive
