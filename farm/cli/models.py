"""`farm models`: the checkpoints, VAEs and adapters that jobs may name."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.display import ago, json_line, size, table
from farm.cli.exits import Exit
from farm.cli.options import DATA_DIR, AsJson, DataDir, connect
from farm.cli.saying import say
from farm.modelkinds import ModelKind

if TYPE_CHECKING:
    from farm.views import AdapterView, CheckpointView, ControlNetView, MotionView, VaeView

models = typer.Typer(help="Checkpoints, VAEs and adapters that jobs may name.", no_args_is_help=True)


@models.command("list")
def list_models(data_dir: DataDir = DATA_DIR, as_json: AsJson = False) -> None:
    """List checkpoints, VAEs, ControlNets, motion adapters and LoRAs; those without a project are everybody's."""
    with connect(data_dir) as farm:
        found: list[tuple[str, CheckpointView | VaeView | ControlNetView | MotionView | AdapterView]] = []
        found += [("checkpoint", each) for each in farm.checkpoints()]
        found += [("vae", each) for each in farm.vaes()]
        found += [("controlnet", each) for each in farm.controlnets()]
        found += [("motion", each) for each in farm.motions()]
        found += [(each.kind, each) for each in farm.adapters()]
    if as_json:
        for kind, each in found:
            json_line({**each.model_dump(mode="json"), "kind": kind})
        return
    table(
        ("NAME", "KIND", "FAMILY", "STATE", "PROJECT", "#SIZE", "ADDED", "HASH"),
        (
            (
                each.name,
                kind,
                each.family,
                each.state,
                each.project,
                size(each.bytes),
                ago(each.created_at),
                each.hash[:12],
            )
            for kind, each in found
        ),
        "There are no models.",
    )


@models.command()
def add(
    name: Annotated[str, typer.Argument(help="What jobs will call it.")],
    source: Annotated[
        str,
        typer.Argument(help="A folder or .safetensors file here, s3://bucket/prefix, or hf:owner/name@COMMIT."),
    ],
    kind: Annotated[
        ModelKind | None, typer.Option(help="Told by the files here; else an adapter.", show_default=False)
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="Base family, where the files do not tell.", show_default=False)
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="Number type among those offered, such as fp16.", show_default=False)
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            help="A default of a checkpoint or motion adapter; may be repeated.",
            metavar="KEY=VALUE",
            show_default=False,
        ),
    ] = None,
    project: Annotated[
        str | None, typer.Option(help="The project whose jobs alone may name it; else all may.", show_default=False)
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait until it is available or refused.")] = True,
    data_dir: DataDir = DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Register a model: a worker fetches, checks, stores and tests it, then jobs may name it.

    Files of this machine go straight to Postgres and S3, not through the API.
    """
    from farm.cli import adding

    wanted = {"family": family, "variant": variant, "profile": adding.profile_of(profile)}
    if source.startswith(("hf:", "s3://")):
        ended = adding.from_afar(data_dir, name, source, kind, {**wanted, "project": project}, wait=wait)
    else:
        ended = adding.from_here(data_dir, name, Path(source), kind, wanted, project=project, wait=wait)
    if as_json:
        json_line(ended)
    else:
        adding.tell(ended)
    if ended.state == "refused":
        raise typer.Exit(Exit.FAILED)


@models.command()
def registrations(data_dir: DataDir = DATA_DIR, as_json: AsJson = False) -> None:
    """List models that are or were on their way into the farm, with the reasons of refused ones."""
    with connect(data_dir) as farm:
        found = farm.registrations()
    if as_json:
        for each in found:
            json_line(each)
        return
    table(
        ("NAME", "KIND", "STATE", "#FETCHED", "BEGUN", "ID", "REASON"),
        (
            (each.name, each.kind, each.state, size(each.bytes), ago(each.created_at), each.id, each.reason or "")
            for each in found
        ),
        "There are no registrations.",
    )


@models.command()
def cancel(
    registration: Annotated[str, typer.Argument(help="Its id.")],
    data_dir: DataDir = DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """End a registration that is under way."""
    with connect(data_dir) as farm:
        ended = farm.cancel_registration(registration)
    if as_json:
        json_line(ended)
    else:
        say(f"{ended.name} is {ended.state}")


@models.command()
def remove(
    name: Annotated[str, typer.Argument(help="A checkpoint or adapter.")],
    data_dir: DataDir = DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Forget a name. Jobs that were accepted with it are still rendered."""
    from farm import catalogue
    from farm.cli.local import servers

    with servers(data_dir) as (database, _, _), database.transaction() as conn:
        catalogue.remove(conn, name)
    if as_json:
        json_line({"name": name, "removed": True})
    else:
        say(f"{name} removed")
