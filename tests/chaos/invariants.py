"""The six invariants, as questions to the database and the object store.

I1 every accepted job ends terminal. I2 exactly one image per job that succeeded, sha256 of row = object = key, and it
is the picture of that job's seed. I3 no change by a stale attempt. I4 attempts stay within their limits, and a
poisonous job is isolated with its cause. I5 no attempt runs past its lease and two sweeps. I6 counters of batches and
projects equal recomputed sums; what I6 says of webhooks is in `hooks`.
"""

import hashlib
import io
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from sqlalchemy import Connection, text

from farm.db import Database
from farm.errors import FarmError
from farm.recipe import Recipe
from farm.settings import Settings
from farm.storage import Store
from tests.chaos import audit
from tests.stub_worker import picture


class Violation(NamedTuple):
    invariant: str
    what: str


# Nobody can renew or rescue while Postgres is away: after its start everybody gets one lease, then two sweeps.
_OVERDUE = text("""
    SELECT a.job_id, a.number, extract(epoch FROM clock_timestamp() - greatest(
               c.lease_until, pg_postmaster_start_time() + CAST(:lease AS interval))) AS seconds
    FROM attempts a JOIN claims c ON c.id = a.claim_id
    WHERE a.outcome IS NULL AND c.closed_at IS NULL AND clock_timestamp() > CAST(:allowed AS interval) + greatest(
        c.lease_until, pg_postmaster_start_time() + CAST(:lease AS interval))
    ORDER BY seconds DESC LIMIT 20
""")

_COUNTED = """
    SELECT {by}, sum(queued) AS queued, sum(running) AS running, sum(succeeded) AS succeeded, sum(failed) AS failed,
           sum(cancelled) AS cancelled FROM (
        SELECT c.{by}, queued, running, succeeded, failed, cancelled FROM {counters}
        UNION ALL SELECT {by}, queued, running, succeeded, failed, cancelled FROM counter_deltas) x GROUP BY 1
"""
_RECOUNTED = """
    SELECT {by}, count(*) FILTER (WHERE state = 'queued') AS queued,
           count(*) FILTER (WHERE state = 'running') AS running,
           count(*) FILTER (WHERE state = 'succeeded') AS succeeded,
           count(*) FILTER (WHERE state = 'failed') AS failed,
           count(*) FILTER (WHERE state = 'cancelled') AS cancelled FROM jobs GROUP BY 1
"""
_STATES = ("queued", "running", "succeeded", "failed", "cancelled")
_OF_BATCHES = "counters c"
_OF_PROJECTS = "counters JOIN segments c ON c.id = counters.segment_id"


def _differences(by: str, counters: str) -> Any:
    differ = " OR ".join(f"coalesce(c.{state}, 0) <> coalesce(r.{state}, 0)" for state in _STATES)
    shown = " || ' ' || ".join(f"coalesce(c.{s}, 0) || '/' || coalesce(r.{s}, 0)" for s in _STATES)
    return text(f"""
        WITH c AS ({_COUNTED.format(by=by, counters=counters)}), r AS ({_RECOUNTED.format(by=by)})
        SELECT coalesce(c.{by}, r.{by}) AS id, {shown} AS counts FROM c FULL JOIN r USING ({by}) WHERE {differ}
    """)


_BATCHES, _PROJECTS = _differences("batch_id", _OF_BATCHES), _differences("project_id", _OF_PROJECTS)

_IMAGES = text("""
    SELECT j.id, j.state, i.key FROM jobs j FULL JOIN images i ON i.job_id = j.id
    WHERE j.id IS NULL OR (j.state = 'succeeded') <> (i.job_id IS NOT NULL) LIMIT 20
""")

_ENDS = text("""
    SELECT j.id, j.state, j.attempt, count(*) FILTER (WHERE a.outcome = 'succeeded') AS succeeded,
           max(a.number) FILTER (WHERE a.outcome = 'succeeded') AS winner
    FROM jobs j JOIN attempts a ON a.job_id = j.id GROUP BY j.id
    HAVING count(*) FILTER (WHERE a.outcome = 'succeeded') <> (j.state = 'succeeded')::int
        OR (j.state = 'succeeded' AND max(a.number) FILTER (WHERE a.outcome = 'succeeded') <> j.attempt) LIMIT 20
""")

_LIMITS = text("""
    SELECT id, failures, crashes FROM jobs WHERE failures > :failures OR crashes > :crashes LIMIT 20
""")

_FAILED = text("""
    SELECT j.id, r.body ->> 'prompt' AS prompt, j.error_code, j.error_message
    FROM jobs j JOIN recipes r ON r.job_id = j.id
    WHERE j.state = 'failed'
""")

