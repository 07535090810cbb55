"""`farm submit`: what is sent, what is said, and how it ends."""

from pathlib import Path

import orjson
import pytest

from tests.cli.conftest import Run
from tests.client.fake import FakeFarm, Reply, batch_document, job_document, page, problem

BATCHES = "/api/v1/batches"


def test_a_file_becomes_a_batch(run: Run, fake: FakeFarm) -> None:
    batch = batch_document(2, queued=2)
    fake.on("POST", BATCHES, Reply(201, batch | {"warnings": ["the negative prompt has no effect"]}))
    Path("walls.csv").write_text("prompt,steps\na,2\nb,\n")
    result = run("submit", "walls.csv", "--name", "walls", "--label", "site=a=b", "--priority", 5)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"batch {batch['id']}: 2 jobs\n"
    assert "the negative prompt has no effect" in result.stderr
    (asked,) = fake.asked
    assert asked.lines == [{"prompt": "a", "steps": 2}, {"prompt": "b"}]
    assert asked.query == {"name": ["walls"], "labels": ['{"site":"a=b"}'], "priority": ["5"]}
    assert asked.headers["authorization"] == "Bearer key-of-ours"


def test_what_the_command_line_says_goes_over_what_the_file_says(run: Run, fake: FakeFarm) -> None:
    fake.on("POST", BATCHES, Reply(201, batch_document()))
    document = {"name": "file", "labels": {"a": "1", "b": "1"}, "defaults": {"priority": 1, "steps": 3}, "jobs": ["x"]}
    Path("a.json").write_bytes(orjson.dumps(document | {"stop_at_failed_share": 0.5}))
    run("submit", "a.json")
    run("submit", "a.json", "--label", "b=2", "--priority", 2, "--stop-at-failed-share", 0.2)
    before, asked = fake.asked
    assert (before.query["stop_at_failed_share"], asked.query["stop_at_failed_share"]) == (["0.5"], ["0.2"])
    assert asked.query["name"] == ["file"]
    assert orjson.loads(asked.query["labels"][0]) == {"a": "1", "b": "2"}
    assert (asked.query["priority"], asked.query["steps"]) == (["2"], ["3"])


def test_refused_lines_are_named_as_they_stand_in_the_file(run: Run, fake: FakeFarm) -> None:
    problems = [{"line": 2, "field": "checkpoint", "problem": "there is no checkpoint named crak-tiny"}]
    fake.on("POST", BATCHES, problem(422, "invalid-request", "1 of 2 jobs is not valid", problems=problems))
    Path("a.csv").write_text("prompt,checkpoint\n\na,\nb,crak-tiny\n")
    result = run("submit", "a.csv")
    assert result.exit_code == 2
    assert "1 of 2 jobs is not valid" in result.stderr
    assert "line 4: checkpoint: there is no checkpoint named crak-tiny" in result.stderr


def test_a_mistake_found_here_reaches_nobody(run: Run, fake: FakeFarm) -> None:
    fake.on("POST", BATCHES, Reply(201, batch_document()))
    result = run("submit", "-", "--format", "csv", stdin="prompt,steps\na,four\n")
    assert result.exit_code == 2
    assert "line 2: steps: must be a whole number, not 'four'" in result.stderr
    assert not result.stdout


def test_a_dry_run(run: Run, fake: FakeFarm) -> None:
    fake.on("POST", BATCHES, Reply(200, {"jobs": 2, "lanes": 1, "pipelines": 1, "warnings": ["cut"]}))
    result = run("submit", "-", "--dry-run", "--json", stdin='{"prompt": "a"}\n{"prompt": "b"}\n')
    assert result.exit_code == 0, result.output
    assert orjson.loads(result.stdout) == {"jobs": 2, "lanes": 1, "pipelines": 1, "warnings": ["cut"]}
    assert fake.asked[0].query == {"dry_run": ["true"]}


@pytest.mark.parametrize(("counts", "code"), [({"succeeded": 2}, 0), ({"succeeded": 1, "failed": 1}, 1)])
def test_watching_ends_as_the_batch_does(run: Run, fake: FakeFarm, counts: dict[str, int], code: int) -> None:
    batch = batch_document(2, queued=2)
    fake.on("POST", BATCHES, Reply(201, batch))
    fake.on("GET", f"{BATCHES}/{batch['id']}", Reply(body=batch), Reply(body=batch | {"counts": counts}))
    failed = job_document(1, "failed", error={"code": "render-failed", "message": "the pipeline raised"})
    fake.on("GET", f"{BATCHES}/{batch['id']}/jobs", page(failed))
    result = run("submit", "-", "--watch", stdin='"a"\n"b"\n')
    assert result.exit_code == code, result.output
    assert ("render-failed: the pipeline raised" in result.stderr) == bool(code)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["submit", "nowhere.csv"], "nowhere.csv"),
        (["submit", "-", "--label", "novalue"], "KEY=VALUE"),
        (["submit", "-", "--format", "yaml"], "yaml"),
        (["submit"], "FILE"),
    ],
)
def test_wrong_usage_ends_with_2(run: Run, fake: FakeFarm, arguments: list[str], words: str) -> None:
    result = run(*arguments, stdin='"a"\n')
    assert result.exit_code == 2
    assert words in result.stderr
    assert not fake.asked
