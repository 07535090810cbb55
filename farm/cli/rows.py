"""What readers of submission files share: a row, and how a mistake in one is put."""

import difflib
from collections.abc import Iterable
from typing import Any

from farm.errors import Problem

Row = dict[str, Any]
"""The fields of one job."""

MOST_PROBLEMS = 100
"""Mistakes named before a file is given up, as many as the farm itself names."""


def mistake(line: int, name: str, text: str) -> Problem:
    return {"line": line, "field": name, "problem": text}


def unknown(line: int, name: str, known: Iterable[str]) -> Problem:
    near = difflib.get_close_matches(name, list(known), n=1)
    return mistake(line, name, f"there is no such field; did you mean {near[0]}?" if near else "there is no such field")
