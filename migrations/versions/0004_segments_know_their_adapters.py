"""Segments know their adapter set, and are found by it and by their project."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    # A migration that waits for a lock makes every query behind it wait too: give up instead and run again later.
    op.execute("SET LOCAL lock_timeout = '5s'")
    # NULL for segments that are there already: they may have several sets.
    op.execute("ALTER TABLE segments ADD COLUMN adapter_set TEXT")

    op.execute("""
CREATE INDEX ix_segments_set ON segments (pool, lane, adapter_set, priority DESC, head_run_at) WHERE head_run_at IS NOT NULL AND NOT paused AND NOT cancelling
    """)

    op.execute("""
CREATE INDEX ix_segments_project ON segments (pool, priority, project_id, head_run_at, id) WHERE head_run_at IS NOT NULL AND NOT paused AND NOT cancelling
    """)
