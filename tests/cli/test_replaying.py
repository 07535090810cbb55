"""`farm replay`: what it asks, what it prints, and how it ends."""

from typing import Any

import orjson
import pytest

from farm.cli.exits import Exit
from tests.cli.conftest import Run
from tests.client.fake import FakeFarm, Reply, job_document, problem

JOBS = "/api/v1/jobs"


def _serve(fake: FakeFarm, state: str = "succeeded", **found: Any) -> tuple[str, str]:
    """A job that can be replayed, and what its replay comes to; answers both ids."""
    original = job_document()
    of = {"of": original["id"]}
    queued = job_document(state="queued", replay=of)
    done = queued | job_document(state=state, replay=of | found) | {"id": queued["id"]}
    if state == "failed":
        done["error"] = {"code": "not-found", "message": "the picture to compare with is gone"}
    fake.on("POST", f"{JOBS}/{original['id']}/replay", Reply(201, queued))
    fake.on("GET", f"{JOBS}/{queued['id']}", Reply(body=queued), Reply(body=done))
    return original["id"], queued["id"]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"levels": 0, "mean_levels": 0.0, "differing": 0.0}, "the same picture as {of}, pixel by pixel"),
        (
            {"levels": 3, "mean_levels": 0.0123, "differing": 0.25},
            "at most 3 of 255 levels from {of}, 0.0123 on average; 25.00% of the pixels differ",
        ),
    ],
)
def test_it_waits_and_says_how_far_the_pictures_are_apart(
    run: Run, fake: FakeFarm, found: dict[str, Any], words: str
) -> None:
    original, replay = _serve(fake, **found)
    result = run("replay", original, "--wait")
    assert (result.exit_code, result.stdout) == (0, f"job {replay}: {words.format(of=original)}\n")


def test_without_waiting_it_names_the_job(run: Run, fake: FakeFarm) -> None:
    original, replay = _serve(fake, levels=0, mean_levels=0.0, differing=0.0)
    assert run("replay", original).stdout == f"job {replay}\n"
    assert fake.paths() == [f"POST {JOBS}/{original}/replay"]


def test_for_scripts(run: Run, fake: FakeFarm) -> None:
    original, replay = _serve(fake, levels=2, mean_levels=0.5, differing=0.25)
    asked = orjson.loads(run("replay", original, "--json").stdout)
    assert (asked["id"], asked["state"], asked["replay"]["levels"]) == (replay, "queued", None)
    told = orjson.loads(run("replay", original, "--wait", "--json").stdout)
    assert told["replay"] == {"of": original, "levels": 2, "mean_levels": 0.5, "differing": 0.25}


def test_what_could_not_be_compared_is_a_failure(run: Run, fake: FakeFarm) -> None:
    original, replay = _serve(fake, state="failed")
    result = run("replay", original, "--wait")
    assert result.exit_code == Exit.FAILED
    assert f"job {replay} failed: not-found: the picture to compare with is gone" in result.stderr
    assert not result.stdout
    fake.on("POST", f"{JOBS}/other/replay", problem(409, "conflict", "job other is queued"))
    assert run("replay", "other").exit_code == Exit.FAILED
    assert run("replay", "unknown").exit_code == Exit.NOT_FOUND
