"""What the first schema held is there after every migration since, and its queue goes on."""

import hashlib
import uuid
from typing import Any

import orjson
import pytest
from alembic import command
from sqlalchemy import text

from farm import catalogue, jobs, keys
from farm.db import Database, alembic_config, migrate
from farm.errors import SchemaMismatch
from farm.jobs import Warm
from farm.models import SCHEMA_VERSION
from farm.settings import Settings
from farm.states import Outcome
from tests.farm.conftest import stored

KEY = "farm_of-the-first-year"
PROJECT, BATCH, SEGMENT, CLAIM = (uuid.UUID(int=number) for number in range(1, 5))
JOBS = {"queued": uuid.UUID(int=11), "succeeded": uuid.UUID(int=12), "cancelled": uuid.UUID(int=13)}
BODY = {
    "version": 1,
    "task": "txt2img",
    "prompt": "a crack",
    "negative_prompt": "",
    "seed": 7,
    "width": 128,
    "height": 128,
    "steps": 4,
    "guidance_scale": 1.0,
    "scheduler": "lcm",
    "checkpoint": "a" * 64,
    "acceleration": {"hash": "b" * 64, "weight": 1.0},
    "adapters": [{"hash": "d" * 64, "weight": 0.5}],
}
"""A recipe as the first version wrote it."""
NAMES = {"checkpoint": "crack-tiny", "acceleration": "lcm-lora", "adapters": [{"name": "moss", "weight": 0.5}]}
ROWS = """
    INSERT INTO projects (id, name, served) VALUES (:project, 'cracks', 3);
    INSERT INTO api_keys (id, project_id, name, prefix, digest, scopes)
        VALUES (gen_random_uuid(), :project, 'me', :prefix, :digest, '{jobs:read,jobs:write}');
    INSERT INTO models (name, hash, kind, family, state, bytes, profile)
        VALUES ('crack-tiny', :checkpoint, 'checkpoint', 'crack-tiny', 'available', 5, :profile),
               ('lcm', :acceleration, 'acceleration', 'crack-tiny', 'available', 2, '{}'),
               ('moss', :style, 'style', 'crack-tiny', 'available', 1, '{}');
    INSERT INTO batches (id, project_id, name, labels, total, priority)
        VALUES (:batch, :project, 'walls', '{"site": "north"}', 3, 2);
    INSERT INTO segments (id, batch_id, project_id, pool, lane, checkpoint, priority, head_run_at, head_id)
        VALUES (:segment, :batch, :project, 'default', 'a lane', :checkpoint, 2, now(), :queued);
    INSERT INTO jobs (id, segment_id, batch_id, project_id, number, state, adapter_set, run_at, created_at, attempt,
                      started_at, finished_at, finished_xid)
        SELECT CAST(id AS uuid), :segment, :batch, :project, n - 1, state, 'a set', now(), now(),
               CAST(state = 'succeeded' AS int), CASE WHEN state = 'succeeded' THEN now() END,
               CASE WHEN state <> 'queued' THEN now() END,
               CASE WHEN state <> 'queued' THEN pg_current_xact_id() END
        FROM unnest(ARRAY[:queued, :succeeded, :cancelled], ARRAY['queued', 'succeeded', 'cancelled'])
            WITH ORDINALITY AS given(id, state, n);
    INSERT INTO recipes (job_id, hash, body, names, labels, warnings)
        SELECT id, '\\x00', :body, :names, '{"wall": "3"}', '{cut}' FROM jobs;
    INSERT INTO claims (id, worker_id, lease_until, closed_at) VALUES (:claim, :claim, now(), now());
    INSERT INTO attempts (job_id, number, claim_id, outcome, finished_at)
        VALUES (:succeeded, 1, :claim, 'succeeded', now());
    INSERT INTO images (job_id, key, thumbnail_key, sha256, bytes, thumbnail_bytes, width, height)
        VALUES (:succeeded, 'p/1', 'p/1.webp', repeat('c', 64), 100, 10, 128, 128);
    INSERT INTO counters (segment_id, batch_id, queued, succeeded) VALUES (:segment, :batch, 1, 1);
    INSERT INTO counter_deltas (segment_id, batch_id, project_id, cancelled) VALUES (:segment, :batch, :project, 1);
"""


