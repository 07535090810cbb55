"""`farm replay`: a job's recipe once more, and how far the two pictures are apart."""

from typing import Annotated

import typer

from farm.cli.display import json_line, waiting
from farm.cli.exits import Exit
from farm.cli.options import DATA_DIR, AsJson, DataDir, connect
from farm.cli.saying import say
from farm.states import JobState
from farm.views import JobView


def replay(
    job: Annotated[str, typer.Argument(help="The id of a job that has a picture.", metavar="JOB", show_default=False)],
    data_dir: DataDir = DATA_DIR,
    wait: Annotated[bool, typer.Option("--wait", help="Until both pictures are compared, and say how.")] = False,
    as_json: AsJson = False,
) -> None:
    """Render a job's recipe again, as a job beside it, and compare the two pictures.

    Exit code 1 if nothing could be compared; pictures that differ are no failure.
    """
    with connect(data_dir) as farm:
        made = farm.replay(job)
        if wait:
            with waiting("rendering it again"):
                made = farm.wait(made)
    if as_json:
        json_line(made)
    elif not wait:
        say(f"job {made.id}")
        say(f"Its difference will stand in: farm jobs --batch {made.batch_id} --json", err=True)
    elif made.state is JobState.SUCCEEDED:
        say(f"job {made.id}: {told(made)}")
    if wait and made.state is not JobState.SUCCEEDED:
        reason = f": {made.error.code}: {made.error.message}" if made.error else ""
        say(f"job {made.id} {made.state}{reason}", err=True)
        raise typer.Exit(Exit.FAILED)


def told(job: JobView) -> str:
    """What came of a replay that succeeded, in a sentence."""
    found = job.replay
    if found is None or found.levels is None or found.mean_levels is None or found.differing is None:
        return "it was compared with nothing"
    if found.levels == 0:
        return f"the same picture as {found.of}, pixel by pixel"
    return (
        f"at most {found.levels} of 255 levels from {found.of}, {found.mean_levels:.3g} on average; "
        f"{found.differing:.2%} of the pixels differ"
    )
