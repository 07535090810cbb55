"""Storing a submission: batch, segments, then jobs and recipes by COPY."""

from collections.abc import Iterable, Sequence
from datetime import timedelta
from os import SEEK_END
from typing import IO, Any
from uuid import UUID

from sqlalchemy import Connection, RowMapping, bindparam, text
from sqlalchemy.dialects.postgresql import JSONB

COPY_CHUNK = 256 * 1024
COPY_FLOOR = 256 * 1024
"""Bytes a second below which a COPY is held to be stuck. A busy disk writes a million jobs in minutes, not in the
time that any other statement gets."""

JOBS = "COPY jobs (id, segment_id, batch_id, project_id, number, state, adapter_set, run_at, created_at) FROM STDIN"
RECIPES = "COPY recipes (job_id, hash, body, names, labels, warnings, metadata_wanted) FROM STDIN"

_BATCH = text("""
    INSERT INTO batches (id, project_id, name, labels, warnings, total, priority, stop_at_failed_share)
    VALUES (:id, :project_id, :name, :labels, :warnings, :total, :priority, :stop_at_failed_share)
""").bindparams(bindparam("labels", type_=JSONB))

_SEGMENTS = text("""
    INSERT INTO segments (id, batch_id, project_id, pool, lane, checkpoint, adapter_set, priority,
                          head_run_at, head_id)
    SELECT s.id, :batch_id, :project_id, :pool, s.lane, s.checkpoint, s.adapter_set, s.priority,
           s.head_run_at, s.head_id
    FROM unnest(CAST(:ids AS uuid[]), CAST(:lanes AS text[]), CAST(:checkpoints AS text[]),
                CAST(:adapter_sets AS text[]), CAST(:priorities AS int[]),
                CAST(:head_run_ats AS timestamptz[]), CAST(:head_ids AS uuid[]))
        AS s(id, lane, checkpoint, adapter_set, priority, head_run_at, head_id)
""")

# As a delta, which the fold also adds to the project: a limit then never has two submissions wait for each other.
_COUNT = text("""
    WITH counters AS (
        INSERT INTO counters (segment_id, batch_id) SELECT id, :batch_id FROM unnest(CAST(:ids AS uuid[])) AS s(id))
    INSERT INTO counter_deltas (segment_id, batch_id, project_id, queued)
    SELECT s.id, :batch_id, :project_id, s.jobs FROM unnest(CAST(:ids AS uuid[]), CAST(:jobs AS int[])) AS s(id, jobs)
""")

# Zero is no limit at all and stays so.
_MORE_TIME = text("""
    SELECT set_config('statement_timeout', CAST(CAST(setting AS bigint) + :milliseconds AS text), true)
    FROM pg_settings WHERE name = 'statement_timeout' AND setting <> '0'
""")


def insert_batch(conn: Connection, **batch: Any) -> None:
    """The batch's row: id, project_id, name, labels, warnings, total, priority, stop_at_failed_share."""
    conn.execute(_BATCH, batch)


def insert_segments(conn: Connection, *, batch: UUID, project: UUID, pool: str, segments: Sequence[Any]) -> None:
    """The segments of a new batch, with their counters: all their jobs are queued."""
    parameters = {
        "batch_id": batch,
        "project_id": project,
        "pool": pool,
        "ids": [segment.id for segment in segments],
        "lanes": [segment.lane for segment in segments],
        "checkpoints": [segment.checkpoint for segment in segments],
        "adapter_sets": [segment.adapter_set for segment in segments],
        "priorities": [segment.priority for segment in segments],
        "head_run_ats": [segment.head_run_at for segment in segments],
        "head_ids": [segment.head_id for segment in segments],
    }
    conn.execute(_SEGMENTS, parameters)
    jobs = [segment.jobs for segment in segments]
    conn.execute(_COUNT, {"batch_id": batch, "project_id": project, "ids": parameters["ids"], "jobs": jobs})


def copy(conn: Connection, statement: str, rows: IO[bytes], replacing: tuple[bytes, bytes] | None = None) -> None:
    """Stream spooled rows into a table. `replacing` swaps a one-byte placeholder on the way.

    The statement's time limit grows with what there is to write, until the transaction ends.
    """
    size = rows.seek(0, SEEK_END)
    rows.seek(0)
    conn.execute(_MORE_TIME, {"milliseconds": size * 1000 // COPY_FLOOR})
    driver: Any = conn.connection.driver_connection
    with driver.cursor() as cursor, cursor.copy(statement) as target:
        for chunk in _chunks(rows):
            target.write(chunk.replace(*replacing) if replacing else chunk)


def try_lock(conn: Connection, project: UUID, key: str) -> bool:
    """Hold an Idempotency-Key until the transaction ends; False when a twin holds it."""
    statement = text("SELECT pg_try_advisory_xact_lock(hashtextextended(:name, 0))")
    held: bool = conn.execute(statement, {"name": f"{project}/{key}"}).scalar_one()
    return held


def answer(conn: Connection, project: UUID, key: str, ttl: timedelta) -> RowMapping | None:
    """The stored answer for an Idempotency-Key, unless it is older than `ttl`."""
    statement = text("""
        SELECT request_hash, status, body FROM idempotency
        WHERE project_id = :project AND key = :key AND created_at > clock_timestamp() - CAST(:ttl AS interval)
    """)
    return conn.execute(statement, {"project": project, "key": key, "ttl": ttl}).mappings().one_or_none()


def store_answer(
    conn: Connection, project: UUID, key: str, request_hash: bytes, status: int, body: dict[str, Any]
) -> None:
    """Keep an answer; replaces one that is out of date."""
    statement = text("""
        INSERT INTO idempotency (project_id, key, request_hash, status, body)
        VALUES (:project, :key, :hash, :status, :body)
        ON CONFLICT (project_id, key) DO UPDATE
        SET request_hash = :hash, status = :status, body = :body, created_at = clock_timestamp()
    """).bindparams(bindparam("body", type_=JSONB))
    conn.execute(statement, {"project": project, "key": key, "hash": request_hash, "status": status, "body": body})


def _chunks(rows: IO[bytes]) -> Iterable[bytes]:
    while chunk := rows.read(COPY_CHUNK):
        yield chunk
