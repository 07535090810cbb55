"""Add a limit of the bytes that a project may keep as uploads."""

from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute("ALTER TABLE projects ADD COLUMN max_upload_bytes BIGINT")
