"""Everything on one machine: the embedded servers, and the supervisor of `farm up`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from farm.settings import Settings
from farm.stack.datadir import DataDir, running, status, stop_running
from farm.stack.servers import Servers, settings_from
from farm.stack.service import ServiceStatus

__all__ = [
    "Servers",
    "ServiceStatus",
    "embedded",
    "embedded_servers",
    "running",
    "settings_from",
    "status",
    "stop_running",
]


@contextmanager
def embedded_servers(data_dir: Path, *, durable: bool = True) -> Iterator[Servers]:
    """The three servers alone, running in `data_dir` until the block ends.

    `durable=False` is for tests and for benchmarks of other things: no fsync. Raises StackError.
    """
    directory = DataDir(data_dir)
    directory.create()
    directory.hold()
    try:
        directory.end_orphans()

        def note() -> None:
            directory.write_stack([service.status() for service in servers.services])

        servers = Servers(directory, durable=durable, note=note)
        servers.start()
        try:
            yield servers
        finally:
            servers.stop()
    finally:
        directory.stack.unlink(missing_ok=True)
        directory.release()


@contextmanager
def embedded(data_dir: Path, *, durable: bool = True) -> Iterator[Settings]:
    """As `embedded_servers`, yielding the settings that lead to them. No schema and no bucket is made."""
    with embedded_servers(data_dir, durable=durable) as servers:
        yield settings_from(servers.environment())
