"""What the stack's tests look at from outside."""

import time
from collections.abc import Callable
from pathlib import Path

import psutil

from farm.stack.datadir import DataDir, identity_of
from farm.stack.processes import Identity


def wait_until(true: Callable[[], object], seconds: float = 30.0) -> None:
    """Ask until the answer is true. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s")
        time.sleep(0.02)


def identities(data_dir: Path) -> dict[str, Identity]:
    """The processes that `stack.json` names, by service."""
    found = {service["name"]: identity_of(service) for service in DataDir(data_dir).read_stack()}
    return {name: identity for name, identity in found.items() if identity is not None}


def family(identity: Identity) -> list[psutil.Process]:
    """A process and all that descend from it."""
    process = identity.process()
    return [process, *process.children(recursive=True)] if process else []


def listening(processes: list[psutil.Process]) -> list[tuple[str, int]]:
    """The addresses that these processes accept connections on."""
    return sorted(
        (connection.laddr.ip, connection.laddr.port)
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    )


def zombies() -> list[psutil.Process]:
    """Our own children that ended and were not waited for."""
    return [child for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE]
