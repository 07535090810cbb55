"""Add webhooks: whom a project wants told of what, and each message until it was delivered."""

from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute("""
CREATE TABLE webhooks (
    id UUID NOT NULL,
    project_id UUID NOT NULL,
    url TEXT NOT NULL,
    events TEXT[] NOT NULL,
    failed_share DOUBLE PRECISION NOT NULL,
    secret TEXT NOT NULL,
    previous_secret TEXT,
    previous_until TIMESTAMP WITH TIME ZONE,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    disabled_at TIMESTAMP WITH TIME ZONE,
    disabled_reason TEXT,
    CONSTRAINT pk_webhooks PRIMARY KEY (id),
    CONSTRAINT fk_webhooks_project_id FOREIGN KEY(project_id) REFERENCES projects (id),
    CONSTRAINT ck_webhooks_failed_share CHECK (failed_share > 0 AND failed_share <= 1)
)
    """)

    op.execute("""
CREATE INDEX ix_webhooks_project_id ON webhooks (project_id)
    """)

    op.execute("""
CREATE TABLE webhook_deliveries (
    id UUID NOT NULL,
    webhook_id UUID NOT NULL,
    event TEXT NOT NULL,
    batch_id UUID,
    body JSONB NOT NULL,
    attempts SMALLINT DEFAULT 0 NOT NULL,
    next_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp(),
    last_status SMALLINT,
    last_error TEXT,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    delivered_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT pk_webhook_deliveries PRIMARY KEY (id),
    CONSTRAINT ck_webhook_deliveries_delivered_once CHECK (next_at IS NULL OR delivered_at IS NULL)
)
    """)

    op.execute("""
CREATE INDEX ix_webhook_deliveries_webhook_id_id ON webhook_deliveries (webhook_id, id)
    """)

    op.execute("""
CREATE INDEX ix_webhook_deliveries_due ON webhook_deliveries (webhook_id, next_at) WHERE next_at IS NOT NULL
    """)

    op.execute("""
CREATE UNIQUE INDEX uq_webhook_deliveries_failed_share ON webhook_deliveries (webhook_id, batch_id) WHERE event = 'batch.failed_share'
    """)