def write_the_first_year(database: Database) -> None:
    values: dict[str, Any] = {
        "project": PROJECT, "batch": BATCH, "segment": SEGMENT, "claim": CLAIM, **JOBS,
        "prefix": KEY[: keys.PREFIX_LENGTH], "digest": hashlib.sha256(KEY.encode()).digest(),
        "checkpoint": "a" * 64, "acceleration": "b" * 64, "style": "d" * 64,
        "profile": '{"width": 128, "height": 128}',
        "body": orjson.dumps(BODY).decode(), "names": orjson.dumps(NAMES).decode(),
    }  # fmt: skip
    with database.transaction() as conn:
        config = alembic_config()
        config.attributes["connection"] = conn
        command.upgrade(config, "0001")
        for statement in filter(str.strip, ROWS.split(";\n")):
            conn.execute(text(statement), values)


def test_rows_of_the_first_schema_are_read_and_rendered_by_this_one(empty_settings: Settings) -> None:
    database = Database(empty_settings, pool_size=1)
    try:
        write_the_first_year(database)
        with pytest.raises(SchemaMismatch, match="farm migrate"):
            database.check_schema()
        assert migrate(empty_settings) == ("0001", SCHEMA_VERSION)
        database.check_schema()
        with database.transaction() as conn:
            caller = keys.authenticate(conn, KEY)
            assert (caller.project_id, caller.project) == (PROJECT, "cracks")
            assert [one.name for one in catalogue.list_checkpoints(conn)] == ["crack-tiny"]
            assert {one.name: one.kind for one in catalogue.list_adapters(conn)} == {
                "lcm": "acceleration",
                "moss": "style",
            }
            (batch,) = jobs.list_batches(conn, PROJECT).items
            assert (batch.id, batch.name, batch.labels, batch.total) == (BATCH, "walls", {"site": "north"}, 3)
            assert (batch.counts.queued, batch.counts.succeeded, batch.counts.cancelled) == (1, 1, 1)
            shown = jobs.list_jobs(conn, PROJECT, batch=BATCH).items
            assert {job.state: job.id for job in shown} == JOBS
            for job in shown:
                assert (job.prompt, job.seed, job.checkpoint, job.priority) == ("a crack", 7, "crack-tiny", 2)
                assert [(one.name, one.weight) for one in job.adapters] == [("moss", 0.5)]
                assert (job.labels, job.warnings, job.format) == ({"wall": "3"}, ["cut"], "png")
            assert jobs.image_of(conn, PROJECT, JOBS["succeeded"]).key == "p/1"
            (lane,) = jobs.queue(conn)
            assert (lane.checkpoint, lane.depth) == ("crack-tiny", 1)

        # Its jobs are still jobs: the one that is queued is claimed and finished, the cancelled one comes back.
        with database.transaction() as conn:
            jobs.retry_job(conn, PROJECT, JOBS["cancelled"])
        with database.transaction() as conn:
            claimed = jobs.claim(
                conn, claim_id=uuid.uuid4(), worker=uuid.uuid4(), pool="default", warm=Warm(), limit=8,
                settings=empty_settings,
            )  # fmt: skip
        assert claimed is not None
        assert {job.id for job in claimed.jobs} == {JOBS["queued"], JOBS["cancelled"]}
        assert claimed.jobs[0].recipe.model_dump(mode="json", exclude_none=True) == BODY
        with database.transaction() as conn:
            results = [jobs.Result(job.id, job.attempt, Outcome.SUCCEEDED, stored(job)) for job in claimed.jobs]
            jobs.finish(conn, claim_id=claimed.claim_id, results=results, settings=empty_settings)
        with database.transaction() as conn:
            assert jobs.get_batch(conn, PROJECT, BATCH).counts.succeeded == 3
    finally:
        database.dispose()
