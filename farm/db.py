"""The edge to Postgres: engine, transactions, migrations, and driver errors as the farm's own."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.errors import IdleInTransactionSessionTimeout
from sqlalchemy import Connection, Engine, create_engine, exc, make_url, text
from sqlalchemy.engine import URL

from farm.errors import SchemaMismatch, Unavailable
from farm.models import SCHEMA_VERSION
from farm.settings import Settings

if TYPE_CHECKING:
    # Imported where it is needed: every process of the farm comes by here, and most never migrate.
    from alembic.config import Config

MIGRATION_LOCK = 0x6661726D
"""Advisory lock held while migrating: two migrations of one database never overlap."""

STATEMENT_TIMEOUT_MS = 30_000
LOCK_TIMEOUT_MS = 10_000
IDLE_IN_TRANSACTION_TIMEOUT_MS = 60_000


class Database:
    """Connections of one process. Threads may share it; a process that forks must not."""

    def __init__(
        self, settings: Settings, *, pool_size: int | None = None, idle_limit: timedelta | None = None
    ) -> None:
        """`idle_limit`: how long a transaction may lie idle before Postgres ends it; a minute unless given."""
        size = pool_size or settings.database_pool_size
        idle_ms = round(idle_limit / timedelta(milliseconds=1)) if idle_limit else IDLE_IN_TRANSACTION_TIMEOUT_MS
        self.url = driver_url(settings.database_url.get_secret_value())
        self.engine: Engine = create_engine(
            self.url,
            pool_size=size,
            max_overflow=0,
            pool_timeout=10,
            pool_pre_ping=True,
            connect_args={
                "connect_timeout": 5,
                "application_name": "farm",
                "keepalives_idle": 10,
                "keepalives_interval": 5,
                "keepalives_count": 3,
                "options": f"-c statement_timeout={STATEMENT_TIMEOUT_MS} -c lock_timeout={LOCK_TIMEOUT_MS}"
                f" -c idle_in_transaction_session_timeout={idle_ms} -c timezone=UTC",
            },
        )

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One transaction: committed at the end, rolled back on any error.

        Raises Unavailable when Postgres does not answer, ended the connection or cancelled the statement.
        """
        try:
            with self.engine.begin() as conn:
                yield conn
        # The driver's own: COPY is the driver's business, and no error of it comes by SQLAlchemy.
        except (
            exc.OperationalError,
            exc.InterfaceError,
            exc.TimeoutError,
            psycopg.OperationalError,
            psycopg.InterfaceError,
        ) as error:
            raise Unavailable(f"Postgres: {_reason(error)}") from error
        except exc.DBAPIError as error:
            # Ended by Postgres in between two statements: not a disconnect to the driver, and gone all the same.
            if error.connection_invalidated or isinstance(error.orig, IdleInTransactionSessionTimeout):
                raise Unavailable(f"Postgres: {_reason(error)}") from error
            raise

    def check_schema(self) -> None:
        """Raises SchemaMismatch unless the database has the schema this code was written for."""
        with self.transaction() as conn:
            found = schema_version(conn)
        if found != SCHEMA_VERSION:
            raise SchemaMismatch(
                f"the database has schema {found or 'none'}, this farm needs {SCHEMA_VERSION}; "
                + ("upgrade the farm" if found is not None and _unknown(found) else "run: farm migrate")
            )

    def dispose(self) -> None:
        self.engine.dispose()


def driver_url(url: str) -> URL:
    """The URL with psycopg 3 as its driver, whatever Postgres scheme it was written with."""
    return make_url(url).set(drivername="postgresql+psycopg")


def schema_version(conn: Connection) -> str | None:
    """The Alembic revision of the database, or None before the first migration."""
    if conn.scalar(text("SELECT to_regclass('alembic_version')")) is None:
        return None
    found: str | None = conn.scalar(text("SELECT version_num FROM alembic_version"))
    return found


def migrate(settings: Settings) -> tuple[str | None, str]:
    """Bring the database to this version's schema; answers the revision before and after.

    Raises SchemaMismatch when the database is newer than this code, Unavailable when Postgres does not answer.
    """
    database = Database(settings, pool_size=1)
    try:
        with database.transaction() as conn:
            conn.execute(text("SET LOCAL lock_timeout = '60s'"))
            conn.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
            before = schema_version(conn)
            if before is not None and before != SCHEMA_VERSION and _unknown(before):
                raise SchemaMismatch(
                    f"the database has schema {before}, newer than this farm's {SCHEMA_VERSION}: upgrade the farm"
                )
            if before != SCHEMA_VERSION:
                from alembic import command

                config = alembic_config()
                config.attributes["connection"] = conn
                command.upgrade(config, SCHEMA_VERSION)
        return before, SCHEMA_VERSION
    finally:
        database.dispose()


def alembic_config() -> "Config":
    """Alembic's configuration without an ini file: the migrations lie beside the packages, in a wheel too."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent.parent / "migrations"))
    return config


def _unknown(revision: str) -> bool:
    from alembic.script import ScriptDirectory

    known = {script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()}
    return revision not in known


def _reason(error: Any) -> str:
    origin = getattr(error, "orig", None) or error
    return " ".join(str(origin).split())[:300]
