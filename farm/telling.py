"""What webhooks are told, written in the transaction of what it tells: nothing is told that did not happen, and
nothing that happened goes untold."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, RowMapping

from farm.queries import webhooks as rows
from farm.shares import reached
from farm.states import JobState
from farm.webhooks import message


def jobs_moved(conn: Connection, moves: Sequence[Mapping[str, Any]], done: Collection[UUID]) -> None:
    """Tell of those jobs that failed for good. `moves` are as `finishing.move` takes them, `done` what it changed."""
    failed = [move["id"] for move in moves if move["state"] == JobState.FAILED and move["id"] in done]
    if failed:
        rows.tell(conn, [_failed(row) for row in rows.jobs_to_tell(conn, failed)])


def batches_moved(conn: Connection, batches: Collection[UUID]) -> None:
    """Tell of those batches that have nothing open any more, and of those whose failed share was reached.

    To be called in the transaction that folded the ends of their jobs: folding has one order, so the fold after which
    nothing is open is the one that finishes the batch, and no two of them think so.
    """
    if not batches:
        return
    told = []
    for row in rows.batches_to_tell(conn, batches):
        if reached(int(row["failed"]), row["total"], row["failed_share"]):
            told.append(_batch(row, "batch.failed_share", failed_share=row["failed_share"]))
        if not row["queued"] and not row["running"]:
            told.append(_batch(row, "batch.finished"))
    rows.tell(conn, [found for found, events in told if found["event"] in events])


def batches_stopped(conn: Connection, batches: Collection[UUID]) -> None:
    """Tell of batches that stopped themselves, in the transaction that stops them."""
    if batches:
        found = rows.batches_to_tell(conn, batches)
        told = [_batch(row, "batch.stopped", reason=row["stop_reason"]) for row in found]
        rows.tell(conn, [message for message, events in told if "batch.stopped" in events])


def _failed(row: RowMapping) -> dict[str, Any]:
    error = {"code": row["error_code"], "message": row["error_message"]}
    ids = {"id": str(row["id"]), "batch_id": str(row["batch_id"])}
    same = {name: row[name] for name in ("number", "attempt", "labels")}
    return message(row["webhook"], "job.failed", {**ids, **same, "error": error}, row["batch_id"])


def _batch(row: RowMapping, event: str, **more: Any) -> tuple[dict[str, Any], list[str]]:
    counts = {name: int(row[name]) for name in ("queued", "running", "succeeded", "failed", "cancelled")}
    same = {name: row[name] for name in ("name", "labels", "total")}
    data = {"id": str(row["id"]), **same, "counts": counts, **more}
    return message(row["webhook"], event, data, row["id"]), row["events"]
