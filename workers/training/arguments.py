"""Settings from a command line, checked before work begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from pydantic import ConfigDict, ValidationError

from farm.training import flag
from workers.training.errors import TrainingError

Made = TypeVar("Made")
STRICT = ConfigDict(allow_inf_nan=False)
"""Settings are numbers that can be counted with."""


def checked(kind: type[Made], values: Mapping[str, Any]) -> Made:
    """Settings of this kind. Raises TrainingError that names each option that cannot be, and what could."""
    try:
        return kind(**values)
    except ValidationError as error:
        raise TrainingError("; ".join(map(_said, error.errors()))) from error


def _said(wrong: Mapping[str, Any]) -> str:
    why = str(wrong["msg"]).removeprefix("Input ").removeprefix("Value error, ")
    return f"{flag(str(wrong['loc'][0]))} {wrong['input']}: {why}" if wrong["loc"] else why


def use_threads(count: int) -> None:
    """Raises TrainingError for none."""
    if count < 1:
        raise TrainingError(f"--threads {count}: should be greater than or equal to 1")
    torch.set_num_threads(count)
