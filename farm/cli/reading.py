"""Submissions from files: JSON, NDJSON and CSV, read row by row, with every mistake named by its line and field."""

import io
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import orjson

from farm.cli.reading_csv import COLUMNS, csv_rows
from farm.cli.rows import MOST_PROBLEMS, Row, mistake, unknown
from farm.errors import InvalidRequest, Problem

Format = Literal["json", "ndjson", "csv"]
FORMATS: dict[str, Format] = {".json": "json", ".ndjson": "ndjson", ".jsonl": "ndjson", ".csv": "csv"}


@dataclass
class Submission:
    """What a file holds: rows that can be walked, what the file says of the whole, and where each row stands."""

    rows: Iterable[Row]
    name: str = ""
    defaults: Row = field(default_factory=dict)
    unit: Literal["line", "job"] = "line"
    stop_at_failed_share: float | None = None
    places: "array[int]" = field(default_factory=lambda: array("q"))
    """The line of each row sent so far: eight bytes a row, so a million rows cost little."""

    def placed(self, error: InvalidRequest) -> InvalidRequest:
        """The farm's error, its lines (which count what we sent) turned into places in the file."""
        return InvalidRequest(error.message, problems=[self._placed(problem) for problem in error.problems])

    def _placed(self, problem: Problem) -> Problem:
        sent = problem.get("line")
        if sent is None or not 1 <= sent <= len(self.places):
            return problem
        if self.unit == "line":
            return {**problem, "line": self.places[sent - 1]}
        where = f"job {self.places[sent - 1]}"
        return {"field": f"{where}: {problem.get('field', '')}".removesuffix(": "), "problem": problem["problem"]}


def read(source: str, wanted: Format | None = None) -> Submission:
    """The submission in a file, or on standard input for `-`. Raises InvalidRequest, now or while rows are walked."""
    if source == "-":
        return _read_stream(sys.stdin.buffer, wanted)
    path = Path(source)
    kind = wanted or FORMATS.get(path.suffix.lower())
    with path.open("rb") as file:
        kind = kind or _guess(file.read(64 * 1024))
        if kind == "json":
            file.seek(0)
            return _document(file.read())
    submission = Submission(())
    parse = PARSERS[kind]
    # Opened anew each time it is walked: the client may have to send it again.
    submission.rows = _Again(lambda: _opened(path, parse), submission)
    return submission


def _read_stream(stream: IO[bytes], wanted: Format | None) -> Submission:
    buffered = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream)  # type: ignore[type-var]
    kind = wanted or _guess(buffered.peek(64 * 1024))
    if kind == "json":
        return _document(buffered.read())
    submission = Submission(())
    submission.rows = iter(_Again(lambda: PARSERS[kind](buffered), submission))
    return submission


@dataclass
class _Again:
    """Rows of a file, with the line of each noted as it goes by."""

    walk: Callable[[], Iterator[tuple[int, Row]]]
    submission: Submission

    def __iter__(self) -> Iterator[Row]:
        places = self.submission.places
        del places[:]
        for place, row in self.walk():
            places.append(place)
            yield row


def _opened(path: Path, parse: Callable[[IO[bytes]], Iterator[tuple[int, Row]]]) -> Iterator[tuple[int, Row]]:
    with path.open("rb") as file:
        yield from parse(file)


def _guess(start: bytes) -> Format:
    """By how it starts; an object that ends with its first line is NDJSON, unless it is a whole batch."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] == b"[":
        return "json"
    try:
        first = orjson.loads(text.split(b"\n", 1)[0])
    except ValueError:
        return "json" if text[:1] == b"{" else "csv"
    if isinstance(first, dict):
        return "json" if "jobs" in first else "ndjson"
    return "ndjson" if isinstance(first, str) and first not in COLUMNS else "csv"


def _document(body: bytes) -> Submission:
    """A JSON file: one job, a list of jobs, or `{"name", "defaults", "jobs"}` as the API takes it."""
    try:
        document = orjson.loads(body.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError as error:
        raise InvalidRequest("the file is not JSON", problems=[mistake(error.lineno, "", str(error))]) from error
    name, defaults, jobs, share = "", {}, document, None
    if isinstance(document, dict):
        jobs = [document]
        if "jobs" in document:
            _check_batch(document)
            name, jobs = document.get("name", ""), document["jobs"]
            share = document.get("stop_at_failed_share")
            defaults = {**document.get("defaults", {}), **_if("labels", document.get("labels"))}
    if not isinstance(jobs, list):
        raise InvalidRequest("a JSON file holds a job, a list of jobs or a batch", problems=[])
    problems: list[Problem] = []
    rows = [row for n, job in enumerate(jobs, 1) if (row := _row(job, f"job {n}", problems)) is not None]
    if problems:
        raise InvalidRequest("the file holds jobs that are none", problems=problems)
    return Submission(rows, name, defaults, "job", share, array("q", range(1, len(rows) + 1)))


BATCH: dict[str, tuple[Any, str]] = {
    "name": (str, "must be a text"),
    "labels": (dict, "must be an object"),
    "defaults": (dict, "must be an object with fields of a job"),
    "stop_at_failed_share": (float | int, "must be a number above 0 and at most 1"),
    "jobs": (list, "must be a list"),
}
"""What a batch in a JSON file may hold."""


def _check_batch(document: dict[str, Any]) -> None:
    problems: list[Problem] = []
    for name, value in document.items():
        if name not in BATCH:
            problems.append({"field": name, "problem": unknown(1, name, BATCH)["problem"]})
        elif not isinstance(value, BATCH[name][0]):
            problems.append({"field": name, "problem": BATCH[name][1]})
    if problems:
        raise InvalidRequest("the file is no batch", problems=problems)


def _row(job: Any, where: str, problems: list[Problem]) -> Row | None:
    if isinstance(job, dict):
        return job
    if isinstance(job, str):
        return {"prompt": job}
    problems.append({"field": where, "problem": "must be an object with the fields of a job, or a prompt"})
    return None


def _ndjson(file: IO[bytes]) -> Iterator[tuple[int, Row]]:
    problems: list[Problem] = []
    for number, line in enumerate(file, 1):
        text = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
        if not text:
            continue
        try:
            job = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            problems.append(mistake(number, "", f"must be JSON: {error.msg} at column {error.colno}"))
        else:
            if isinstance(job, dict | str) and not problems:
                yield number, {"prompt": job} if isinstance(job, str) else job
            elif not isinstance(job, dict | str):
                problems.append(mistake(number, "", "must be an object with the fields of a job, or a prompt"))
        if len(problems) >= MOST_PROBLEMS:
            break
    if problems:
        raise InvalidRequest("the file has lines that are no jobs; nothing was submitted", problems=problems)


PARSERS: dict[Format, Callable[[IO[bytes]], Iterator[tuple[int, Row]]]] = {"ndjson": _ndjson, "csv": csv_rows}


def _if(name: str, value: Any) -> Row:
    return {} if value is None else {name: value}
