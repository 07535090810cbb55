"""Locking the jobs of one micro-batch: a few index probes, whatever lies in the queue."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, RowMapping

from farm.queries import claiming

Taken = tuple[list[UUID], list[UUID]]
"""The jobs locked, and the segments found short: their heads can be raised."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where to take from, how many at most, for whom (`suspects.asked`), and of which projects nothing."""

    pool: str
    lane: str
    limit: int
    now: datetime
    asked: Mapping[str, Any]
    full: Collection[UUID] = ()


def take_one_set(conn: Connection, lead: RowMapping, place: Place, prefer: str | None) -> Taken:
    """Jobs of one adapter set, first from the lead segment: of the preferred set, or of whichever comes first."""
    taken: dict[UUID, None] = {}
    short: list[UUID] = []
    limit, now = place.limit, place.now
    adapter_set = prefer
    rows = claiming.take(conn, lead, adapter_set=adapter_set, limit=limit, now=now, asked=place.asked)
    if not rows and adapter_set is not None:
        adapter_set = None
        rows = claiming.take(conn, lead, adapter_set=None, limit=limit, now=now, asked=place.asked)
    if rows and rows[0]["alone"]:
        return [rows[0]["id"]], []
    if not rows:
        return [], [lead["segment"]]
    chosen: str = rows[0]["adapter_set"]
    taken.update((row["id"], None) for row in rows if row["adapter_set"] == chosen and not row["alone"])
    if len(rows) < limit:
        short.append(lead["segment"])
    elif len(taken) < limit:
        more = claiming.take(conn, lead, adapter_set=chosen, limit=limit, now=now, asked=place.asked)
        taken.update((row["id"], None) for row in more)
    for other in _others(conn, lead, place, chosen, limit - len(taken)):
        missing = limit - len(taken)
        found = claiming.take(conn, other, adapter_set=chosen, limit=missing, now=now, asked=place.asked)
        taken.update((row["id"], None) for row in found)
        if len(found) < missing:
            short.append(other["segment"])
        if len(taken) >= limit:
            break
    return list(taken)[:limit], short


def take_any(conn: Connection, lead: RowMapping, place: Place) -> Taken:
    """Jobs of any adapter sets in the order of the queue, first from the lead segment."""
    rows = claiming.take(conn, lead, adapter_set=None, limit=place.limit, now=place.now, asked=place.asked)
    if rows and rows[0]["alone"]:
        return [rows[0]["id"]], []
    taken = [row["id"] for row in rows if not row["alone"]]
    short = [lead["segment"]] if len(rows) < place.limit else []
    if not rows:
        return [], short
    for other in _others(conn, lead, place, None, place.limit - len(taken)):
        missing = place.limit - len(taken)
        found = claiming.take(conn, other, adapter_set=None, limit=missing, now=place.now, asked=place.asked)
        taken += [row["id"] for row in found if not row["alone"]]
        if len(found) < missing:
            short.append(other["segment"])
        if len(taken) >= place.limit:
            break
    return taken, short


def _others(
    conn: Connection, lead: RowMapping, place: Place, adapter_set: str | None, missing: int
) -> Iterator[RowMapping]:
    """More segments of the lane, where jobs are missing: those that may hold this adapter set, or all."""
    if missing > 0:
        yield from claiming.lane_segments(
            conn,
            pool=place.pool,
            lane=place.lane,
            adapter_set=adapter_set,
            not_these=[lead["segment"]],
            full=place.full,
            limit=missing,
            now=place.now,
        )
