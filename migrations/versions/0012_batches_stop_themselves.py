"""Add the share of failed jobs at which a batch stops itself, and why it did."""

from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    # Writers of the release before know none of these, and need not: nothing stops by itself without a share.
    op.execute("""
ALTER TABLE batches
    ADD COLUMN stop_at_failed_share DOUBLE PRECISION,
    ADD COLUMN stop_reason TEXT,
    ADD CONSTRAINT ck_batches_stop_at_failed_share CHECK (stop_at_failed_share > 0 AND stop_at_failed_share <= 1)
    """)
    op.execute("ALTER TABLE segments ADD COLUMN stopping BOOLEAN DEFAULT false NOT NULL")
