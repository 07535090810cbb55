"""Replays: a job rendered again beside itself and compared. What a worker's cache holds and how often it helps."""

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute("""
CREATE TABLE replays (
    job_id UUID NOT NULL,
    original_id UUID NOT NULL,
    key TEXT NOT NULL,
    levels SMALLINT,
    mean_levels DOUBLE PRECISION,
    differing DOUBLE PRECISION,
    CONSTRAINT pk_replays PRIMARY KEY (job_id),
    CONSTRAINT ck_replays_compared_or_not CHECK (num_nulls(levels, mean_levels, differing) IN (0, 3))
)
    """)

    op.execute("""
ALTER TABLE workers ADD COLUMN cache JSONB DEFAULT '{}'::jsonb NOT NULL
    """)
