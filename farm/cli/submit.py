"""`farm submit`: many jobs from a file."""

from typing import Annotated, Any

import typer

from farm.cli.batches import follow
from farm.cli.display import json_line, waiting
from farm.cli.options import DATA_DIR, AsJson, DataDir, Labels, connect, labels_of
from farm.cli.reading import Format, Submission, read
from farm.cli.saying import say
from farm.errors import InvalidRequest


def submit(
    file: Annotated[
        str, typer.Argument(help="JSON, NDJSON, or CSV with a header; - is standard input.", metavar="FILE")
    ],
    data_dir: DataDir = DATA_DIR,
    name: Annotated[str | None, typer.Option(help="The batch's name.", show_default=False)] = None,
    label: Labels = None,
    priority: Annotated[int | None, typer.Option(help="Higher goes first; 0 is usual.", show_default=False)] = None,
    kind: Annotated[
        Format | None, typer.Option("--format", help="What FILE is, if its name does not say.", show_default=False)
    ] = None,
    stop_at_failed_share: Annotated[
        float | None,
        typer.Option(
            help="Stop once this share (0.2 is a fifth) of the jobs that succeeded or failed have failed: "
            "what is queued is cancelled, what runs finishes.",
            show_default=False,
        ),
    ] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="The same key submits the same file once only.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, store nothing.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Then follow the batch until it is done.")] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a file of jobs as one batch: all of them are accepted, or none and every bad line is named.

    CSV columns are the fields of a job; adapters are NAME:WEIGHT, controls NAME=HASH:WEIGHT and labels KEY=VALUE,
    parted by semicolons; a column label.KEY holds one label. Pictures are named by the hashes that farm upload prints.
    """
    submission = read(file, kind)
    defaults = _defaults(submission, labels_of(label), priority)
    title = submission.name if name is None else name
    share = submission.stop_at_failed_share if stop_at_failed_share is None else stop_at_failed_share
    with connect(data_dir) as farm:
        try:
            if dry_run:
                with waiting("checking"):
                    rehearsal = farm.dry_run(submission.rows, name=title, defaults=defaults)
                _tell_rehearsal(rehearsal.model_dump(), as_json)
                return
            with waiting("submitting"):
                batch = farm.submit_many(
                    submission.rows,
                    name=title,
                    defaults=defaults,
                    idempotency_key=idempotency_key,
                    stop_at_failed_share=share,
                )
        except InvalidRequest as error:
            raise submission.placed(error) from error
        for warning in batch.warnings:
            say(f"warning: {warning}", err=True)
        if as_json:
            json_line(batch)
        else:
            say(f"batch {batch.id}: {batch.total} jobs")
        if watch:
            raise typer.Exit(follow(farm, batch, as_json))
        if not as_json:
            say(f"Follow it with: farm watch {batch.id}", err=True)


def _defaults(submission: Submission, labels: dict[str, str], priority: int | None) -> dict[str, Any]:
    """The file's defaults, with what the command line says on top."""
    defaults = dict(submission.defaults)
    if labels:
        defaults["labels"] = {**defaults.get("labels", {}), **labels}
    if priority is not None:
        defaults["priority"] = priority
    return defaults


def _tell_rehearsal(rehearsal: dict[str, Any], as_json: bool) -> None:
    if as_json:
        json_line(rehearsal)
        return
    for warning in rehearsal["warnings"]:
        say(f"warning: {warning}", err=True)
    say(f"{rehearsal['jobs']} jobs in {rehearsal['lanes']} lanes and {rehearsal['pipelines']} pipelines; fine.")
