"""Jobs from CSV: a line of column names, then one job a line."""

import csv
import io
import math
from collections.abc import Callable, Iterator
from typing import IO, Any

from farm.cli.options import adapter_of, control_of
from farm.cli.rows import MOST_PROBLEMS, Row, mistake, unknown
from farm.errors import InvalidRequest, Problem

TEXTS = (
    "prompt",
    "negative_prompt",
    "checkpoint",
    "acceleration",
    "vae",
    "scheduler",
    "image",
    "mask",
    "motion",
    "format",
    "run_at",
)
WHOLE = ("width", "height", "steps", "seed", "count", "priority", "frames", "fps", "quality")
LABEL = "label."
"""A column `label.site` holds the label `site` of its rows."""


def csv_rows(file: IO[bytes]) -> Iterator[tuple[int, Row]]:
    """Each line's number and job. Raises InvalidRequest, after the last good line, with every bad one."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, strict=True)
    problems: list[Problem] = []
    header: list[str] | None = None
    ended = 0
    try:
        for cells in reader:
            line, ended = ended + 1, reader.line_num
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = _header(cells, line)
                continue
            row = _cells(header, cells, line, problems)
            if not problems:
                yield line, row
            if len(problems) >= MOST_PROBLEMS:
                break
    except (csv.Error, UnicodeDecodeError) as error:
        problems.append(mistake(ended + 1, "", f"is no CSV in UTF-8: {error}"))
    finally:
        text.detach()
    if header is None:
        problems.append(mistake(1, "", "a CSV file starts with a line of column names, prompt among them"))
    if problems:
        raise InvalidRequest(
            "the file has lines that are no jobs; nothing was submitted", problems=problems[:MOST_PROBLEMS]
        )


def _header(cells: list[str], line: int) -> list[str]:
    header = [cell.strip() for cell in cells]
    problems = [
        unknown(line, name, tuple(COLUMNS)) for name in header if name not in COLUMNS and not name.startswith(LABEL)
    ]
    problems += [mistake(line, name, "is there twice") for name in sorted(set(header)) if header.count(name) > 1]
    if "prompt" not in header:
        problems.append(mistake(line, "prompt", "is missing among the column names"))
    if problems:
        raise InvalidRequest("the first line does not name columns of jobs", problems=problems)
    return header


def _cells(header: list[str], cells: list[str], line: int, problems: list[Problem]) -> Row:
    """A line's cells as a job; an empty cell says nothing."""
    if len(cells) != len(header):
        problems.append(mistake(line, "", f"has {len(cells)} cells, but there are {len(header)} columns"))
        return {}
    row: Row = {}
    for name, cell in zip(header, cells, strict=True):
        if not cell.strip():
            continue
        if name.startswith(LABEL):
            row.setdefault("labels", {})[name.removeprefix(LABEL)] = cell
            continue
        try:
            value = COLUMNS[name](cell)
        except ValueError as error:
            problems.append(mistake(line, name, str(error)))
            continue
        row[name] = {**row.get("labels", {}), **value} if name == "labels" else value
    return row


def _whole(cell: str) -> int:
    try:
        return int(cell)
    except ValueError:
        raise ValueError(f"must be a whole number, not {cell!r}") from None


def _number(cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"must be a number, not {cell!r}")
    return value


def _truth(cell: str) -> bool:
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if cell.strip().lower() not in values:
        raise ValueError(f"must be true or false, not {cell!r}")
    return values[cell.strip().lower()]


def _adapters(cell: str) -> list[Row]:
    return [adapter_of(part) for part in cell.split(";") if part.strip()]


def _controls(cell: str) -> list[Row]:
    return [control_of(part) for part in cell.split(";") if part.strip()]


def _labels(cell: str) -> dict[str, str]:
    pairs = [part.strip().partition("=") for part in cell.split(";") if part.strip()]
    if any(not key or not equals for key, equals, _ in pairs):
        raise ValueError(f"must be KEY=VALUE, several parted by semicolons, not {cell!r}")
    return {key: value for key, _, value in pairs}


COLUMNS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(TEXTS, str),
    **dict.fromkeys(WHOLE, _whole),
    "guidance_scale": _number,
    "strength": _number,
    "composite": _truth,
    "controls": _controls,
    "metadata": _truth,
    "adapters": _adapters,
    "labels": _labels,
}
"""Every column a CSV file may have, and how its cells are read."""
