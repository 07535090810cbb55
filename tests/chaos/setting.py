"""What a farm of the suite is set to, and what is counted of it."""

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import text

from farm.db import Database, migrate
from farm.settings import Settings
from farm.stack import Servers, settings_from
from tests.chaos.processes import Process
from tests.conftest import administer, with_database

TEMPLATE = "template_chaos"

SCALED: dict[str, Any] = {
    "heartbeat": timedelta(seconds=0.5),
    "lease": timedelta(seconds=2.5),
    "poll": timedelta(seconds=0.5),
    "rescue_every": timedelta(seconds=0.5),
    "sweep_every": timedelta(seconds=0.25),
    "retry_backoff": timedelta(seconds=0.1),
    "retry_backoff_max": timedelta(seconds=1),
    "grace": timedelta(seconds=4),
    "affinity_bound": timedelta(seconds=2),
    "suspect_wait": timedelta(seconds=10),
    "webhook_timeout": timedelta(seconds=5),
}
"""A crashed worker's jobs are claimable again within 4 s: a lease, a sweep, and a second for the machine."""
SCALED_BOUND = 4.0
PRODUCTION_BOUND = 30.0
"""With the timers as they are shipped."""


@dataclass
class Worker:
    """One worker process and what was done to it. Times are seconds since the epoch, as the history's."""

    id: UUID
    process: Process
    place: int
    killed_at: float | None = None
    told_at: float = 0.0
    """When it was asked to leave."""
    frozen: bool = False


@dataclass
class Figures:
    """What a row counted, for its report."""

    counts: dict[str, float] = field(default_factory=dict)
    recoveries: list[tuple[float, float]] = field(default_factory=list)
    """When workers were killed, and when the last of their jobs was claimable again; seconds since the epoch."""
    said: dict[str, str] = field(default_factory=dict)
    """What was measured of a promise, and whether it was kept; a machine that others use may be allowed more."""

    def add(self, name: str, by: float = 1) -> None:
        self.counts[name] = round(self.counts.get(name, 0) + by, 3)


def verdict(seconds: float, bound: float, *, stood: float = 0.0, slack: float = 0.0) -> str:
    """What is said of seconds that were measured, of which the machine stood still for `stood`.

    >>> verdict(3.9, 4)
    'within the bound'
    >>> verdict(6.4, 4, slack=6)
    'over the bound, within what a busy machine is allowed'
    """
    if seconds <= bound:
        return "within the bound"
    if seconds - stood <= bound:
        return f"within the bound but for {stood:.1f} s of a machine that stood still"
    if seconds - stood <= bound + slack:
        return "over the bound, within what a busy machine is allowed"
    return "over the bound"


def prepare(servers: Servers) -> Settings:
    """Settings that lead to the servers, whose template database is migrated; made on first use."""
    found = with_database(settings_from(servers.environment()), TEMPLATE)
    plain = with_database(found, "postgres")
    database = Database(plain, pool_size=1)
    try:
        with database.transaction() as conn:
            there = conn.scalar(text("SELECT 1 FROM pg_database WHERE datname = :name"), {"name": TEMPLATE})
    finally:
        database.dispose()
    if not there:
        administer(found, f"CREATE DATABASE {TEMPLATE}")
        migrate(found)
    return found
