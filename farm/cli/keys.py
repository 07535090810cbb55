"""`farm keys`: who may use the farm.

Where the database can be reached it is asked directly, which is how the first key is made; elsewhere the API is, with a
key that has the scope `admin`.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from farm.cli.display import ago, json_line, table
from farm.cli.local import environment, settings
from farm.cli.options import DATA_DIR, AsJson, DataDir, connect
from farm.cli.saying import say
from farm.errors import NotFound, Unavailable

if TYPE_CHECKING:
    from sqlalchemy import Connection

keys = typer.Typer(help="API keys.", no_args_is_help=True)

SPANS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


@keys.command()
def create(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    project: Annotated[str, typer.Option(help="The tenant; made if there is none of this name.")] = "default",
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="jobs:read, jobs:submit, jobs:manage, jobs:write (the last two) or admin; may be repeated. "
            "jobs:read and jobs:write if absent."
        ),
    ] = None,
    expires: Annotated[
        str | None, typer.Option(help="12h, 30d, 8w, or a date such as 2031-01-31.", show_default=False)
    ] = None,
    data_dir: DataDir = DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it. It is shown this once; only its hash is stored."""
    from farm.keys import create_key

    scopes = scope or ["jobs:read", "jobs:write"]
    until = expiry(expires, datetime.now(UTC))
    if _database_known(data_dir):
        with _database(data_dir) as conn:
            made = create_key(conn, project=project, name=name, scopes=scopes, expires_at=until)
    else:
        with connect(data_dir) as farm:
            made = farm.create_key(
                name, project=project, scopes=scopes, expires_at=until.isoformat() if until else None
            )
    if as_json:
        json_line(made)
    else:
        say(made.key)
        say(
            f"Key {made.id} of project {made.project}: {', '.join(made.scopes)}. Keep it; it is not shown again.",
            err=True,
        )


@keys.command("list")
def list_keys(data_dir: DataDir = DATA_DIR, as_json: AsJson = False) -> None:
    """List keys, without their secrets."""
    from farm.keys import list_keys as stored

    if _database_known(data_dir):
        with _database(data_dir) as conn:
            found = stored(conn)
    else:
        with connect(data_dir) as farm:
            found = farm.keys()
    if as_json:
        for key in found:
            json_line(key)
        return
    now = datetime.now(UTC)
    table(
        ("ID", "NAME", "PROJECT", "SCOPES", "STARTS WITH", "CREATED", "STATE"),
        (
            (
                key.id,
                key.name,
                key.project,
                ", ".join(key.scopes),
                key.prefix,
                ago(key.created_at),
                _state(key.revoked_at, key.expires_at, now),
            )
            for key in found
        ),
        "There are no keys.",
    )


@keys.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id, as `farm keys list` shows it.", metavar="ID")],
    data_dir: DataDir = DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """End a key. API processes notice within seconds."""
    from farm.keys import revoke_key

    try:
        wanted = UUID(key_id)
    except ValueError:
        raise NotFound(f"there is no key {key_id}; name it by its id, as `farm keys list` shows it") from None
    if _database_known(data_dir):
        with _database(data_dir) as conn:
            revoke_key(conn, wanted)
    else:
        with connect(data_dir) as farm:
            farm.revoke_key(wanted)
    if as_json:
        json_line({"id": wanted, "revoked": True})
    else:
        say(f"{key_id} revoked")


def expiry(text: str | None, now: datetime) -> datetime | None:
    """`30d` from now, or the start of a day (UTC). Raises typer.BadParameter."""
    if text is None:
        return None
    if span := re.fullmatch(r"(\d{1,5})([hdw])", text):
        return now + int(span[1]) * SPANS[span[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter("write 12h, 30d, 8w, or a date such as 2031-01-31", param_hint="--expires") from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    if moment <= now:
        raise typer.BadParameter(f"{text} is past", param_hint="--expires")
    return moment


def _state(revoked: datetime | None, expires: datetime | None, now: datetime) -> str:
    if revoked:
        return "revoked"
    if expires:
        return "expired" if expires <= now else f"until {expires:%Y-%m-%d %H:%M}"
    return "valid"


def _database_known(data_dir: Path) -> bool:
    try:
        environment(data_dir)
    except Unavailable:
        return False
    return True


@contextmanager
def _database(data_dir: Path) -> "Iterator[Connection]":
    from farm.db import Database

    database = Database(settings(data_dir), pool_size=1)
    try:
        database.check_schema()
        with database.transaction() as conn:
            yield conn
    finally:
        database.dispose()
