"""A job once more, beside itself."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection, text

_REPLAY = text("""
    WITH original AS (
        SELECT j.id, j.project_id, j.adapter_set, s.pool, s.lane, s.checkpoint, s.priority, i.key,
               r.hash, r.body, r.names, r.warnings, r.metadata_wanted,
               jsonb_build_object('replay_of', CAST(j.id AS text)) AS labels
        FROM jobs j JOIN segments s ON s.id = j.segment_id JOIN images i ON i.job_id = j.id
        JOIN recipes r ON r.job_id = j.id WHERE j.id = :original
    ), batch AS (
        INSERT INTO batches (id, project_id, name, labels, warnings, total, priority)
        SELECT :batch, project_id, 'replay of ' || id, labels, warnings, 1, priority FROM original
    ), segment AS (
        INSERT INTO segments (id, batch_id, project_id, pool, lane, checkpoint, adapter_set, priority, head_run_at,
                              head_id)
        SELECT :segment, :batch, project_id, pool, lane, checkpoint, adapter_set, priority, :now, :job FROM original
    ), counter AS (
        INSERT INTO counters (segment_id, batch_id) SELECT :segment, :batch FROM original
    ), delta AS (
        INSERT INTO counter_deltas (segment_id, batch_id, project_id, queued)
        SELECT :segment, :batch, project_id, 1 FROM original
    ), job AS (
        INSERT INTO jobs (id, segment_id, batch_id, project_id, number, state, adapter_set, run_at, created_at)
        SELECT :job, :segment, :batch, project_id, 0, 'queued', adapter_set, :now, :now FROM original
    ), recipe AS (
        INSERT INTO recipes (job_id, hash, body, names, labels, warnings, metadata_wanted)
        SELECT :job, hash, body, names, labels, warnings, metadata_wanted FROM original
    ), replay AS (
        INSERT INTO replays (job_id, original_id, key) SELECT :job, id, key FROM original
    ), uploads_named AS (
        INSERT INTO job_uploads (job_id, project_id, hash)
        SELECT :job, project_id, hash FROM job_uploads WHERE job_id = :original
    )
    SELECT CAST(body ->> 'width' AS bigint) * CAST(body ->> 'height' AS bigint) * CAST(body ->> 'steps' AS bigint)
           * COALESCE(CAST(body ->> 'frames' AS bigint), 1)
    FROM original
""")


def insert_replay(conn: Connection, original: UUID, *, batch: UUID, segment: UUID, job: UUID, now: datetime) -> int:
    """A new job with the very recipe of one that succeeded, in a batch of its own, and what it is compared with.

    Answers its pixel steps.
    """
    parameters = {"original": original, "batch": batch, "segment": segment, "job": job, "now": now}
    return int(conn.execute(_REPLAY, parameters).scalar_one())
