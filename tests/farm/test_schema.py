"""The models and the migrations say the same, and the claim's statements walk their indexes."""

import shutil
import uuid
from pathlib import Path
from random import Random
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from farm import db
from farm.db import alembic_config, migrate
from farm.errors import SchemaMismatch
from farm.models import SCHEMA_VERSION
from farm.queries import claiming, finishing, suspects
from farm.scheduling import Warm
from farm.schema import Base
from tests.farm.conftest import Queue


def test_models_equal_migrations(queue: Queue) -> None:
    def difference(conn: Any) -> list[Any]:
        context = MigrationContext.configure(conn, opts={"compare_type": True, "compare_server_default": False})
        return list(compare_metadata(context, Base.metadata))

    assert queue.do(difference) == []


STATED = text("""
    SELECT 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid)
    FROM pg_constraint WHERE connamespace = current_schema()::text::regnamespace AND contype <> 'n'
    UNION ALL
    SELECT 'default', adrelid::regclass::text, attname, pg_get_expr(adbin, adrelid)
    FROM pg_attrdef JOIN pg_attribute ON attrelid = adrelid AND attnum = adnum
    JOIN pg_class c ON c.oid = adrelid WHERE relnamespace = current_schema()::text::regnamespace
    UNION ALL
    SELECT 'identity', attrelid::regclass::text, attname, attidentity::text
    FROM pg_attribute JOIN pg_class c ON c.oid = attrelid
    WHERE relnamespace = current_schema()::text::regnamespace AND relkind = 'r' AND attidentity <> ''
    UNION ALL
    SELECT 'index', tablename, indexname, replace(indexdef, schemaname || '.', '')
    FROM pg_indexes WHERE schemaname = current_schema()
    UNION ALL
    SELECT 'storage', oid::regclass::text, '', reloptions::text
    FROM pg_class WHERE relnamespace = current_schema()::text::regnamespace AND relkind = 'r' AND reloptions IS NOT NULL
""")
"""What a schema says of its tables beyond their columns, in PostgreSQL's own words: constraints, defaults, indexes."""


def test_constraints_defaults_and_indexes_of_models_equal_those_of_migrations(queue: Queue) -> None:
    def stated(conn: Connection, schema: str) -> set[tuple[str, ...]]:
        conn.exec_driver_sql(f"SET LOCAL search_path TO {schema}")
        found = {tuple(row) for row in conn.execute(STATED)}
        return {row for row in found if row[1] != "alembic_version"}

    with queue.database.engine.connect() as conn:
        migrated = stated(conn, "public")
        conn.exec_driver_sql("CREATE SCHEMA modelled; SET LOCAL search_path TO modelled")
        Base.metadata.create_all(conn, checkfirst=False)
        modelled = stated(conn, "modelled")
        conn.rollback()
    assert {row[0] for row in migrated} == {"constraint", "default", "identity", "index", "storage"}
    assert modelled == migrated


def test_the_code_knows_the_newest_migration() -> None:
    assert ScriptDirectory.from_config(alembic_config()).get_current_head() == SCHEMA_VERSION


def test_a_newer_or_missing_schema_is_refused(queue: Queue) -> None:
    queue.database.check_schema()
    assert migrate(queue.settings) == (SCHEMA_VERSION, SCHEMA_VERSION)
    queue.do(lambda conn: conn.execute(text("UPDATE alembic_version SET version_num = '9999'")))
    with pytest.raises(SchemaMismatch, match="upgrade the farm"):
        queue.database.check_schema()
    with pytest.raises(SchemaMismatch, match="newer"):
        migrate(queue.settings)


