"""One supervised program: start it, ask whether it is well, end it."""

import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

from farm.errors import StackError
from farm.stack.accounts import Account
from farm.stack.processes import Identity, end, set_aside, spawn, tail

State = Literal["starting", "healthy", "restarting", "stopped"]


class ServiceStatus(TypedDict):
    """One line of `stack.json`. `created` is in seconds since the epoch."""

    name: str
    pid: int | None
    created: float | None
    address: str
    state: State


@dataclass(frozen=True)
class Program:
    """What to run and how to know that it is well."""

    name: str
    arguments: Sequence[str | Path]
    environment: Mapping[str, str]
    directory: Path
    log: Path
    address: str
    """What a person would open or connect to; holds no password."""
    healthy: Callable[[], bool]
    """Asked from time to time; must answer within about two seconds and not raise."""
    patience: float
    """Seconds it may take to become healthy."""
    grace: float
    """Seconds it may take to leave after `ask`."""
    ask: signal.Signals = signal.SIGTERM
    account: Account | None = None
    ask_every: float = 0.02
    """Seconds between two health checks while it starts; the servers need half a second."""
    answers: Callable[[], bool] | None = None
    """Asked now and then once it is healthy: does it still work? As quick as `healthy`, and about itself alone: what
    another service's trouble keeps from working is well. `None` where a silence is not cured by a restart."""


class Service:
    """A program and the process that runs it now. `program` may be replaced while it is stopped."""

    def __init__(self, program: Program, note: Callable[[], None] = lambda: None) -> None:
        """`note` is called at every change that `stack.json` should show."""
        self.program = program
        self.state: State = "stopped"
        self._note = note
        self._popen: subprocess.Popen[bytes] | None = None
        self._identity: Identity | None = None

    @property
    def name(self) -> str:
        return self.program.name

    @property
    def pid(self) -> int | None:
        return self._identity.pid if self._identity else None

    @property
    def alive(self) -> bool:
        """Whether its process runs. Reaps the process if not, so that no zombie is left."""
        return self._popen is not None and self._popen.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Of the latest process that ended; negative is the signal that ended it."""
        return self._popen.poll() if self._popen else None

    def status(self) -> ServiceStatus:
        identity = self._identity
        return {
            "name": self.name,
            "pid": identity.pid if identity else None,
            "created": identity.created if identity else None,
            "address": self.program.address,
            "state": self.state,
        }

    def spawn(self) -> None:
        """Start the process without waiting for its health."""
        program = self.program
        set_aside(program.log)
        self._popen = spawn(
            program.arguments,
            environment=program.environment,
            log=program.log,
            directory=program.directory,
            account=program.account,
            farewell=program.ask,
        )
        self._identity = Identity.of(self._popen.pid)
        self._turn("starting")

    def check(self) -> bool:
        """Whether it is healthy now; remembers the first time it is."""
        if not (self.alive and self.program.healthy()):
            return False
        if self.state != "healthy":
            self._turn("healthy")
        return True

    def wait_healthy(self, check_stop: Callable[[], None] = lambda: None) -> None:
        """Wait until it is healthy. Raises StackError with the end of its log if it dies or takes too long, and
        whatever `check_stop`, called all the time, raises."""
        deadline = time.monotonic() + self.program.patience
        while not self.check():
            log = self.program.log
            if not self.alive:
                raise StackError(f"{self.name} ended with exit code {self.exit_code} on start; {log} says:{tail(log)}")
            if time.monotonic() > deadline:
                raise StackError(
                    f"{self.name} was not healthy within {self.program.patience:.0f} s; {log} says:{tail(log)}"
                )
            check_stop()
            time.sleep(self.program.ask_every)

    def start(self) -> None:
        """Start and wait until healthy; nothing is left running if that fails."""
        self.spawn()
        try:
            self.wait_healthy()
        except BaseException:
            self.stop()
            raise

    def mark_dead(self, *, restarting: bool) -> None:
        """Note that its process died, and whether a new one will follow."""
        self._identity = None
        self._turn("restarting" if restarting else "stopped")

    def ask_to_stop(self) -> None:
        """Send the polite signal and return at once."""
        if self._popen is not None and self._popen.poll() is None:
            self._popen.send_signal(self.program.ask)

    def stop(self, *, grace: float | None = None) -> bool:
        """End it: ask, wait for its grace, kill. True if it left by itself. Harmless when it does not run."""
        polite = True
        if self._popen is not None and self._identity is not None:
            patience = self.program.grace if grace is None else grace
            polite = end(self._identity, ask=self.program.ask, grace=patience)
            self._popen.wait()
        self._identity = None
        if self.state != "stopped":
            self._turn("stopped")
        return polite

    def restart(self) -> None:
        self.stop()
        self.start()

    def _turn(self, state: State) -> None:
        self.state = state
        self._note()
