"""`farm models`: the checkpoints and adapters that jobs may name."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from farm.cli.display import ago, json_line, size, table, waiting
from farm.cli.local import settings
from farm.cli.options import DATA_DIR, AsJson, DataDir, connect

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from farm.storage import Store
    from farm.views import AdapterView, CheckpointView

models = typer.Typer(help="Checkpoints and adapters that jobs may name.", no_args_is_help=True)


@models.command("list")
def list_models(data_dir: DataDir = DATA_DIR, as_json: AsJson = False) -> None:
    """List checkpoints and adapters."""
    with connect(data_dir) as farm:
        found: list[tuple[str, CheckpointView | AdapterView]] = [("checkpoint", each) for each in farm.checkpoints()]
        found += [(each.kind, each) for each in farm.adapters()]
    if as_json:
        for kind, each in found:
            json_line({**each.model_dump(mode="json"), "kind": kind})
        return
    table(
        ("NAME", "KIND", "FAMILY", "STATE", "#SIZE", "ADDED", "HASH"),
        (
            (each.name, kind, each.family, each.state, size(each.bytes), ago(each.created_at), each.hash[:12])
            for kind, each in found
        ),
        "There are no models.",
    )


@models.command()
def add(
    name: Annotated[str, typer.Argument(help="What jobs will call it.")],
    path: Annotated[Path, typer.Argument(help="A diffusers folder, or a LoRA file (safetensors).", exists=True)],
    kind: Annotated[
        Literal["checkpoint", "style", "acceleration"] | None,
        typer.Option(help="A folder is taken for a checkpoint, a file for a style adapter.", show_default=False),
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="The base family of a LoRA whose widths fit several.", show_default=False)
    ] = None,
    data_dir: DataDir = DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Store a model and give it a name. Works on Postgres and S3 directly: the files do not pass through the API."""
    from farm import catalogue

    wanted = kind or ("checkpoint" if path.is_dir() else "style")
    with _servers(data_dir) as (conn, store), waiting(f"storing {name}"):
        view = (
            catalogue.add_checkpoint(conn, store, name, path)
            if wanted == "checkpoint"
            else catalogue.add_adapter(conn, store, name, path, wanted, family)
        )
    if as_json:
        json_line(view)
    else:
        typer.echo(f"{wanted} {view.name} ({view.family}, {size(view.bytes)}) is {view.state}")


@models.command()
def remove(
    name: Annotated[str, typer.Argument(help="A checkpoint or adapter.")],
    data_dir: DataDir = DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Forget a name. Jobs that were accepted with it are still rendered."""
    from farm import catalogue

    with _servers(data_dir) as (conn, _):
        catalogue.remove(conn, name)
    if as_json:
        json_line({"name": name, "removed": True})
    else:
        typer.echo(f"{name} removed")


@contextmanager
def _servers(data_dir: Path) -> "Iterator[tuple[Connection, Store]]":
    """One transaction, and the store."""
    from farm.db import Database
    from farm.storage import Store

    configured = settings(data_dir)
    database = Database(configured, pool_size=1)
    try:
        database.check_schema()
        with database.transaction() as conn:
            yield conn, Store(configured)
    finally:
        database.dispose()
