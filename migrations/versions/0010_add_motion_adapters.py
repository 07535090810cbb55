"""Add motion adapters as a kind of model."""

from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    for table in ("models", "registrations"):
        op.execute(f"ALTER TABLE {table} DROP CONSTRAINT ck_{table}_kind")
        op.execute(f"""
ALTER TABLE {table} ADD CONSTRAINT ck_{table}_kind
CHECK (kind IN ('checkpoint', 'vae', 'controlnet', 'motion', 'acceleration', 'style'))
        """)
