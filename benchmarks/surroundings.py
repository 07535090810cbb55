"""The engine's modules where only torch, diffusers, transformers and peft are installed.

Import this before anything of `workers.pipelines`. Where the farm's other libraries are missing, as on a GPU machine
rented for an hour, small stand-ins take the place of what the engine's modules import of them: a logger, and two
modules about settings and model files that rendering never calls. Where they are installed, nothing is replaced.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class Plain:
    """A logger: an event and what belongs to it, on standard error."""

    def __init__(self, name: str = "") -> None:
        self._name = name

    def info(self, event: str, **more: Any) -> None:
        told = " ".join(f"{key}={value}" for key, value in more.items())
        sys.stderr.write(f"{self._name}: {event} {told}\n")

    warning = error = info


def _unread(path: Any) -> Any:
    raise RuntimeError(f"{path}: reading model files needs the farm's own libraries; install the farm")


STAND_INS: dict[str, tuple[str, dict[str, Any]]] = {
    "structlog": ("structlog", {"get_logger": Plain}),
    "farm.settings": ("pydantic_settings", {"Settings": object}),
    "farm.modelfiles": ("pydantic", {"read_json": _unread}),
}
"""Module -> the library whose absence it is replaced for, and what it then holds."""


def stand_in() -> list[str]:
    """Put stand-ins where a library is missing; answers the names of the modules that were replaced."""
    missing = [name for name, (library, _) in STAND_INS.items() if find_spec(library) is None]
    for name in missing:
        module = ModuleType(name, "A stand-in, see benchmarks/surroundings.py.")
        module.__dict__.update(STAND_INS[name][1])
        sys.modules.setdefault(name, module)
    return missing


stand_in()
