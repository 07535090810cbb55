"""Add limits of projects, and the open jobs of each that they are held against."""

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute("""
ALTER TABLE projects
    ADD COLUMN queued BIGINT DEFAULT 0 NOT NULL,
    ADD COLUMN running BIGINT DEFAULT 0 NOT NULL,
    ADD COLUMN max_queued_jobs BIGINT,
    ADD COLUMN max_running_jobs BIGINT,
    ADD COLUMN max_pixel_steps_per_day BIGINT,
    ADD COLUMN max_requests_per_second BIGINT,
    ADD COLUMN spent_on DATE,
    ADD COLUMN spent_pixel_steps BIGINT DEFAULT 0 NOT NULL
    """)

    op.execute("""
CREATE INDEX ix_projects_running_limit ON projects (id) WHERE max_running_jobs IS NOT NULL
    """)

    # Deltas that are not folded yet will be, into these too.
    op.execute("""
UPDATE projects p SET queued = open.queued, running = open.running FROM (
    SELECT s.project_id, sum(c.queued) AS queued, sum(c.running) AS running
    FROM counters c JOIN segments s ON s.id = c.segment_id WHERE c.queued > 0 OR c.running > 0 GROUP BY 1) open
WHERE p.id = open.project_id
    """)
