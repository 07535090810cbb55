"""`farm projects`: tenants, what each may have, and what it uses."""

from collections.abc import Sequence
from typing import Annotated

import typer

from farm.cli.display import json_line, table
from farm.cli.options import DATA_DIR, AsJson, DataDir, connect
from farm.cli.saying import say
from farm.errors import NotFound
from farm.views_tenants import ProjectView

projects = typer.Typer(help="Projects and their limits. Needs a key with the scope admin.", no_args_is_help=True)

Limit = Annotated[str | None, typer.Option(help="A number, or none.", show_default=False)]


@projects.command("list")
def list_projects(data_dir: DataDir = DATA_DIR, as_json: AsJson = False) -> None:
    """List projects with their use of each limit. A project is made with its first key: `farm keys create`."""
    with connect(data_dir) as farm:
        found = farm.projects.list()
    if as_json:
        for project in found:
            json_line(project)
        return
    table(
        ("NAME", "#QUEUED", "#RUNNING", "#PIXEL STEPS TODAY", "#UPLOAD BYTES", "#REQUESTS/S", "ID"),
        (
            (
                project.name,
                _of(project.use.queued_jobs, project.limits.queued_jobs),
                _of(project.use.running_jobs, project.limits.running_jobs),
                _of(project.use.pixel_steps_today, project.limits.pixel_steps_per_day),
                _of(project.use.upload_bytes, project.limits.upload_bytes),
                project.limits.requests_per_second,
                project.id,
            )
            for project in found
        ),
        "There are no projects.",
    )


@projects.command()
def limit(
    name: Annotated[str, typer.Argument(help="The project's name.")],
    queued_jobs: Limit = None,
    running_jobs: Limit = None,
    pixel_steps_per_day: Limit = None,
    requests_per_second: Limit = None,
    upload_bytes: Limit = None,
    data_dir: DataDir = DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Set limits of a project; what is not named stays, `none` takes a limit away."""
    given = {
        "queued_jobs": queued_jobs,
        "running_jobs": running_jobs,
        "pixel_steps_per_day": pixel_steps_per_day,
        "requests_per_second": requests_per_second,
        "upload_bytes": upload_bytes,
    }
    wanted = {key: _number(key, text) for key, text in given.items() if text is not None}
    with connect(data_dir) as farm:
        changed = farm.projects.limit(_named(farm.projects.list(), name).id, **wanted)
    if as_json:
        json_line(changed)
        return
    for key, value in changed.limits.model_dump().items():
        say(f"{key.replace('_', ' ')}: {'no limit' if value is None else value}")


def _named(found: Sequence[ProjectView], name: str) -> ProjectView:
    for project in found:
        if project.name == name:
            return project
    raise NotFound(f"there is no project {name}; there are: {', '.join(project.name for project in found)}")


def _number(key: str, text: str) -> int | None:
    if text.lower() == "none":
        return None
    if not text.isdecimal() or len(text) > 15:
        raise typer.BadParameter(f"{text!r} is neither a number nor none", param_hint=f"--{key.replace('_', '-')}")
    return int(text)


def _of(used: int, most: int | None) -> str:
    return str(used) if most is None else f"{used} of {most}"
