"""The real servers every test runs on: started once per test process, on first use.

What a test asks for decides what it pays: `settings` empties a database, `store` makes a bucket.
"""

import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from pydantic import SecretStr
from redis import Redis
from sqlalchemy import make_url

import workers  # noqa: F401  # before any test imports diffusers: it forbids remote code
from farm.db import Database, migrate
from farm.settings import Settings
from farm.stack import Servers, embedded_servers, settings_from
from farm.storage import Store
from tests.databases import Databases

# Read when torch is loaded, here and in every process that a test starts: several of them share few cores, and a thread
# that waits for others by spinning takes a core from the one it waits for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TEMPLATE = "template_farm"
SHORT = {"api", "client", "farm", "painter"}
"""Folders whose tests take less than a second, nearly all."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The short ones last: no test process is then left with a long one when the others have nothing any more."""
    items.sort(key=lambda item: item.path.parent.name in SHORT)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Toy layers gain nothing from a second thread, and where test processes share cores waiting for it costs three
    times what the work does."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """PostgreSQL, Valkey and SeaweedFS of this test process. A test may restart one, but must leave it running."""
    # Not pytest's own folder: as root that one is closed to the user who runs PostgreSQL.
    data_dir = Path(tempfile.mkdtemp(prefix="farm-tests-"))
    data_dir.chmod(0o711)
    try:
        with embedded_servers(data_dir, durable=False) as running:
            yield running
    finally:
        shutil.rmtree(data_dir, ignore_errors=True)


@pytest.fixture(scope="session")
def server_settings(servers: Servers) -> Settings:
    """Settings that lead to the servers; their database is the migrated template, which nobody may connect to."""
    found = with_database(settings_from(servers.environment()), TEMPLATE)
    administer(found, f"CREATE DATABASE {TEMPLATE}")
    migrate(found)
    return found


@pytest.fixture(scope="session")
def databases(server_settings: Settings) -> Databases:
    """The databases of this test process, with what the migrations put there."""
    return Databases(server_settings, TEMPLATE)


@pytest.fixture
def settings(server_settings: Settings, databases: Databases) -> Iterator[Settings]:
    """Settings with a database of this test's own (migrated and empty), a bucket name and a Redis prefix."""
    name = databases.take()
    own = with_database(server_settings, name)
    yield own.model_copy(update={"s3_bucket": name.replace("_", "-"), "redis_prefix": f"{name}:"})
    databases.give_back(name)


@pytest.fixture
def empty_settings(server_settings: Settings) -> Iterator[Settings]:
    """As `settings`, before the first migration."""
    name = f"empty_{uuid.uuid4().hex}"
    administer(server_settings, f"CREATE DATABASE {name}")
    yield with_database(server_settings, name)
    administer(server_settings, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    """Connections to this test's database."""
    opened = Database(settings)
    yield opened
    opened.dispose()


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    """This test's bucket, which exists and is empty."""
    opened = Store(settings)
    opened.ensure_bucket()
    yield opened
    # Each bucket takes volumes of its own; SeaweedFS deletes one with all its objects.
    opened._client.delete_bucket(Bucket=opened.bucket)


@pytest.fixture
def redis(settings: Settings) -> Iterator[Redis]:
    """A client for Valkey; keys below `settings.redis_prefix` are removed after the test."""
    with Redis.from_url(settings.redis_url.get_secret_value()) as client:
        yield client
        for key in client.scan_iter(f"{settings.redis_prefix}*"):
            client.delete(key)


def with_database(settings: Settings, name: str) -> Settings:
    """The same settings with another database on the same server."""
    url = make_url(settings.database_url.get_secret_value()).set(database=name)
    return settings.model_copy(update={"database_url": SecretStr(url.render_as_string(hide_password=False))})


def administer(settings: Settings, statement: str) -> None:
    """Run a statement that no transaction may hold, such as CREATE DATABASE, on the server of these settings."""
    url = make_url(settings.database_url.get_secret_value()).set(database="postgres")
    with psycopg.connect(url.render_as_string(hide_password=False), autocommit=True) as connection:
        connection.execute(statement)
