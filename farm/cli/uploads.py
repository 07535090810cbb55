"""`farm upload` and `farm uploads`: pictures for jobs to start from."""

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.batches import Limit
from farm.cli.display import ago, json_line, size, table
from farm.cli.options import DATA_DIR, AsJson, DataDir, connect
from farm.cli.saying import say
from farm.errors import FarmError

if TYPE_CHECKING:
    from farm.client import Farm
    from farm.views import UploadView

uploads = typer.Typer(help="Pictures that jobs start from or follow.", no_args_is_help=True)


def upload(
    files: Annotated[
        list[Path], typer.Argument(help="PNG, JPEG or WebP.", metavar="FILE...", exists=True, dir_okay=False)
    ],
    data_dir: DataDir = DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Send pictures and print the hash that jobs name each by: as image, mask or controls."""
    with connect(data_dir) as farm:
        for file in files:
            sent = send(farm, file)
            if as_json:
                json_line({**sent.model_dump(mode="json"), "file": str(file)})
            else:
                say(sent.hash if len(files) == 1 else f"{sent.hash}  {file}")


def send(farm: "Farm", file: Path) -> "UploadView":
    """Send one of several pictures; says which one, where that fails."""
    try:
        return farm.upload(file)
    except FarmError:
        say(f"{file} could not be sent:", err=True)
        raise


@uploads.command("list")
def list_uploads(limit: Limit = 20, data_dir: DataDir = DATA_DIR, as_json: AsJson = False) -> None:
    """List uploads."""
    with connect(data_dir) as farm:
        found = list(islice(farm.uploads(), limit or None))
    if as_json:
        for each in found:
            json_line(each)
        return
    table(
        ("HASH", "TYPE", "#PIXELS", "#SIZE", "SENT", "USED"),
        (
            (
                each.hash,
                each.media_type.removeprefix("image/"),
                f"{each.width}x{each.height}",
                size(each.bytes),
                ago(each.created_at),
                ago(each.used_at),
            )
            for each in found
        ),
        "There are no uploads.",
    )


@uploads.command()
def remove(
    hashes: Annotated[list[str], typer.Argument(help="Hashes of uploads.", metavar="HASH...")],
    data_dir: DataDir = DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Remove uploads that no job names."""
    with connect(data_dir) as farm:
        for each in hashes:
            farm.delete_upload(each)
            if as_json:
                json_line({"hash": each, "removed": True})
            else:
                say(f"{each} removed")
