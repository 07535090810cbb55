"""The data directory: where things lie in it, who holds it, and which processes run for it."""

import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from farm.errors import StackError
from farm.stack import seaweed
from farm.stack.ports import Ports
from farm.stack.processes import Identity, end
from farm.stack.secrets import write_private_json
from farm.stack.service import ServiceStatus

SUPERVISOR = "supervisor"
"""Name of the entry in `stack.json` for the process that started all others."""
NEEDED_BYTES = 1024**3
"""Free disk below which we do not start: PostgreSQL stops in the middle of its work when it runs out."""
NEEDED_SHARE = 0.012
"""The same as a share of the disk: below 1 % SeaweedFS takes no more objects, and an upload then hangs."""
STOP_ORDER = ("api", "worker", "sweeper", "flower", "s3", "valkey", "postgres")
ASK = {"postgres": signal.SIGINT}
GRACE = 30.0
"""Seconds an orphan may take to leave; a worker finishes or gives back what it has."""


class DataDir:
    """Paths below one data directory, and the lock that makes one supervisor its owner."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute()
        self.logs = self.path / "logs"
        self.secrets = self.path / "secrets.json"
        self.credentials = self.path / "credentials.json"
        self.ports = self.path / "ports.json"
        self.stack = self.path / "stack.json"
        self.environment = self.path / "environment.json"
        self._lock_file = self.path / "lock"
        self._lock: int | None = None

    def create(self) -> None:
        """Make the folders. Others may walk through but not look, as PostgreSQL may run as another user.

        Raises StackError if the disk is full or not writable.
        """
        try:
            if not self.path.exists():
                self.path.mkdir(parents=True)
                self.path.chmod(0o711 if os.geteuid() == 0 else 0o700)
            self.logs.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StackError(f"cannot use {self.path} as data directory: {error}") from error
        disk = shutil.disk_usage(self.path)
        needed = max(NEEDED_BYTES, disk.total * NEEDED_SHARE)
        if disk.free < needed:
            raise StackError(
                f"the disk of {self.path} has {disk.free / 2**20:.0f} MiB free, and the farm needs at least "
                f"{needed / 2**20:.0f} MiB to start; make room, or choose another --data-dir"
            )

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._lock is not None

    def hold(self) -> None:
        """Become the owner until `release` or the end of this process. Raises StackError if another process is."""
        descriptor = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode() or "unknown"
            os.close(descriptor)
            raise StackError(
                f"a farm is already running in {self.path} (process {owner}); use it, stop it with "
                f"`farm down --data-dir {self.path}`, or start a second one with another --data-dir and --port"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        self._lock = descriptor

    def release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write_stack(self, services: Sequence[ServiceStatus]) -> None:
        """Write `stack.json`: ourselves, and these services."""
        me = Identity.of(os.getpid())
        supervisor: ServiceStatus = {
            "name": SUPERVISOR,
            "pid": os.getpid(),
            "created": me.created if me else None,
            "address": str(self.path),
            "state": "healthy",
        }
        write_private_json(self.stack, [supervisor, *services])

    def read_stack(self) -> list[ServiceStatus]:
        """What `stack.json` says; empty if there is none."""
        try:
            found: list[ServiceStatus] = json.loads(self.stack.read_text())
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise StackError(
                f"{self.stack} is damaged ({error}), so it is not known which processes belong to this farm; "
                "look for them with ps, end them, and delete the file"
            ) from error
        return found

    def end_orphans(self) -> list[str]:
        """End what an earlier supervisor that was killed left running; answers the names. Call while holding."""
        ended: list[str] = []
        services = sorted(self.read_stack(), key=lambda service: stop_rank(service["name"]))
        for service in services:
            identity = identity_of(service)
            if service["name"] != SUPERVISOR and identity is not None and identity.alive:
                end(identity, ask=ASK.get(service["name"], signal.SIGTERM), grace=GRACE)
                ended.append(service["name"])
        seaweed.remove_sockets(Ports(self.ports).remembered())
        seaweed.remove_dead_sockets()
        return ended


def identity_of(service: ServiceStatus) -> Identity | None:
    pid, created = service["pid"], service["created"]
    return Identity(pid, created) if pid is not None and created is not None else None


def stop_rank(name: str) -> int:
    """The place of a service in the order of stopping; `worker-1` counts as `worker`."""
    kind = name.partition("-")[0]
    return STOP_ORDER.index(kind) if kind in STOP_ORDER else 0


def running(data_dir: Path) -> Identity | None:
    """The supervisor that runs in this data directory, `None` if there is none."""
    for service in DataDir(data_dir).read_stack():
        identity = identity_of(service)
        if service["name"] == SUPERVISOR and identity is not None and identity.alive:
            return identity
    return None


def stop_running(data_dir: Path, *, patience: float = 90.0) -> bool:
    """Stop the farm in this data directory from outside (`farm down`). False if nothing was running.

    Raises StackError if it does not stop within `patience` seconds.
    """
    directory = DataDir(data_dir)
    if not directory.path.exists():
        return False
    supervisor = running(data_dir)
    if supervisor is not None and supervisor.pid == os.getpid():
        supervisor = None  # a stack of this very process: the lock says so below
    if supervisor is not None:
        os.kill(supervisor.pid, signal.SIGTERM)
        deadline = time.monotonic() + patience
        while supervisor.alive:
            if time.monotonic() > deadline:
                raise StackError(
                    f"the farm in {directory.path} (process {supervisor.pid}) did not stop within {patience:.0f} s; "
                    f"see {directory.logs}"
                )
            time.sleep(0.05)
    directory.hold()
    try:
        orphans = directory.end_orphans()
        directory.stack.unlink(missing_ok=True)
    finally:
        directory.release()
    return supervisor is not None or bool(orphans)


def status(data_dir: Path) -> list[ServiceStatus]:
    """The services of this data directory as they are: those whose process is gone are `stopped`."""
    found = DataDir(data_dir).read_stack()
    for service in found:
        identity = identity_of(service)
        if identity is None or not identity.alive:
            service["pid"], service["created"] = None, None
            if service["state"] != "restarting":
                service["state"] = "stopped"
    return found
