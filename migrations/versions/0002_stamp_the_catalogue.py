"""Stamp the catalogue: one row that changes with every change of `models`, so that a reader knows what it has read."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute("""
CREATE TABLE catalogue_stamp (
    single BOOLEAN DEFAULT true NOT NULL,
    stamp UUID NOT NULL,
    CONSTRAINT pk_catalogue_stamp PRIMARY KEY (single),
    CONSTRAINT ck_catalogue_stamp_single CHECK (single)
)
    """)

    # A trigger: no way of changing a model can forget it. A random stamp: none comes twice, whatever is rolled back.
    op.execute("""
CREATE FUNCTION stamp_catalogue() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO catalogue_stamp (stamp) VALUES (gen_random_uuid())
    ON CONFLICT (single) DO UPDATE SET stamp = excluded.stamp;
    RETURN NULL;
END
$$
    """)

    op.execute("""
CREATE TRIGGER models_stamp_catalogue AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON models
FOR EACH STATEMENT EXECUTE FUNCTION stamp_catalogue()
    """)
