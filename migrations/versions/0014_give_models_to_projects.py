"""Give models to projects: a model, and a registration, may belong to one; all that are there stay everybody's."""

from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    for table in ("models", "registrations"):
        op.execute(f"""
ALTER TABLE {table} ADD COLUMN project_id UUID CONSTRAINT fk_{table}_project_id REFERENCES projects (id)
        """)
