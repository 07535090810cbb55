"""Runs migrations inside the connection (and transaction) that `farm.db.migrate` hands over."""

from alembic import context

from farm.models import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata, compare_type=True)
with context.begin_transaction():
    context.run_migrations()
