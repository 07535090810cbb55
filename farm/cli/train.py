"""`farm train`: adapters for your own checkpoint. The trainers themselves are programs of `workers.training`."""

import inspect
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import ValidationError

from farm.training import VARIABLE, LcmLora, StyleLora, Training, flag

train = typer.Typer(help="Train LoRA adapters for a checkpoint of your own.", no_args_is_help=True)

COMMANDS: dict[str, type[Training]] = {"lcm-lora": LcmLora, "lora": StyleLora}
HELP = {
    "lcm-lora": "Distil an LCM-LoRA: the checkpoint in a few steps without guidance. "
    "The same command again resumes; docs/training.md has recipes.",
    "lora": "Train a style LoRA on captioned pictures. The same command again resumes; docs/training.md has recipes.",
}
PROGRAM = "workers.training.run"
LAUNCHER = "workers.training.launch"
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "DIFFUSERS_VERBOSITY": "error"}
"""Libraries that would talk over the trainer's own lines."""


def command(name: str) -> Callable[..., None]:
    """A command with one option for each field of its model, so that help, ranges and trainer cannot disagree."""
    model = COMMANDS[name]

    def run(**given: Any) -> None:
        start(checked(model, given))

    parameters = []
    for field, about in model.model_fields.items():
        if field == "kind":
            continue
        default = inspect.Parameter.empty if about.is_required() else about.get_default()
        shown = bool(default) and not isinstance(default, tuple)
        option = typer.Option(flag(field), help=about.description, show_default=shown)
        if isinstance(default, tuple):
            default = list(default)
        parameters.append(
            inspect.Parameter(
                field,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[_plain(about.annotation), option],
            )
        )
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def checked(model: type[Training], given: dict[str, Any]) -> Training:
    """The options as the trainer takes them. Raises typer.BadParameter, naming the first that is wrong."""
    for name, value in given.items():
        if not _is_text(value):
            raise typer.BadParameter(f"{value!r} has bytes that are no UTF-8", param_hint=flag(name))
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = flag(str(first["loc"][0])) if first["loc"] else None
        said = str(first["msg"]).removeprefix("Value error, ")
        raise typer.BadParameter(said, param_hint=where) from error


def start(options: Training) -> None:
    """Become the trainer, or the launcher of one per device."""
    if find_spec("torch") is None:
        raise typer.BadParameter("training needs the worker's libraries: pip install 'lcm-farm[worker]'")
    variables = os.environ | QUIET | {VARIABLE: options.model_dump_json()}
    # Where `accelerate launch` or `torchrun` started this, it is one of their processes already.
    several = options.devices > 1 and "LOCAL_RANK" not in os.environ
    command = ["-m", LAUNCHER, str(options.devices)] if several else ["-m", PROGRAM]
    os.execve(sys.executable, [sys.executable, "-u", *command], variables)  # noqa: S606


def _is_text(value: Any) -> bool:
    """Whether an option is made of whole characters: a terminal may give any bytes."""
    try:
        "".join(map(str, value if isinstance(value, list) else [value])).encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain(annotation: Any) -> Any:
    """What typer reads: without ranges and None, which pydantic checks, and lists for what may be repeated."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _plain(inner[0])
    if origin in {Union, UnionType}:
        return next(_plain(each) for each in inner if each is not NoneType) | None
    if origin is tuple:
        return list[str]
    return annotation


for _name, _help in HELP.items():
    train.command(_name, help=_help)(command(_name))
