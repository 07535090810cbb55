"""Looking at jobs and batches, and changing them: watch, download, jobs, batches, cancel, pause and the like."""

import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from farm.cli import failures
from farm.cli.display import Bar, ago, batch_note, json_line, table
from farm.cli.exits import Exit, exit_code, report
from farm.cli.options import DATA_DIR, AsJson, DataDir, Labels, connect, labels_of
from farm.cli.saying import say, visible
from farm.errors import FarmError, NotFound
from farm.states import JobState

if TYPE_CHECKING:
    from farm.client import Farm
    from farm.views import BatchView, JobView

T = TypeVar("T")

Batch = Annotated[str, typer.Argument(help="The id of a batch.", metavar="BATCH", show_default=False)]
Ids = Annotated[list[str], typer.Argument(help="Ids of batches or jobs.", metavar="ID...", show_default=False)]
BatchIds = Annotated[list[str], typer.Argument(help="Ids of batches.", metavar="BATCH...", show_default=False)]
OfBatch = Annotated[str | None, typer.Option("--batch", help="Only jobs of this batch.", show_default=False)]
Limit = Annotated[int, typer.Option(help="Show at most so many; 0 shows all.", min=0)]


def watch(batch: Batch, data_dir: DataDir = DATA_DIR, as_json: AsJson = False) -> None:
    """Follow a batch until it is done: a live bar with rate and estimate. Exit code 1 if a job failed."""
    with connect(data_dir) as farm:
        raise typer.Exit(follow(farm, farm.batch(batch), as_json))


def follow(farm: "Farm", batch: "BatchView", as_json: bool) -> Exit:
    """Wait for a batch, showing how it goes; FAILED if a job failed or was cancelled."""
    if as_json:
        done = farm.wait(batch, on_progress=json_line)
    else:
        with Bar("rendering", batch.total) as bar:
            done = farm.wait(batch, on_progress=bar.show)
        counts = done.counts
        say(f"{counts.succeeded} succeeded, {counts.failed} failed, {counts.cancelled} cancelled")
    explain_failures(farm, done)
    return Exit.OK if done.counts.succeeded == done.total else Exit.FAILED


def explain_failures(farm: "Farm", batch: "BatchView") -> None:
    """Say on standard error why jobs failed, the first few of them."""
    if not batch.counts.failed:
        return
    for job in islice(farm.jobs(state=JobState.FAILED, batch=batch.id, page=5), 5):
        reason = f"{job.error.code}: {job.error.message}" if job.error else "no reason given"
        say(f"job {job.number} ({job.id}) failed: {reason}", err=True)


