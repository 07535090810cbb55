"""What servers need before the farm's own processes can work: schema, bucket, the default model and a first key."""

import json
from pathlib import Path

from farm import catalogue, keys
from farm.db import Database, migrate
from farm.errors import Unauthorized
from farm.settings import Settings
from farm.stack.secrets import write_private_json
from farm.storage import Store

PROJECT = "default"
KEY_NAME = "farm up"


def prepare(settings: Settings, *, credentials: Path, url: str) -> None:
    """Bring schema, bucket and models up to date, and write `credentials` (mode 600) for the API at `url`.

    Raises SchemaMismatch for a database that a newer release has migrated.
    """
    migrate(settings)
    store = Store(settings)
    store.ensure_bucket()
    database = Database(settings, pool_size=1)
    try:
        with database.transaction() as conn:
            catalogue.install_default(conn, store)
        write_private_json(credentials, {"url": url, "api_key": _admin_key(database, credentials)})
    finally:
        database.dispose()


def _admin_key(database: Database, credentials: Path) -> str:
    """The key of the last start while the database still knows it, else a new one."""
    stored = _stored_key(credentials)
    with database.transaction() as conn:
        try:
            if stored and "admin" in keys.authenticate(conn, stored).scopes:
                return stored
        except Unauthorized:
            pass  # revoked, expired, or of a data directory that was copied without its database
        made = keys.create_key(conn, project=PROJECT, name=KEY_NAME, scopes=keys.SCOPES)
        return made.key or ""


def _stored_key(credentials: Path) -> str:
    try:
        return str(json.loads(credentials.read_text())["api_key"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
