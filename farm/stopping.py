"""Batches that stop themselves when too many of their jobs failed."""

from collections.abc import Collection
from math import ceil
from uuid import UUID

from sqlalchemy import Connection, RowMapping

from farm import telling
from farm.queries import stopping as rows
from farm.shares import reached

JUDGED_FROM = 20
"""Jobs that succeeded or failed before a batch is judged by them."""


def judged_from(total: int) -> int:
    """From how many jobs that succeeded or failed on a batch is judged: 20, of smaller batches half, two at least.

    >>> [judged_from(total) for total in (1, 2, 4, 5, 39, 40, 1_000_000)]
    [2, 2, 2, 3, 20, 20, 20]
    """
    return min(JUDGED_FROM, max(2, ceil(total / 2)))


def stop_batches(conn: Connection, batches: Collection[UUID]) -> list[UUID]:
    """Stop those of these batches whose failed share was reached, and tell of it; answers which.

    Their queued jobs are cancelled with the cause, those that run finish. To be called after the ends of their jobs
    were folded, in a transaction of its own: a batch that is missed here is judged again when its next job ends.
    """
    stopped = []
    for found in rows.judged(conn, batches):
        if not _is_over(found) or not rows.try_hold(conn, found["id"]):
            continue
        # Asked again: somebody may have retried it before we held it, and its failures count for nothing then.
        for batch in rows.judged(conn, [found["id"]]):
            if _is_over(batch):
                rows.stop(conn, batch["id"], _reason(batch))
                stopped.append(batch["id"])
    telling.batches_stopped(conn, stopped)
    return stopped


def _is_over(batch: RowMapping) -> bool:
    failed, ended = int(batch["failed"]), int(batch["failed"] + batch["succeeded"])
    if not batch["open"] or ended < judged_from(batch["total"]):
        return False
    return reached(failed, ended, batch["stop_at_failed_share"])


def _reason(batch: RowMapping) -> str:
    failed, ended = int(batch["failed"]), int(batch["failed"] + batch["succeeded"])
    return f"{failed} of {ended} jobs failed, and the batch was to stop at a share of {batch['stop_at_failed_share']:g}"
