"""Add what a worker is called after a restart, and what it leaves to others."""

from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    # Workers of the release before know neither: they are called by host and device, and leave nothing.
    op.execute("""
ALTER TABLE workers
    ADD COLUMN name TEXT,
    ADD COLUMN resting JSONB DEFAULT '[]'::jsonb NOT NULL
    """)
