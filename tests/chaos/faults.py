"""What goes wrong inside a process of a run: armed in that process only, before it becomes part of the farm."""

import errno
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Thread
from typing import Any
from uuid import UUID

from celery import Celery
from sqlalchemy import Connection, text

from farm import courier, doorbell, jobs
from farm.jobs import running
from farm.queries import claiming as claims
from farm.queries import finishing
from farm.settings import Settings
from farm.storage import Store
from tests.chaos.clock import set_wrong
from workers.executor import Executor

BOUNDARIES = (
    "claim-before", "claim-after", "render-before", "render-after", "upload-before", "upload-after",
    "commit-before", "commit-after", "doorbell-before", "doorbell-after", "webhook-before", "webhook-after",
)  # fmt: skip
"""Where a process can be made to stop. "before" claim and commit is the moment before the COMMIT: all statements have
run, and none of them may count. The doorbell is rung by the API; webhooks are told by the sweeper, and "after" is the
moment when the receiver has answered and nobody has noted it."""

MAX_CRASHES: int = Settings.model_fields["max_crashes"].default
_LAST_TRY = text("""
    SELECT EXISTS (
        SELECT FROM jobs j JOIN attempts a ON a.job_id = j.id AND a.number = j.attempt
        JOIN claims c ON c.id = a.claim_id
        WHERE j.state = 'running' AND j.alone AND j.crashes >= :last AND (j.id = ANY(:ids) OR c.worker_id = :worker))
""")

UNRESOLVED = "a name was not resolved"
FILES_GONE = "no file can be opened"

SAFETY = ("fence", "heartbeat", "patience")
"""What the self-test can switch off inside a process: the fence of a finish, the renewal of leases, and the rescuer's
waiting for a lease to run out."""


@dataclass(frozen=True)
class Faults:
    """Knobs of one process. The renderer's own knobs: `step_seconds`, and the words in a prompt it obeys (STUB_*)."""

    step_seconds: float = 0.01
    words: tuple[tuple[str, str], ...] = ()
    """(kind, word) for the stub: CRASH, HANG, FAIL, LOST_DEVICE, EAT."""
    at: str = ""
    """One of BOUNDARIES: there the process gets `signal`."""
    after: int = 1
    """How many times it passes there first, counted from 1. Passages with a job on its last try do not count."""
    signal: int = signal.SIGKILL
    without: str = ""
    """One of SAFETY."""
    files: int = 0
    """Most open files of the process; 0 leaves what it has."""
    full_disk: bool = False
    """Files of this process cannot grow, and its log goes to a device that is full."""
    clock: float = 0.0
    """Seconds by which the process's wall clock is ahead."""
    nameless: Path | None = None
    """While this file exists no host name is resolved."""
    rings: int = 1
    """How often every doorbell that this process rings is rung."""
    filled: Path | None = None
    """While this file exists the process has as many files open as it may."""


def arm(faults: Faults) -> None:
    """Make this process misbehave."""
    if faults.at:
        _stop_at(faults)
    if faults.without:
        {"fence": _no_fence, "heartbeat": _no_renewal, "patience": _no_patience}[faults.without]()
    if faults.files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (faults.files, faults.files))
    if faults.full_disk:
        # A write past the limit raises in Python, as one to a full disk does, once its signal is ignored.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if faults.clock:
        set_wrong(faults.clock)
    if faults.nameless is not None:
        _no_names(faults.nameless)
    if faults.rings > 1:
        _ring_again(faults.rings)
    if faults.filled is not None:
        Thread(target=_no_files, args=[faults.filled], name="filler", daemon=True).start()


def tell(words: str) -> None:
    """Say in the process's log what a fault did, for the run to see that it bit."""
    with suppress(OSError):
        os.write(2, f"fault: {words}\n".encode())


def on_last_try(conn: Connection, *, worker: UUID | None = None, ids: Collection[UUID] = ()) -> bool:
    """Whether that worker, or one of those jobs, is rendering a job that one more crash alone would quarantine.

    Whoever ends processes at random spares it: a job whose every try is ended is poison for the farm, rightly, and on a
    machine with little to spare chance alone would pick the same one three times.
    """
    return bool(conn.scalar(_LAST_TRY, {"worker": worker, "ids": list(ids), "last": MAX_CRASHES - 1}))


