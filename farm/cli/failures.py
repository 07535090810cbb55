"""Failed jobs by their cause: `farm jobs --failed` and `farm retry --failed`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from farm.cli.display import ago, json_line, table
from farm.cli.saying import say
from farm.errors import Conflict, FarmError, NotFound
from farm.states import JobState

if TYPE_CHECKING:
    from farm.client import Farm
    from farm.views import JobView

PAGE = 500


@dataclass
class _Cause:
    """Jobs that failed with one code, and the latest of them."""

    code: str
    jobs: int
    latest: "JobView"


def show(found: "Iterable[JobView]", as_json: bool) -> None:
    """One line for each cause, the most frequent first, with the latest job that failed of it."""
    causes: dict[str, _Cause] = {}
    for job in found:
        cause = causes.setdefault(_code(job), _Cause(_code(job), 0, job))
        cause.jobs += 1
        if job.finished_at and cause.latest.finished_at and job.finished_at > cause.latest.finished_at:
            cause.latest = job
    ranked = sorted(causes.values(), key=lambda cause: -cause.jobs)
    if as_json:
        for cause in ranked:
            said = cause.latest.error.message if cause.latest.error else ""
            json_line({"cause": cause.code, "jobs": cause.jobs, "latest": str(cause.latest.id), "message": said})
        return
    table(
        ("CAUSE", "#JOBS", "LATEST", "FAILED", "MESSAGE"),
        (
            (
                cause.code,
                cause.jobs,
                cause.latest.id,
                ago(cause.latest.finished_at) if cause.latest.finished_at else "-",
                cause.latest.error.message if cause.latest.error else "",
            )
            for cause in ranked
        ),
        "No job failed.",
    )


def retry(farm: "Farm", *, cause: str | None, labels: Mapping[str, str], batch: str | None, as_json: bool) -> None:
    """Queue failed jobs again: all, or those of one cause. Says how many, and how many could not be, and why."""
    done, left = 0, 0
    why: FarmError | None = None
    for job in farm.jobs(state=[JobState.FAILED], labels=labels, batch=batch, page=PAGE):
        if cause is not None and _code(job) != cause:
            continue
        try:
            view = farm.retry_job(job)
        except (Conflict, NotFound) as error:
            left, why = left + 1, error
            continue
        except FarmError:
            say(f"{done} jobs queued again before this:", err=True)
            raise
        done += 1
        if as_json:
            json_line(view)
    if why is not None:
        say(f"{left} jobs could not be queued again, the last because {why.message}", err=True)
    if not as_json:
        say(f"{done} jobs queued again" if done or left else "No such job failed.")


def _code(job: "JobView") -> str:
    return job.error.code if job.error else "unknown"
