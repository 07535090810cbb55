"""Options that many commands share, and how their text is read."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from farm.client import Farm


def _folder(text: str | Path) -> Path:
    # An empty text is a variable that somebody forgot to set; as a path it would be the folder we are in.
    if not str(text).strip():
        raise typer.BadParameter("is empty; name a folder, such as .farm")
    return Path(text)


DataDir = Annotated[
    Path,
    typer.Option(
        "--data-dir",
        envvar="FARM_DATA_DIR",
        help="Where the farm of this machine lives.",
        metavar="DIR",
        parser=_folder,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="For scripts: one JSON object a line on standard output.")]
Labels = Annotated[
    list[str] | None, typer.Option("--label", help="A label; may be repeated.", metavar="KEY=VALUE", show_default=False)
]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", help="A LoRA, at weight 1 unless given; may be repeated.", metavar="NAME[:WEIGHT]"),
]
Controls = Annotated[
    list[str] | None,
    typer.Option(
        "--control", help="A ControlNet and what it follows; may be repeated.", metavar="NAME=PICTURE[:WEIGHT]"
    ),
]

DATA_DIR = Path(".farm")


def connect(data_dir: Path) -> "Farm":
    """The client of the farm that the environment or the data directory names."""
    from farm.client import Farm

    return Farm(data_dir=data_dir)


def labels_of(pairs: Sequence[str] | None) -> dict[str, str]:
    """`["a=b"]` as a dict. Raises typer.BadParameter."""
    labels = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise typer.BadParameter(f"{pair!r} is no label; write KEY=VALUE", param_hint="--label")
        labels[key] = value
    return labels


def adapter_of(text: str) -> dict[str, Any]:
    """`name:0.8` or `name` as the farm wants it. Raises ValueError.

    >>> adapter_of("rust:0.8"), adapter_of("rust")
    ({'name': 'rust', 'weight': 0.8}, {'name': 'rust', 'weight': 1.0})
    """
    name, colon, weight = text.strip().rpartition(":")
    if not colon:
        name, weight = text.strip(), "1"
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not name or not math.isfinite(number):
        raise ValueError(f"{text!r} is no adapter; write NAME or NAME:WEIGHT, such as rust:0.8")
    return {"name": name, "weight": number}


def adapters_of(texts: Sequence[str] | None) -> list[dict[str, Any]]:
    """`--adapter` as the farm wants it. Raises typer.BadParameter."""
    try:
        return [adapter_of(text) for text in texts or ()]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--adapter") from error


def control_of(text: str) -> dict[str, Any]:
    """`walls=7b1f..:0.8` as the farm wants it; what stands for the picture is left as it is. Raises ValueError.

    >>> control_of("walls=mask.png:0.8"), control_of("walls=mask.png")
    ({'name': 'walls', 'image': 'mask.png', 'weight': 0.8}, {'name': 'walls', 'image': 'mask.png', 'weight': 1.0})
    """
    name, equals, rest = text.strip().partition("=")
    if not name or not equals or not rest:
        raise ValueError(
            f"{text!r} is no control; write NAME=PICTURE or NAME=PICTURE:WEIGHT, such as edges=wall.png:0.8"
        )
    use = adapter_of(rest)
    return {"name": name, "image": use["name"], "weight": use["weight"]}


def controls_of(texts: Sequence[str] | None) -> list[dict[str, Any]]:
    """`--control` as the farm wants it. Raises typer.BadParameter."""
    try:
        return [control_of(text) for text in texts or ()]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--control") from error


def size_of(text: str | None) -> dict[str, int]:
    """`512x384` as width and height in pixels; empty for none. Raises typer.BadParameter."""
    if text is None:
        return {}
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise typer.BadParameter(f"{text!r} is no size; write WIDTHxHEIGHT, such as 512x384", param_hint="--size")
    return {"width": int(width), "height": int(height)}
