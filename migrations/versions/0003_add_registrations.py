"""Add registrations: models on their way into the farm; and VAEs as a kind of model."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute("ALTER TABLE models DROP CONSTRAINT ck_models_kind")
    op.execute("""
ALTER TABLE models ADD CONSTRAINT ck_models_kind CHECK (kind IN ('checkpoint', 'vae', 'acceleration', 'style'))
    """)

    op.execute("CREATE INDEX ix_model_files_key ON model_files (key)")

    op.execute("""
CREATE TABLE registrations (
    id UUID NOT NULL,
    name TEXT NOT NULL,
    kind TEXT NOT NULL,
    source TEXT NOT NULL,
    wanted JSONB DEFAULT '{}'::jsonb NOT NULL,
    pool TEXT NOT NULL,
    state TEXT NOT NULL,
    reason TEXT,
    notes TEXT[] DEFAULT '{}'::text[] NOT NULL,
    raw TEXT,
    fresh TEXT[] DEFAULT '{}'::text[] NOT NULL,
    hash TEXT,
    family TEXT,
    bytes BIGINT DEFAULT 0 NOT NULL,
    total_bytes BIGINT,
    attempt INTEGER DEFAULT 0 NOT NULL,
    failures SMALLINT DEFAULT 0 NOT NULL,
    crashes SMALLINT DEFAULT 0 NOT NULL,
    worker_id UUID,
    lease_until TIMESTAMP WITH TIME ZONE,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    finished_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT pk_registrations PRIMARY KEY (id),
    CONSTRAINT ck_registrations_kind CHECK (kind IN ('checkpoint', 'vae', 'acceleration', 'style')),
    CONSTRAINT ck_registrations_state CHECK (state IN ('waiting', 'fetching', 'checking', 'storing', 'testing', 'available', 'refused')),
    CONSTRAINT ck_registrations_finished_iff_terminal CHECK ((finished_at IS NOT NULL) = (state IN ('available', 'refused')))
)
 WITH (fillfactor = 50)
    """)

    op.execute("""
CREATE INDEX ix_registrations_open ON registrations (pool, id) WHERE finished_at IS NULL
    """)

    op.execute("""
CREATE UNIQUE INDEX uq_registrations_open_name ON registrations (name) WHERE finished_at IS NULL
    """)
