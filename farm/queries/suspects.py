"""Which worker may try a job that crashed another: words of statements that claim.

A worker is its place, whatever process is there at the moment: a process that crashed comes back under another id.
"""

from datetime import timedelta
from typing import Any
from uuid import UUID

from farm.settings import Settings

PLACE = "coalesce({0}.name, {0}.host || '/' || {0}.device)"
"""A worker's place: its name, else its host and device. `{0}` is a row of workers."""

# Of a job's crashes the last `crashes` ones happened while it was claimed alone.
# Evaluated for jobs under suspicion only: all others stop at NOT alone.
LEFT_TO_OTHERS = f"""
    EXISTS (
        SELECT 1 FROM segments s JOIN workers me ON me.id = :worker CROSS JOIN LATERAL (
            SELECT array_agg({PLACE.format("w")}) AS places, max(t.finished_at) AS last
            FROM (SELECT claim_id, finished_at FROM attempts WHERE job_id = jobs.id AND outcome = 'crashed'
                  ORDER BY number DESC LIMIT jobs.crashes) t
            JOIN claims c ON c.id = t.claim_id JOIN workers w ON w.id = c.worker_id) tried
        WHERE s.id = jobs.segment_id AND {PLACE.format("me")} = ANY(tried.places)
          AND tried.last > CAST(:now AS timestamptz) - CAST(:patience AS interval)
          AND EXISTS (
            SELECT 1 FROM workers o
            WHERE o.pool = me.pool AND o.state IN ('idle', 'busy') AND o.left_at IS NULL
              AND o.heartbeat_at > clock_timestamp() - CAST(:lease AS interval)
              AND {PLACE.format("o")} <> ALL(tried.places)
              AND NOT o.resting @> jsonb_build_array(jsonb_build_object('hash', s.lane))
              AND NOT o.resting @> jsonb_build_array(jsonb_build_object('hash', s.checkpoint))))
"""
"""Whether a row of `jobs` crashed this worker alone a short while ago, and another one could try it: alive, of the same
pool, not crashed by it, and not resting from its pipeline. Wants `:now` and what `asked` gives."""


def asked(worker: UUID, settings: Settings) -> dict[str, Any]:
    """Who asks, how long others come first, and how old a heartbeat of theirs may be."""
    patience: timedelta = settings.suspect_wait
    return {"worker": worker, "patience": patience, "lease": settings.lease}