def test_the_next_migration_will_find_its_way_and_keep_the_rows(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = queue.submit(2)
    migrations = tmp_path / "migrations"
    shutil.copytree(Path(alembic_config().get_main_option("script_location") or ""), migrations)
    (migrations / "versions" / "9000_next_year.py").write_text(
        f"from alembic import op\nrevision, down_revision = '9000', '{SCHEMA_VERSION}'\n"
        "def upgrade(): op.execute('ALTER TABLE jobs ADD COLUMN of_next_year text')\n"
    )
    config = Config()
    config.set_main_option("script_location", str(migrations))
    monkeypatch.setattr(db, "alembic_config", lambda: config)
    monkeypatch.setattr(db, "SCHEMA_VERSION", "9000")
    with pytest.raises(SchemaMismatch, match="run: farm migrate"):
        queue.database.check_schema()
    assert migrate(queue.settings) == (SCHEMA_VERSION, "9000")
    queue.database.check_schema()
    assert queue.counts(batch) == {"queued": 2}
    assert queue.do(lambda conn: conn.scalar(text("SELECT count(of_next_year) FROM jobs"))) == 0


def plan(queue: Queue, statement: Any, parameters: dict[str, Any]) -> str:
    explained = text("EXPLAIN " + str(statement))
    return "\n".join(queue.do(lambda conn: list(conn.execute(explained, parameters).scalars())))


def test_claiming_walks_its_indexes(queue: Queue) -> None:
    queue.submit(3000)
    queue.do(lambda conn: conn.execute(text("ANALYZE")))
    now = queue.do(claiming.database_now)
    segment = queue.do(lambda conn: conn.execute(text("SELECT * FROM segments")).mappings().one())
    place = {
        "segment": segment["id"],
        "now": now,
        "head_run_at": segment["head_run_at"],
        "head_id": segment["head_id"],
        "limit": 8,
    }
    first = plan(queue, claiming._TAKE, place | suspects.asked(queue.worker, queue.settings))
    assert "ix_jobs_queue on jobs" in first
    walk, asked_first, _ = first.partition("((NOT alone) OR (crashes = 0) OR (NOT EXISTS(SubPlan")
    assert asked_first, "the rest of the plan is for suspects only"
    by_set = plan(queue, claiming._TAKE_SET, {**place, "adapter_set": ""})
    assert "Index Scan using ix_jobs_queue" in by_set
    for found in (by_set, walk):
        assert "Sort" not in found
        assert "Seq Scan" not in found


def test_what_is_asked_of_a_suspect_walks_its_indexes(queue: Queue) -> None:
    queue.submit({"prompt": "a", "guidance_scale": 1 + n / 1000} for n in range(2000))
    tried = """
        WITH claimed AS (
            INSERT INTO claims (id, worker_id, lease_until, closed_at)
            SELECT id, :worker, now(), now() FROM jobs RETURNING id)
        INSERT INTO attempts (job_id, number, claim_id, outcome, finished_at)
        SELECT id, number, id, 'crashed', now() FROM claimed, generate_series(1, 3) AS number
    """
    queue.do(lambda conn: conn.execute(text(tried), {"worker": queue.worker}))
    queue.do(lambda conn: conn.execute(text("ANALYZE")))
    asked = suspects.asked(queue.worker, queue.settings) | {"now": queue.do(claiming.database_now)}
    found = plan(queue, f"SELECT {suspects.LEFT_TO_OTHERS} FROM jobs WHERE alone", asked)
    subplan = found[found.index("SubPlan") :]
    for index in ("pk_segments", "pk_attempts", "pk_claims"):
        assert index in subplan, found
    assert "Seq Scan" not in subplan.replace("Seq Scan on workers", ""), "there are few workers"


def test_finding_work_walks_its_indexes(queue: Queue) -> None:
    queue.submit({"prompt": "a", "seed": n, "guidance_scale": 1 + n / 1000} for n in range(3000))
    crowded = "UPDATE segments SET lane = 'crowded', adapter_set = id::text, project_id = gen_random_uuid()"
    queue.do(lambda conn: conn.execute(text(crowded)))
    queue.do(lambda conn: conn.execute(text("ANALYZE")))
    now = queue.do(claiming.database_now)
    # What the claim itself hands over, so that the plan is its own.
    looked: list[tuple[Any, dict[str, Any]]] = []

    class Recorder:
        def execute(self, statement: Any, parameters: dict[str, Any]) -> Any:
            looked.append((statement, parameters))
            return queue.do(lambda conn: conn.execute(statement, parameters).freeze())()

    claiming.candidates(
        Recorder(),  # type: ignore[arg-type]
        pool="default", worker=uuid.uuid4(), warm=Warm({"crowded": ""}, frozenset({"x"})), full=[uuid.uuid4()],
        random=Random(1), now=now,
    )  # fmt: skip
    found = plan(queue, *looked[0])
    for index in ("ready", "project", "set", "lane"):
        assert f"ix_segments_{index} on segments" in found, found
    assert "Seq Scan on segments" not in found
    assert "Seq Scan on counters" not in found
    assert " jobs" not in found
    others = {
        "pool": "default",
        "lane": "crowded",
        "adapter_set": "",
        "not_these": [],
        "full": [],
        "limit": 8,
        "now": now,
    }
    filling = plan(queue, claiming._LANE_SET, others)
    assert filling.count("ix_segments_set on segments") == 2
    assert "ix_segments_lane on segments" in plan(queue, claiming._LANE, others)
    assert queue.do(claiming.claim_exists, uuid.uuid4()) is False


def test_rescuing_costs_what_is_lost_and_not_what_is_there(queue: Queue) -> None:
    """Most of the claims are closed and most of the jobs are done; a look for expired ones reads neither."""
    queue.submit(3000)
    while claimed := queue.claim(limit=100):
        queue.finish(claimed)
    closed = text("""
        INSERT INTO claims (id, worker_id, lease_until, created_at, closed_at)
        SELECT gen_random_uuid(), gen_random_uuid(), now(), now(), now() FROM generate_series(1, 5000)
    """)
    queue.do(lambda conn: conn.execute(closed))
    queue.submit(20)
    lost = queue.claim(limit=4)
    assert lost is not None
    queue.do(lambda conn: conn.execute(text("ANALYZE")))
    now = queue.do(claiming.database_now)
    expired = {"worker": None, "lease": queue.settings.lease, "limit": 1000, "now": now}
    ids = [job.id for job in lost.jobs]
    for found in (
        plan(queue, finishing._EXPIRED, expired),
        plan(queue, finishing._EXPIRED, expired | {"worker": queue.worker}),
        plan(queue, finishing._LOCK_FREE, {"ids": ids}),
        plan(queue, finishing._END_CLAIMS, {"ids": [lost.claim_id], "worker": None, "now": now}),
    ):
        for table in ("jobs", "attempts", "claims"):
            assert f"Seq Scan on {table}" not in found, found
    assert "ix_claims_open" in plan(queue, finishing._EXPIRED, expired)
