"""Create the farm: projects, keys, models, batches, segments, jobs, recipes, claims, attempts, images, workers."""

from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute("""
CREATE TABLE attempts (
    job_id UUID NOT NULL,
    number INTEGER NOT NULL,
    claim_id UUID NOT NULL,
    outcome TEXT,
    error_code TEXT,
    error_message TEXT,
    started_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    finished_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT pk_attempts PRIMARY KEY (job_id, number),
    CONSTRAINT ck_attempts_finished_with_outcome CHECK ((outcome IS NULL) = (finished_at IS NULL))
)
    """)

    op.execute("""
CREATE INDEX ix_attempts_claim_id ON attempts (claim_id)
    """)

    op.execute("""
CREATE TABLE claims (
    id UUID NOT NULL,
    worker_id UUID NOT NULL,
    lease_until TIMESTAMP WITH TIME ZONE NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    closed_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT pk_claims PRIMARY KEY (id)
)
 WITH (fillfactor = 70)
    """)

    op.execute("""
CREATE INDEX ix_claims_open ON claims (worker_id, id) WHERE closed_at IS NULL
    """)

    op.execute("""
CREATE TABLE counter_deltas (
    id BIGINT GENERATED ALWAYS AS IDENTITY,
    segment_id UUID NOT NULL,
    batch_id UUID NOT NULL,
    project_id UUID NOT NULL,
    queued INTEGER DEFAULT 0 NOT NULL,
    running INTEGER DEFAULT 0 NOT NULL,
    succeeded INTEGER DEFAULT 0 NOT NULL,
    failed INTEGER DEFAULT 0 NOT NULL,
    cancelled INTEGER DEFAULT 0 NOT NULL,
    CONSTRAINT pk_counter_deltas PRIMARY KEY (id)
)
    """)

    op.execute("""
CREATE INDEX ix_counter_deltas_batch_id ON counter_deltas (batch_id)
    """)

    op.execute("""
CREATE INDEX ix_counter_deltas_segment_id ON counter_deltas (segment_id)
    """)

    op.execute("""
CREATE TABLE counters (
    segment_id UUID NOT NULL,
    batch_id UUID NOT NULL,
    queued BIGINT DEFAULT 0 NOT NULL,
    running BIGINT DEFAULT 0 NOT NULL,
    succeeded BIGINT DEFAULT 0 NOT NULL,
    failed BIGINT DEFAULT 0 NOT NULL,
    cancelled BIGINT DEFAULT 0 NOT NULL,
    CONSTRAINT pk_counters PRIMARY KEY (segment_id)
)
 WITH (fillfactor = 50)
    """)

    op.execute("""
CREATE INDEX ix_counters_batch_id ON counters (batch_id)
    """)

    op.execute("""
CREATE INDEX ix_counters_open ON counters (segment_id) WHERE queued > 0 OR running > 0
    """)

    op.execute("""
CREATE TABLE doomed_objects (
    key TEXT NOT NULL,
    delete_after TIMESTAMP WITH TIME ZONE NOT NULL,
    CONSTRAINT pk_doomed_objects PRIMARY KEY (key)
)
    """)

    op.execute("""
CREATE INDEX ix_doomed_objects_delete_after ON doomed_objects (delete_after)
    """)

    op.execute("""
CREATE TABLE idempotency (
    project_id UUID NOT NULL,
    key TEXT NOT NULL,
    request_hash BYTEA NOT NULL,
    status SMALLINT NOT NULL,
    body JSONB NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT pk_idempotency PRIMARY KEY (project_id, key)
)
    """)

    op.execute("""
CREATE INDEX ix_idempotency_created_at ON idempotency (created_at)
    """)

    op.execute("""
CREATE TABLE images (
    job_id UUID NOT NULL,
    key TEXT NOT NULL,
    thumbnail_key TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    bytes BIGINT NOT NULL,
    thumbnail_bytes BIGINT NOT NULL,
    width INTEGER NOT NULL,
    height INTEGER NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT pk_images PRIMARY KEY (job_id)
)
    """)

    op.execute("""
CREATE TABLE jobs (
    id UUID NOT NULL,
    segment_id UUID NOT NULL,
    batch_id UUID NOT NULL,
    project_id UUID NOT NULL,
    number INTEGER NOT NULL,
    state TEXT NOT NULL,
    adapter_set TEXT NOT NULL,
    run_at TIMESTAMP WITH TIME ZONE NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE NOT NULL,
    attempt INTEGER DEFAULT 0 NOT NULL,
    failures SMALLINT DEFAULT 0 NOT NULL,
    crashes SMALLINT DEFAULT 0 NOT NULL,
    alone BOOLEAN DEFAULT false NOT NULL,
    cancel_requested_at TIMESTAMP WITH TIME ZONE,
    started_at TIMESTAMP WITH TIME ZONE,
    finished_at TIMESTAMP WITH TIME ZONE,
    finished_xid xid8,
    error_code TEXT,
    error_message TEXT,
    CONSTRAINT pk_jobs PRIMARY KEY (id),
    CONSTRAINT ck_jobs_state CHECK (state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
    CONSTRAINT ck_jobs_finished_iff_terminal CHECK ((finished_at IS NOT NULL) = (state IN ('succeeded', 'failed', 'cancelled'))),
    CONSTRAINT ck_jobs_finished_in_a_transaction CHECK ((finished_at IS NULL) = (finished_xid IS NULL))
)
    """)

    op.execute("""
CREATE INDEX ix_jobs_batch_id_id ON jobs (batch_id, id)
    """)

    op.execute("""
CREATE INDEX ix_jobs_failed ON jobs (project_id, id) WHERE state = 'failed'
    """)

    op.execute("""
CREATE INDEX ix_jobs_finished ON jobs (batch_id, finished_xid, id) WHERE finished_xid IS NOT NULL
    """)

    op.execute("""
CREATE INDEX ix_jobs_project_id_id ON jobs (project_id, id)
    """)

    op.execute("""
CREATE INDEX ix_jobs_queue ON jobs (segment_id, run_at, id) WHERE state = 'queued'
    """)

    op.execute("""
CREATE INDEX ix_jobs_queue_set ON jobs (segment_id, adapter_set, run_at, id) WHERE state = 'queued'
    """)

    op.execute("""
CREATE INDEX ix_jobs_running ON jobs (segment_id, id) WHERE state = 'running'
    """)

    op.execute("""
CREATE TABLE model_files (
    hash TEXT NOT NULL,
    path TEXT NOT NULL,
    key TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    bytes BIGINT NOT NULL,
    CONSTRAINT pk_model_files PRIMARY KEY (hash, path)
)
    """)

    op.execute("""
CREATE TABLE models (
    name TEXT NOT NULL,
    hash TEXT NOT NULL,
    kind TEXT NOT NULL,
    family TEXT NOT NULL,
    state TEXT NOT NULL,
    reason TEXT,
    bytes BIGINT NOT NULL,
    profile JSONB DEFAULT '{}'::jsonb NOT NULL,
    source JSONB DEFAULT '{}'::jsonb NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT pk_models PRIMARY KEY (name),
    CONSTRAINT ck_models_kind CHECK (kind IN ('checkpoint', 'acceleration', 'style')),
    CONSTRAINT ck_models_state CHECK (state IN ('pending', 'available', 'refused'))
)
    """)

    op.execute("""
CREATE INDEX ix_models_hash ON models (hash)
    """)

    op.execute("""
CREATE TABLE projects (
    id UUID NOT NULL,
    name TEXT NOT NULL,
    served DOUBLE PRECISION DEFAULT 0 NOT NULL,
    served_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT pk_projects PRIMARY KEY (id),
    CONSTRAINT uq_projects_name UNIQUE (name)
)
    """)

    op.execute("""
CREATE TABLE rates (
    slot TIMESTAMP WITH TIME ZONE NOT NULL,
    segment_id UUID NOT NULL,
    batch_id UUID NOT NULL,
    succeeded BIGINT NOT NULL,
    CONSTRAINT pk_rates PRIMARY KEY (slot, segment_id)
)
    """)

    op.execute("""
CREATE TABLE recipes (
    job_id UUID NOT NULL,
    hash BYTEA NOT NULL,
    body JSONB NOT NULL,
    names JSONB NOT NULL,
    labels JSONB NOT NULL,
    warnings TEXT[] DEFAULT '{}'::text[] NOT NULL,
    metadata_wanted BOOLEAN DEFAULT true NOT NULL,
    CONSTRAINT pk_recipes PRIMARY KEY (job_id)
)
    """)

    op.execute("""
CREATE INDEX ix_recipes_labels ON recipes USING gin (labels jsonb_path_ops) WHERE labels <> '{}'::jsonb
    """)

    op.execute("""
CREATE TABLE workers (
    id UUID NOT NULL,
    pool TEXT NOT NULL,
    host TEXT NOT NULL,
    pid INTEGER NOT NULL,
    device TEXT NOT NULL,
    version TEXT NOT NULL,
    state TEXT NOT NULL,
    warm JSONB DEFAULT '[]'::jsonb NOT NULL,
    started_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    heartbeat_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    left_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT pk_workers PRIMARY KEY (id)
)
 WITH (fillfactor = 70)
    """)

    op.execute("""
CREATE TABLE api_keys (
    id UUID NOT NULL,
    project_id UUID NOT NULL,
    name TEXT NOT NULL,
    prefix TEXT NOT NULL,
    digest BYTEA NOT NULL,
    scopes TEXT[] NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    expires_at TIMESTAMP WITH TIME ZONE,
    revoked_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT pk_api_keys PRIMARY KEY (id),
    CONSTRAINT fk_api_keys_project_id FOREIGN KEY(project_id) REFERENCES projects (id)
)
    """)

    op.execute("""
CREATE INDEX ix_api_keys_prefix ON api_keys (prefix)
    """)

    op.execute("""
CREATE TABLE batches (
    id UUID NOT NULL,
    project_id UUID NOT NULL,
    name TEXT NOT NULL,
    labels JSONB DEFAULT '{}'::jsonb NOT NULL,
    warnings TEXT[] DEFAULT '{}'::text[] NOT NULL,
    total BIGINT NOT NULL,
    priority INTEGER NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    deleted_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT pk_batches PRIMARY KEY (id),
    CONSTRAINT fk_batches_project_id FOREIGN KEY(project_id) REFERENCES projects (id)
)
    """)

    op.execute("""
CREATE INDEX ix_batches_deleted ON batches (id) WHERE deleted_at IS NOT NULL
    """)

    op.execute("""
CREATE INDEX ix_batches_project_id_id ON batches (project_id, id) WHERE deleted_at IS NULL
    """)

    op.execute("""
CREATE TABLE segments (
    id UUID NOT NULL,
    batch_id UUID NOT NULL,
    project_id UUID NOT NULL,
    pool TEXT NOT NULL,
    lane TEXT NOT NULL,
    checkpoint TEXT NOT NULL,
    priority INTEGER NOT NULL,
    paused BOOLEAN DEFAULT false NOT NULL,
    cancelling BOOLEAN DEFAULT false NOT NULL,
    retrying BOOLEAN DEFAULT false NOT NULL,
    head_run_at TIMESTAMP WITH TIME ZONE,
    head_id UUID,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT pk_segments PRIMARY KEY (id),
    CONSTRAINT fk_segments_batch_id FOREIGN KEY(batch_id) REFERENCES batches (id)
)
    """)

    op.execute("""
CREATE INDEX ix_segments_batch_id ON segments (batch_id)
    """)

    op.execute("""
CREATE INDEX ix_segments_lane ON segments (pool, lane, priority DESC, head_run_at) WHERE head_run_at IS NOT NULL AND NOT paused AND NOT cancelling
    """)

    op.execute("""
CREATE INDEX ix_segments_ready ON segments (pool, priority DESC, head_run_at, id) WHERE head_run_at IS NOT NULL AND NOT paused AND NOT cancelling
    """)

    op.execute("""
CREATE INDEX ix_segments_turning ON segments (id) WHERE cancelling OR retrying
    """)
