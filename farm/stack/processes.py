"""Starting, recognising and ending operating-system processes. Knows nothing of services.

A process is recognised by its id *and* its creation time: ids are used again, so an id alone may by now belong to
somebody else's program.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from farm.errors import StackError
from farm.stack.accounts import Account

PR_SET_PDEATHSIG = 1
KILL_WAIT = 10.0
"""Seconds a process may take to vanish after SIGKILL (disk writes in flight)."""

LARGE_LOG = 64 * 1024 * 1024

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Identity:
    """One process, for as long as the machine runs: `created` is in seconds since the epoch, as psutil gives it."""

    pid: int
    created: float

    @classmethod
    def of(cls, pid: int) -> "Identity | None":
        """The identity of a running process, `None` if there is no such process."""
        try:
            return cls(pid, psutil.Process(pid).create_time())
        except psutil.NoSuchProcess:
            return None

    def process(self) -> psutil.Process | None:
        """The process itself, `None` when it ended (a zombie counts as ended)."""
        try:
            found = psutil.Process(self.pid)
            # The kernel counts in ticks of 10 ms and psutil adds the boot time, which NTP may move by a hair.
            same = abs(found.create_time() - self.created) < 0.05
            return found if same and found.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None

    @property
    def alive(self) -> bool:
        return self.process() is not None


def spawn(
    arguments: Sequence[str | Path],
    *,
    environment: Mapping[str, str],
    log: Path,
    directory: Path,
    account: Account | None = None,
    farewell: signal.Signals = signal.SIGTERM,
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own (Ctrl-C in the terminal reaches the supervisor only).

    Output is appended to `log`. `farewell` is what the kernel sends the program should we be killed; that holds only
    when started from the main thread, because the kernel watches the *thread* that started it.

    Raises StackError if the program cannot be executed.
    """

    def ask_for_farewell() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, int(farewell))

    before = ask_for_farewell if threading.current_thread() is threading.main_thread() else None
    try:
        with log.open("ab") as output:
            return subprocess.Popen(
                [str(argument) for argument in arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=directory,
                env=dict(environment),
                start_new_session=True,
                preexec_fn=before,  # noqa: PLW1509  # one system call, which takes no lock
                user=account.uid if account else None,
                group=account.gid if account else None,
                extra_groups=[] if account else None,
            )
    except OSError as error:
        raise StackError(f"cannot start {arguments[0]}: {error}") from error


def end(identity: Identity, *, ask: signal.Signals = signal.SIGTERM, grace: float) -> bool:
    """End a process and everything it started: ask, wait `grace` seconds, kill. True if it left by itself.

    Does nothing to a process that merely has the same id.
    """
    process = identity.process()
    if process is None:
        return True
    family = [process, *_children(process)]
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(ask)
    _, left = psutil.wait_procs(family[:1], timeout=grace)
    polite = not left
    # Children that were born meanwhile, and those that the parent left behind.
    family += [child for child in _children(process) if child not in family]
    _, left = psutil.wait_procs(family, timeout=1.0 if polite else 0.0)
    for straggler in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            straggler.kill()
    psutil.wait_procs(left, timeout=KILL_WAIT)
    return polite


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def set_aside(log: Path) -> None:
    """Rename a log that has grown large to `NAME.log.1`, in place of the one before it."""
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > LARGE_LOG:
            log.replace(log.with_name(f"{log.name}.1"))


def tail(log: Path, lines: int = 8) -> str:
    """The end of a log, indented, for an error message; empty if there is none."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - 8192), os.SEEK_SET)
            text = stream.read().decode(errors="replace")
    except OSError:
        return ""
    return "".join(f"\n    {line}" for line in text.splitlines()[-lines:])
