"""How a worker process ends, told to its supervisor by the exit status."""

import os
import sys
from enum import IntEnum

import structlog

log = structlog.get_logger(__name__)


class Exit(IntEnum):
    """Exit statuses. After all but the first two, a supervisor starts the process anew."""

    LEFT = 0
    """Asked to leave, and did so within the grace period."""
    REFUSED = 78
    """The configuration or the database schema is not one this worker can work with; a restart would not help."""
    HUNG = 80
    """Asked to leave, but a thread hung until the grace period was over."""
    PHASE = 81
    """A phase of the work ran over its limit: the device or a server hangs."""
    DEVICE = 82
    """The device is lost to this process."""
    MEMORY = 83
    """The process grew past its memory limit; it ended between two micro-batches."""
    CANARY = 84
    """The canary picture is not what it was: this device must not be trusted."""
    BROKEN = 85
    """An error that nobody foresaw in a thread the process cannot do without."""
    IDLE = 86
    """There was work for this worker all along, and it took none."""


def end_process(status: Exit, why: str) -> None:
    """End this process at once, whatever its other threads do. Nothing is cleaned up: Postgres knows what we held."""
    log.critical("the process ends itself", status=int(status), reason=status.name.lower(), why=why)
    sys.stderr.flush()
    os._exit(status)
