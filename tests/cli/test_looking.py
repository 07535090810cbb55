"""Looking at what the farm has and changing it, and the exit codes of it all."""

import re
from pathlib import Path
from uuid import uuid4

import orjson
import pytest

from farm.cli import batches
from farm.cli.exits import Exit
from tests.cli.conftest import Run
from tests.client.fake import FakeFarm, Reply, batch_document, job_document, page, problem, serve_pictures

API = "/api/v1"


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (problem(404, "not-found", "there is no batch x"), Exit.NOT_FOUND),
        (problem(401, "unauthorized"), Exit.AUTH),
        (problem(403, "forbidden"), Exit.AUTH),
        (problem(503, "unavailable"), Exit.UNREACHABLE),
        (problem(409, "conflict"), Exit.FAILED),
        (problem(422, "invalid-request"), Exit.USAGE),
        (problem(500, "internal"), Exit.FAILED),
        (Reply(hang_up=True), Exit.UNREACHABLE),
    ],
)
def test_exit_codes_say_what_went_wrong(run: Run, fake: FakeFarm, reply: Reply, code: Exit) -> None:
    fake.on("GET", f"{API}/batches/x", reply)
    result = run("watch", "x")
    assert result.exit_code == code
    assert result.stderr.startswith("farm: ")
    assert not result.stdout