_PICTURES = text("""
    SELECT i.job_id, i.key, i.thumbnail_key, i.sha256, i.bytes, r.body
    FROM images i JOIN recipes r ON r.job_id = i.job_id
""")


def all_along(conn: Connection, settings: Settings, *, accepted: int, slack: timedelta) -> list[Violation]:
    """What must hold at every moment, read in one snapshot. `slack` is what a busy machine may be late by."""
    allowed = settings.rescue_every * 2 + slack
    found = [Violation(*wrong) for wrong in audit.wrongs(conn)]
    found += [
        Violation("I5", f"attempt {row.number} of job {row.job_id} ran {row.seconds:.1f} s past its lease")
        for row in conn.execute(_OVERDUE, {"lease": settings.lease, "allowed": allowed})
    ]
    for what, statement in (("batch", _BATCHES), ("project", _PROJECTS)):
        found += [
            Violation("I6", f"{what} {row.id} counts/has {row.counts} ({', '.join(_STATES)})")
            for row in conn.execute(statement)
        ]
    found += [
        Violation("I2", f"job {row.id} is {row.state} and its image is {row.key}") for row in conn.execute(_IMAGES)
    ]
    stored = conn.scalar(text("SELECT count(*) FROM jobs")) or 0
    if stored < accepted:
        found.append(Violation("I1", f"{accepted} jobs were accepted, and {stored} are there"))
    return found


def at_the_end(conn: Connection, settings: Settings, *, accepted: int, poison: Iterable[str]) -> list[Violation]:
    """What must hold once everything has ended. `poison`: words of prompts that may fail, and must."""
    found = []
    open_jobs = conn.execute(text("SELECT id, state FROM jobs WHERE finished_at IS NULL LIMIT 20")).all()
    found += [Violation("I1", f"job {row.id} is still {row.state}") for row in open_jobs]
    stored = conn.scalar(text("SELECT count(*) FROM jobs"))
    if stored != accepted:
        found.append(Violation("I1", f"{accepted} jobs were accepted, and {stored} are there"))
    limits = {"failures": settings.max_failures, "crashes": settings.max_crashes}
    found += [
        Violation("I4", f"job {row.id} has {row.failures} failures and {row.crashes} crashes alone")
        for row in conn.execute(_LIMITS, limits)
    ]
    words = tuple(poison)
    for row in conn.execute(_FAILED):
        if not any(word in row.prompt for word in words):
            found.append(Violation("I4", f"an innocent job {row.id} failed: {row.error_code} {row.error_message}"))
        elif not row.error_code or not row.error_message:
            found.append(Violation("I4", f"job {row.id} failed without a cause"))
    found += [
        Violation("I3", f"job {row.id} is {row.state} in attempt {row.attempt}; {row.succeeded} attempts succeeded")
        for row in conn.execute(_ENDS)
    ]
    return found


def check_pictures(database: Database, store: Store, *, pictures: bool, secrets: Mapping[str, str]) -> list[Violation]:
    """Every stored picture against its row. `pictures`: whether a stub rendered, so that its pixels are known.
    `secrets`: what must not stand in one, by name."""
    with database.transaction() as conn:
        rows = conn.execute(_PICTURES).all()
    with ThreadPoolExecutor(8) as threads:
        return [
            found for found in threads.map(lambda row: _wrong_picture(row, store, pictures, secrets), rows) if found
        ]


def _wrong_picture(row: Any, store: Store, pictures: bool, secrets: Mapping[str, str]) -> Violation | None:
    """What is wrong with one stored picture, or None."""
    try:
        data, thumbnail = store.get(row.key), store.get(row.thumbnail_key)
    except FarmError as error:
        return Violation("I2", f"job {row.job_id}: {error.message}")
    for key, content in ((row.key, data), (row.thumbnail_key, thumbnail)):
        if f"-{hashlib.sha256(content).hexdigest()}." not in key:
            return Violation("I2", f"object {key} has another content than its key says")
    if hashlib.sha256(data).hexdigest() != row.sha256 or len(data) != row.bytes:
        return Violation("I2", f"object {row.key} has another content than its row says")
    for key, content in ((row.key, data), (row.thumbnail_key, thumbnail)):
        # What a picture says of itself may be compressed in its file.
        with Image.open(io.BytesIO(content)) as image:
            said = content + str(image.info).encode()
        for name, word in secrets.items():
            if word.encode() in said:
                return Violation("secret", f"{name} stands in the picture {key}")
    if pictures:
        with Image.open(io.BytesIO(data)) as image:
            if not np.array_equal(np.asarray(image), picture(Recipe.parse(row.body))):
                return Violation("I2", f"object {row.key} is not the picture of its seed")
    return None