class _Passing:
    """Counts how often a place is passed, and stops the process there."""

    def __init__(self, faults: Faults) -> None:
        self._left = faults.after
        self._signal = faults.signal
        self._lock = Lock()
        self._sparing = False

    def note(self, conn: Connection, claimed: Any) -> None:
        """Whatever was claimed last is what is passed with: a job on its last try is alone in its process."""
        self._sparing = on_last_try(conn, ids=[job.id for job in claimed.jobs])

    def pass_by(self) -> None:
        with self._lock:
            if self._sparing:
                return
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), self._signal)


def _stop_at(faults: Faults) -> None:
    place, moment = faults.at.split("-")
    passing = _Passing(faults)
    claim = jobs.claim

    def claiming(conn: Connection, *args: Any, **kwargs: Any) -> Any:
        claimed = claim(conn, *args, **kwargs)
        if claimed is not None:
            passing.note(conn, claimed)
            # Inside the transaction: the rows are changed, the COMMIT is still to come.
            if faults.at == "claim-before":
                passing.pass_by()
        return claimed

    jobs.claim = claiming
    if faults.at == "claim-before":
        return
    if faults.at == "claim-after":
        _wrap(Executor, "_claim", after=lambda claimed: claimed is not None and passing.pass_by())
    elif faults.at == "webhook-before":
        _wrap(courier, "signed", before=passing.pass_by)
    elif faults.at == "webhook-after":
        _wrap(courier.Courier, "_record", before=passing.pass_by)
    elif faults.at == "commit-before":
        _wrap(jobs, "finish", after=lambda _: passing.pass_by())
    else:
        owner, name = {
            "render": (Executor, "_render"),
            "upload": (Store, "put"),
            "commit": (Executor, "_finish"),
            "doorbell": (doorbell, "ring"),
        }[place]
        _wrap(owner, name, **{moment: lambda *_: passing.pass_by()})


def _wrap(
    owner: Any, name: str, *, before: Callable[..., object] | None = None, after: Callable[..., object] | None = None
) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before()
        answer = original(*args, **kwargs)
        if after is not None:
            after(answer)
        return answer

    setattr(owner, name, wrapped)


def _no_fence() -> None:
    """A finish changes its job whatever became of it since."""
    running._is_current = lambda row, attempt: row is not None
    fenced = "j.id = g.id AND CASE j.state WHEN 'running' THEN j.attempt END = g.attempt"
    statement = str(finishing._MOVE)
    assert fenced in statement, "the fence has moved: switch it off where it is now"
    finishing._MOVE = text(statement.replace(fenced, "j.id = g.id"))


def _no_renewal() -> None:
    """Claims are never prolonged, and nobody tells the worker."""
    claims.renew = lambda conn, *, worker, claims, lease, now: set(claims)


def _no_patience() -> None:
    """The rescuer takes every claim for one whose lease ran out."""
    for name in ("_EXPIRED", "_END_CLAIMS"):
        statement = str(getattr(finishing, name))
        assert "lease_until < :now" in statement, "the lease is checked elsewhere now: switch it off there"
        late = "lease_until < greatest(:now, CAST('infinity' AS timestamptz))"
        setattr(finishing, name, text(statement.replace("lease_until < :now", late)))


def _no_names(flag: Path) -> None:
    resolve = socket.getaddrinfo

    def resolved(host: Any, *args: Any, **kwargs: Any) -> Any:
        numeric = False
        with suppress(OSError):
            socket.inet_aton(host)
            numeric = True
        if flag.exists() and not numeric:
            tell(UNRESOLVED)
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return resolve(host, *args, **kwargs)

    socket.getaddrinfo = resolved


def _ring_again(times: int) -> None:
    send = Celery.send_task

    def sent(*args: Any, **kwargs: Any) -> Any:
        return [send(*args, **kwargs) for _ in range(times)][-1]

    Celery.send_task = sent


def _no_files(flag: Path) -> None:
    taken: list[int] = []
    told = False
    while True:
        # What the process closes meanwhile is taken too.
        try:
            while flag.exists():
                taken.append(os.open("/dev/null", os.O_RDONLY))
        except OSError as error:
            if error.errno == errno.EMFILE and not told:
                tell(FILES_GONE)
                told = True
        if not flag.exists():
            told = False
            while taken:
                os.close(taken.pop())
        time.sleep(0.05)