def download(
    batch: Batch,
    out: Annotated[Path, typer.Option(help="The folder to fill.", metavar="DIR", file_okay=False)],
    data_dir: DataDir = DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Fetch a batch's pictures and a manifest. Run it again to go on: what is there already is not fetched again."""
    with connect(data_dir) as farm:
        found = farm.batch(batch)
        with Bar("downloading", found.counts.succeeded) as bar:
            result = farm.download(found, out, lambda _, done: bar.update(done))
    if as_json:
        json_line(
            {
                "folder": str(result.folder),
                "manifest": str(result.manifest),
                "fetched": result.fetched,
                "kept": result.kept,
            }
        )
    else:
        say(f"{result.pictures} pictures in {result.folder} ({result.fetched} fetched now), {result.manifest}")


def jobs(
    data_dir: DataDir = DATA_DIR,
    state: Annotated[list[JobState] | None, typer.Option(help="Only jobs in this state; may be repeated.")] = None,
    label: Labels = None,
    batch: OfBatch = None,
    failed: Annotated[bool, typer.Option("--failed", help="Only failed jobs, grouped by cause.")] = False,
    limit: Limit = 50,
    as_json: AsJson = False,
) -> None:
    """List jobs; with --failed, what they failed of, of all of them."""
    if failed and state:
        raise typer.BadParameter("--failed has a state already: failed", param_hint="--state")
    with connect(data_dir) as farm:
        if failed:
            wanted = farm.jobs(state=[JobState.FAILED], labels=labels_of(label), batch=batch, page=failures.PAGE)
            failures.show(wanted, as_json)
            return
        found = farm.jobs(state=state or (), labels=labels_of(label), batch=batch, page=_page(limit))
        _list(
            found,
            limit,
            as_json,
            ("ID", "STATE", "CREATED", "PROMPT"),
            lambda job: (job.id, job.state, ago(job.created_at), _short(job.prompt)),
            "There are no such jobs.",
        )


def batches(
    data_dir: DataDir = DATA_DIR,
    state: Annotated[str | None, typer.Option(help="Only active, done or paused batches.", show_default=False)] = None,
    label: Labels = None,
    limit: Limit = 50,
    as_json: AsJson = False,
) -> None:
    """List batches."""
    if state not in (None, "active", "done", "paused"):
        raise typer.BadParameter("must be active, done or paused", param_hint="--state")
    with connect(data_dir) as farm:
        _list(
            farm.batches(state=state, labels=labels_of(label), page=_page(limit)),
            limit,
            as_json,
            ("ID", "NAME", "#DONE", "CREATED", ""),
            lambda batch: (
                batch.id,
                _short(batch.name),
                f"{batch.counts.finished}/{batch.total}",
                ago(batch.created_at),
                batch_note(batch),
            ),
            "There are no such batches.",
        )


def _list(
    found: Iterator[T],
    limit: int,
    as_json: bool,
    columns: tuple[str, ...],
    row: Callable[[T], tuple[object, ...]],
    empty: str,
) -> None:
    shown: Iterable[T] = islice(found, limit) if limit else found
    if as_json:
        for one in shown:
            json_line(one)  # type: ignore[arg-type]  # jobs and batches are both views
    else:
        table(columns, map(row, shown), empty)
    if limit and next(found, None) is not None:
        say(f"Only the first {limit} are shown; --limit 0 shows all.", err=True)


def _page(limit: int) -> int:
    """How many to ask for at a time: one more than is shown tells whether there are more."""
    return min(limit + 1, 500) if limit else 500


def _short(text: str, most: int = 60) -> str:
    shown = visible(text)
    return shown if len(shown) <= most else shown[: most - 1] + "\u2026"


def cancel(ids: Ids, data_dir: DataDir = DATA_DIR, as_json: AsJson = False) -> None:
    """Cancel batches or single jobs; running jobs stop at their next step."""
    _each(ids, data_dir, as_json, "cancelled", lambda farm, one: _either(farm.cancel, farm.cancel_job, one))


def retry(
    ids: Annotated[
        list[str] | None, typer.Argument(help="Ids of batches or jobs.", metavar="ID...", show_default=False)
    ] = None,
    data_dir: DataDir = DATA_DIR,
    failed: Annotated[bool, typer.Option("--failed", help="Every failed job, in place of ids.")] = False,
    cause: Annotated[
        str | None, typer.Option(help="With --failed: only of this cause, as `farm jobs --failed` names it.")
    ] = None,
    label: Labels = None,
    batch: OfBatch = None,
    as_json: AsJson = False,
) -> None:
    """Queue failed and cancelled jobs again: by id, or every failed one, or those of one cause."""
    if failed == bool(ids):
        raise typer.BadParameter("name ids, or say --failed", param_hint="ID... or --failed")
    if not failed and (cause or label or batch):
        raise typer.BadParameter("--cause, --label and --batch choose among failed jobs: say --failed with them")
    if ids:
        _each(ids, data_dir, as_json, "queued again", lambda farm, one: _either(farm.retry, farm.retry_job, one))
        return
    with connect(data_dir) as farm:
        failures.retry(farm, cause=cause, labels=labels_of(label), batch=batch, as_json=as_json)


def delete(
    ids: Ids,
    data_dir: DataDir = DATA_DIR,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete batches or single jobs, pictures included. Asks first on a terminal; elsewhere it wants --yes."""
    if not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter("deleting takes pictures away for good; say --yes", param_hint="--yes")
        typer.confirm(f"Delete {len(ids)} of your batches or jobs, with their pictures?", abort=True, err=True)
    _each(ids, data_dir, as_json, "deleted", lambda farm, one: _either(farm.delete, farm.delete_job, one))


def pause(ids: BatchIds, data_dir: DataDir = DATA_DIR, as_json: AsJson = False) -> None:
    """Pause batches: nothing of them is started any more, what runs is finished."""
    _each(ids, data_dir, as_json, "paused", lambda farm, one: farm.pause(one))


def resume(ids: BatchIds, data_dir: DataDir = DATA_DIR, as_json: AsJson = False) -> None:
    """Let paused batches go on."""
    _each(ids, data_dir, as_json, "resumed", lambda farm, one: farm.resume(one))


def priority(
    batch: Batch,
    value: Annotated[int, typer.Argument(help="Higher goes first; 0 is usual.", metavar="PRIORITY")],
    data_dir: DataDir = DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Change a batch's priority. (Write a negative one after `--`.)"""
    _each([batch], data_dir, as_json, f"has priority {value}", lambda farm, one: farm.priority(one, value))


def _either(batch: Callable[[str], T], job: Callable[[str], T], one: str) -> "T | Any":
    """Act on a batch of this id, or else on a job."""
    try:
        return batch(one)
    except NotFound:
        try:
            return job(one)
        except NotFound:
            raise NotFound(f"there is no batch and no job {one}") from None


def _each(
    ids: list[str], data_dir: Path, as_json: bool, done: str, act: "Callable[[Farm, str], BatchView | JobView | None]"
) -> None:
    """Act on every id, whatever happens to the others; end with the first failure's exit code."""
    failed: Exit | None = None
    with connect(data_dir) as farm:
        for one in ids:
            try:
                view = act(farm, one)
            except FarmError as error:
                report(error)
                failed = failed or exit_code(error)
                continue
            if as_json:
                json_line(view or {"id": one, "deleted": True})
            else:
                say(f"{one} {done}")
    if failed is not None:
        raise typer.Exit(failed)
