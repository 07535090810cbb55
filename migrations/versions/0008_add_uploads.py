"""Add uploads: pictures that people sent, and which jobs name them."""

from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute("""
CREATE TABLE uploads (
    project_id UUID NOT NULL,
    hash TEXT NOT NULL,
    key TEXT NOT NULL,
    media_type TEXT NOT NULL,
    width INTEGER NOT NULL,
    height INTEGER NOT NULL,
    bytes BIGINT NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    used_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT pk_uploads PRIMARY KEY (project_id, hash),
    CONSTRAINT uq_uploads_key UNIQUE (key)
)
    """)

    op.execute("CREATE INDEX ix_uploads_used_at ON uploads (used_at)")

    op.execute("""
CREATE TABLE job_uploads (
    job_id UUID NOT NULL,
    hash TEXT NOT NULL,
    project_id UUID NOT NULL,
    CONSTRAINT pk_job_uploads PRIMARY KEY (job_id, hash),
    CONSTRAINT fk_job_uploads_project_id FOREIGN KEY(project_id, hash) REFERENCES uploads (project_id, hash)
)
    """)

    op.execute("CREATE INDEX ix_job_uploads_hash ON job_uploads (hash, project_id)")
