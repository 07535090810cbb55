"""What commands show: JSON for scripts, tables and progress for people. Progress goes to standard error."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Self

import orjson
import typer
from pydantic import BaseModel
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table

from farm.cli.saying import say, visible, visible_json
from farm.views import BatchView

PATIENCE = 1.0
"""Seconds a person waits without being told for what."""
SPEAK_EVERY = 5.0
"""Seconds between two lines of progress where standard error is no terminal."""

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def json_line(value: BaseModel | Mapping[str, Any]) -> None:
    """One JSON object on one line."""
    plain = value.model_dump(mode="json", exclude_none=False) if isinstance(value, BaseModel) else dict(value)
    typer.echo(visible_json(orjson.dumps(plain, default=str)))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], empty: str) -> None:
    """Rows under headings; `empty` says so if there are none. Columns whose heading starts with `#` align right.

    The first column stays whole on a narrow terminal: it holds what other commands are given.
    """
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        right, first = column.startswith("#"), column == columns[0]
        name = column.removeprefix("#")
        made.add_column(
            name, justify="right" if right else "left", no_wrap=first, overflow="ignore" if first else "fold"
        )
    for row in rows:
        made.add_row(*("" if cell is None else _plain(cell) for cell in row))
    if made.row_count:
        (out if out.is_terminal else Console(width=1_000, highlight=False)).print(made)
    else:
        say(empty)


def _plain(cell: object) -> str:
    from rich.markup import escape

    return escape(visible(str(cell)))


def seconds(value: float | None) -> str:
    """A duration as a person reads it.

    >>> seconds(0.25), seconds(61.2), seconds(7300)
    ('0.2 s', '1 min 1 s', '2 h 1 min')
    """
    if value is None:
        return ""
    if value < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    if value < 3600:
        return f"{int(value) // 60} min {int(value) % 60} s"
    return f"{int(value) // 3600} h {int(value) % 3600 // 60} min"


def size(count: float) -> str:
    """Bytes as a person reads them.

    >>> size(512), size(5_300_000)
    ('512 B', '5.1 MiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def ago(moment: datetime) -> str:
    """How long ago, in words."""
    return f"{seconds(max(0.0, (datetime.now(UTC) - moment).total_seconds()))} ago"


@contextmanager
def waiting(what: str) -> Iterator[Callable[[str], None]]:
    """Show that something takes its time, once it takes more than a moment; the function it yields notes what it is at.

    Without a terminal there is a line when it gets long, and one when it is over.
    """
    started = time.monotonic()
    if err.is_terminal:
        with err.status(_plain(f"{what} ...")) as status:
            yield lambda note: status.update(_plain(f"{what} ... {note}"))
    else:
        late = threading.Timer(PATIENCE, lambda: say(f"{what} ...", err=True))
        late.start()
        try:
            yield lambda _: None
        finally:
            late.cancel()
    if (took := time.monotonic() - started) > PATIENCE:
        say(f"{what}: {seconds(took)}", err=True)


class Bar:
    """A bar of `total` steps on a terminal; elsewhere a line every few seconds and at the end."""

    def __init__(self, what: str, total: int) -> None:
        self.what = what
        self.total = total
        self._spoken = time.monotonic()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=err,
            disable=not err.is_terminal,
        )
        self._task: TaskID = self._progress.add_task(what, total=total, note="")
        self._last = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if not err.is_terminal and self._last:
            say(self._last, err=True)

    def update(self, done: int, note: str = "") -> None:
        self._progress.update(self._task, completed=done, note=_plain(note))
        self._last = f"{self.what}: {done}/{self.total}" + (f", {note}" if note else "")
        if not err.is_terminal and time.monotonic() - self._spoken >= SPEAK_EVERY:
            say(self._last, err=True)
            self._spoken, self._last = time.monotonic(), ""

    def show(self, batch: BatchView) -> None:
        """A batch's counts, rate and estimate."""
        self.update(batch.counts.finished, batch_note(batch))


def batch_note(batch: BatchView) -> str:
    """What is worth saying about a batch beside how much of it is done."""
    counts = batch.counts
    notes = [f"{batch.images_per_second:.2g} images/s"] if batch.images_per_second else []
    if batch.eta_seconds is not None and not batch.done:
        notes.append(f"{seconds(batch.eta_seconds)} left")
    notes += [
        f"{number} {name}" for name, number in (("failed", counts.failed), ("cancelled", counts.cancelled)) if number
    ]
    stopped = [f"stopped: {batch.stop_reason}"] if batch.stop_reason else []
    return ", ".join(notes + (["paused"] if batch.paused else []) + stopped)