def test_no_farm_here(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FARM_URL")
    result = run("jobs", "--data-dir", "empty")
    assert result.exit_code == Exit.UNREACHABLE
    assert "farm up" in result.stderr


def test_interrupted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(batches, "follow", interrupt)
    monkeypatch.setattr("farm.client.Farm.batch", lambda *_: None)
    assert run("watch", "x").exit_code == Exit.INTERRUPTED


def test_watching_for_scripts(run: Run, fake: FakeFarm) -> None:
    batch = batch_document(2, queued=2)
    done = batch | {"counts": {"succeeded": 2}}
    fake.on("GET", f"{API}/batches/{batch['id']}", Reply(body=batch), Reply(body=batch), Reply(body=done))
    result = run("watch", batch["id"], "--json")
    assert result.exit_code == 0
    assert [orjson.loads(line)["counts"]["succeeded"] for line in result.stdout.splitlines()] == [0, 2]


def test_downloading(run: Run, fake: FakeFarm) -> None:
    batch_id = serve_pictures(fake, job_document(0), job_document(1))
    fake.on("GET", f"{API}/batches/{batch_id}", Reply(body=batch_document(2, succeeded=2) | {"id": batch_id}))
    for fetched in (2, 0):
        result = run("download", batch_id, "--out", "pictures", "--json")
        assert result.exit_code == 0, result.output
        assert orjson.loads(result.stdout) == {
            "folder": "pictures",
            "manifest": "pictures/manifest.ndjson",
            "fetched": fetched,
            "kept": 2 - fetched,
        }
    assert len(list(Path("pictures").glob("*.png"))) == 2


def test_jobs_are_listed_as_asked_for(run: Run, fake: FakeFarm) -> None:
    listed = [job_document(number, prompt="[red] wall") for number in range(3)]
    fake.on("GET", f"{API}/jobs", page(*listed))
    arguments = ["jobs", "--state", "succeeded", "--state", "failed", "--label", "a=b", "--limit", "2"]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert listed[1]["id"] in result.stdout
    assert listed[2]["id"] not in result.stdout
    assert "[red] wall" in result.stdout, "a prompt is no markup"
    assert "--limit 0 shows all" in result.stderr
    assert fake.asked[0].query == {"state": ["succeeded", "failed"], "label": ["a=b"], "limit": ["3"]}
    lines = run(*arguments, "--json").stdout.splitlines()
    assert [orjson.loads(line)["id"] for line in lines] == [one["id"] for one in listed[:2]]


def test_batches_are_listed(run: Run, fake: FakeFarm) -> None:
    batch = batch_document(4, succeeded=1, failed=1, queued=2) | {"paused": True}
    fake.on("GET", f"{API}/batches", page(batch))
    result = run("batches", "--state", "paused")
    assert batch["id"] in result.stdout
    assert "1 failed, paused" in result.stdout
    assert run("batches", "--state", "odd").exit_code == Exit.USAGE


def test_nothing_to_list(run: Run, fake: FakeFarm) -> None:
    fake.on("GET", f"{API}/jobs", page())
    assert run("jobs").stdout == "There are no such jobs.\n"
    assert run("jobs", "--json").stdout == ""


def test_an_id_may_be_a_batch_or_a_job(run: Run, fake: FakeFarm) -> None:
    batch, job, nothing = batch_document(), job_document(state="cancelled"), uuid4()
    fake.on("POST", f"{API}/batches/{batch['id']}/cancel", Reply(body=batch))
    fake.on("POST", f"{API}/jobs/{job['id']}/cancel", Reply(body=job))
    result = run("cancel", batch["id"], nothing, job["id"])
    assert result.stdout == f"{batch['id']} cancelled\n{job['id']} cancelled\n", "one failure does not stop the rest"
    assert f"there is no batch and no job {nothing}" in result.stderr
    assert result.exit_code == Exit.NOT_FOUND


def test_failed_jobs_are_grouped_by_cause_and_retried_by_it(run: Run, fake: FakeFarm) -> None:
    codes = ["out-of-memory", "quarantined", "out-of-memory"]
    failed = [
        job_document(
            n, state="failed", error={"code": code, "message": f"{n}!"}, finished_at=f"2026-01-0{n + 1}T00:00:00Z"
        )
        for n, code in enumerate(codes)
    ]
    fake.on("GET", f"{API}/jobs", page(*failed))
    for job in failed:
        fake.on("POST", f"{API}/jobs/{job['id']}/retry", Reply(body=job | {"state": "queued"}))
    lines = [orjson.loads(line) for line in run("jobs", "--failed", "--json").stdout.splitlines()]
    assert [(line["cause"], line["jobs"]) for line in lines] == [("out-of-memory", 2), ("quarantined", 1)]
    assert lines[0]["latest"] == failed[2]["id"]
    assert fake.asked[0].query["state"] == ["failed"]
    assert "out-of-memory" in run("jobs", "--failed").stdout
    assert run("retry", "--failed", "--cause", "out-of-memory").stdout == "2 jobs queued again\n"
    retried = [one.path for one in fake.asked if one.method == "POST"]
    assert retried == [f"{API}/jobs/{job['id']}/retry" for job in (failed[0], failed[2])]
    assert run("retry", "--failed").stdout == "3 jobs queued again\n"
    assert run("retry", "--failed", "--cause", "boredom").stdout == "No such job failed.\n"
    assert run("jobs", "--failed", "--state", "queued").exit_code == Exit.USAGE


def test_failed_jobs_that_cannot_be_retried_are_told_of(run: Run, fake: FakeFarm) -> None:
    failed = [job_document(n, state="failed", error={"code": "quarantined", "message": "!"}) for n in range(3)]
    fake.on("GET", f"{API}/jobs", page(*failed))
    fake.on("POST", f"{API}/jobs/{failed[0]['id']}/retry", Reply(body=failed[0] | {"state": "queued"}))
    for job in failed[1:]:
        fake.on("POST", f"{API}/jobs/{job['id']}/retry", problem(409, "conflict", "its batch is being cancelled"))
    result = run("retry", "--failed")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "1 jobs queued again\n"
    assert "2 jobs could not be queued again, the last because its batch is being cancelled" in result.stderr


@pytest.mark.parametrize("arguments", [[], ["--failed", "x"], ["x", "--cause", "y"]])
def test_retrying_wants_to_know_what(run: Run, fake: FakeFarm, arguments: list[str]) -> None:
    assert run("retry", *arguments).exit_code == Exit.USAGE
    assert fake.asked == []


@pytest.mark.parametrize("verb", ["pause", "resume", "retry"])
def test_verbs_of_batches(run: Run, fake: FakeFarm, verb: str) -> None:
    batch = batch_document()
    fake.on("POST", f"{API}/batches/{batch['id']}/{verb}", Reply(body=batch))
    result = run(verb, batch["id"], "--json")
    assert orjson.loads(result.stdout)["id"] == batch["id"]


def test_priority(run: Run, fake: FakeFarm) -> None:
    fake.on("POST", f"{API}/batches/b/priority", Reply(body=batch_document()))
    assert run("priority", "--", "b", "-5").exit_code == 0
    assert fake.asked[0].lines == [{"priority": -5}]


def test_deleting_wants_to_be_meant(run: Run, fake: FakeFarm) -> None:
    fake.on("DELETE", f"{API}/batches/b", Reply(204, b""))
    assert run("delete", "b").exit_code == Exit.USAGE
    assert not fake.asked
    assert run("delete", "b", "--yes").stdout == "b deleted\n"


def test_keys_through_the_api(run: Run, fake: FakeFarm) -> None:
    key = {
        "id": str(uuid4()),
        "name": "ci",
        "prefix": "farm_abc",
        "project": "walls",
        "scopes": ["jobs:read"],
        "created_at": "2030-01-01T00:00:00Z",
    }
    fake.on("POST", f"{API}/keys", Reply(201, key | {"key": "farm_abcdef"}))
    fake.on("GET", f"{API}/keys", page(key))
    fake.on("DELETE", f"{API}/keys/{key['id']}", Reply(204, b""))
    made = run("keys", "create", "ci", "--project", "walls", "--scope", "jobs:read", "--expires", "30d")
    assert made.stdout == "farm_abcdef\n", "the key alone, for scripts"
    assert fake.asked[0].lines[0]["scopes"] == ["jobs:read"]
    assert fake.asked[0].lines[0]["expires_at"]
    assert "walls" in run("keys", "list").stdout
    assert run("keys", "revoke", key["id"]).exit_code == 0
    assert run("keys", "revoke", "farm_abc").exit_code == Exit.NOT_FOUND
    assert run("keys", "create", "ci", "--expires", "2001-01-01").exit_code == Exit.USAGE


def test_models_are_listed(run: Run, fake: FakeFarm) -> None:
    model = {
        "name": "crack-tiny",
        "hash": "a" * 64,
        "family": "crack-tiny",
        "state": "available",
        "bytes": 5_000_000,
        "created_at": "2030-01-01T00:00:00Z",
    }
    fake.on("GET", f"{API}/checkpoints", page(model | {"profile": {}}))
    fake.on("GET", f"{API}/vaes", page(model | {"name": "taesd", "tiny": True}))
    fake.on("GET", f"{API}/controlnets", page())
    fake.on("GET", f"{API}/motions", page(model | {"name": "wind", "max_frames": 32}))
    fake.on("GET", f"{API}/adapters", page(model | {"name": "lcm", "kind": "acceleration", "project": "walls"}))
    lines = [orjson.loads(line) for line in run("models", "list", "--json").stdout.splitlines()]
    assert [(line["name"], line["kind"]) for line in lines] == [
        ("crack-tiny", "checkpoint"),
        ("taesd", "vae"),
        ("wind", "motion"),
        ("lcm", "acceleration"),
    ]
    assert [line["project"] for line in lines] == [None, None, None, "walls"]
    assert re.search(r"lcm +acceleration +crack-tiny +available +walls ", run("models", "list").stdout)


def test_a_model_from_the_hub_is_asked_for_and_followed(run: Run, fake: FakeFarm) -> None:
    source = f"hf:owner/name@{'0' * 40}"
    begun = {
        "id": "0190a0a0-0000-7000-8000-000000000002",
        "name": "big",
        "kind": "checkpoint",
        "source": source,
        "state": "waiting",
        "created_at": "2030-01-01T00:00:00Z",
    }
    over = begun | {"finished_at": "2030-01-01T00:01:00Z"}
    place = f"{API}/registrations/{begun['id']}"
    fake.on("POST", f"{API}/checkpoints", Reply(202, begun))
    fake.on("GET", place, Reply(body=begun | {"state": "fetching", "bytes": 5, "total_bytes": 10}))
    fake.on("GET", place, Reply(body=over | {"state": "available", "family": "sdxl", "notes": ["a note"]}))
    wanted = ("--kind", "checkpoint", "--variant", "fp16", "--profile", "steps=6", "--profile", "vae=tiny")
    added = run("models", "add", "big", source, *wanted, "--project", "walls")
    assert added.exit_code == 0, added.output
    assert "checkpoint big (sdxl" in added.stdout
    assert "a note" in added.stderr
    (asked,) = [one for one in fake.asked if one.method == "POST"]
    assert orjson.loads(asked.body) == {
        "name": "big",
        "source": source,
        "variant": "fp16",
        "profile": {"steps": 6, "vae": "tiny"},
        "project": "walls",
    }
    other = {"id": "0190a0a0-0000-7000-8000-000000000003", "name": "rust", "kind": "style"}
    fake.on("POST", f"{API}/adapters", Reply(202, begun | other))
    ended = over | other | {"state": "refused", "reason": "x.safetensors: key: DoRA"}
    fake.on("GET", f"{API}/registrations/{other['id']}", Reply(body=ended))
    refused = run("models", "add", "rust", source)
    assert refused.exit_code == Exit.FAILED
    assert "x.safetensors: key: DoRA" in refused.stderr
    assert run("models", "add", "rust", source, "--no-wait").exit_code == 0
    assert run("models", "add", "rust", "nowhere").exit_code == Exit.USAGE
    assert run("models", "add", "rust", source, "--profile", "steps=many").exit_code == Exit.USAGE
