"""Folders of pictures with captions, by the convention of `datasets`: metadata.jsonl or .csv, or a .txt beside each."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workers.training.errors import TrainingError, why

Captions = tuple[str, ...]
ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})


def items(root: Path, column: str) -> list[tuple[Path, Captions]]:
    """Every picture below `root` with its captions, none where there are none, sorted by name.

    Where a metadata file stands it decides: pictures it does not name are not used. Raises TrainingError for metadata
    or captions that cannot be read, and for metadata that names files that are not there.
    """
    named: dict[Path, Captions] = {}
    for path in sorted(p for name in ("metadata.jsonl", "metadata.csv") for p in root.rglob(name)):
        for line, row in _rows(path):
            where = f"{path}, line {line}"
            file = row.get("file_name")
            if not isinstance(file, str) or not file:
                raise TrainingError(f"{where}: no file_name; its columns are {', '.join(map(str, row))}")
            if column not in row:
                raise TrainingError(
                    f"{where}: no column {column!r}; its columns are {', '.join(map(str, row))} (--caption-column)"
                )
            picture = path.parent / file
            if not picture.is_file():
                raise TrainingError(f"{where}: {picture} is not there")
            named[picture] = captions_of(row[column], where)
    if named:
        return sorted(named.items())
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
    return [(picture, _beside(picture)) for picture in found]


def captions_of(value: Any, where: str) -> Captions:
    """A caption, or a list of wordings. Raises TrainingError for anything else."""
    several = value if isinstance(value, list) else [value]
    if not all(each is None or isinstance(each, str) for each in several):
        raise TrainingError(f"{where}: a caption is text or a list of texts, not {value!r}")
    for each in filter(None, several):
        # JSON can say it and no tokenizer takes it, which would come out when the picture's turn does.
        try:
            each.encode()
        except UnicodeEncodeError as error:
            half = each[error.start]
            raise TrainingError(f"{where}: caption {each!r} holds half a character, the surrogate {half!r}") from error
    return tuple(each or "" for each in several)


def from_json(text: str | bytes, where: str) -> Any:
    """The value that a JSON text stands for. Raises TrainingError when it cannot be read."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        # Its own line number counts from `text`, which may be a line of a file.
        raise TrainingError(f"{where} cannot be read: {error.msg} at character {error.pos + 1}") from error
    except ValueError as error:
        raise TrainingError(f"{where} cannot be read: {error}") from error
    except RecursionError as error:
        raise TrainingError(f"{where} cannot be read: nested too deeply") from error


def _beside(picture: Path) -> Captions:
    path = picture.with_suffix(".txt")
    if not path.is_file():
        return ()
    try:
        return (path.read_text("utf-8").strip(),)
    except UnicodeDecodeError as error:
        raise TrainingError(f"{path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {why(error)}") from error


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and row."""
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                yield from enumerate(csv.DictReader(file, strict=True), 2)
            return
        with path.open(encoding="utf-8") as file:
            for line, text in enumerate(file, 1):
                if text.strip():
                    where = f"{path}, line {line}"
                    row = from_json(text, where)
                    if not isinstance(row, dict):
                        raise TrainingError(f"{where}: not a JSON object")
                    yield line, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} cannot be read: {error}") from error
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {why(error)}") from error
