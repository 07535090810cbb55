"""The farm of this machine: its settings, its status, and a command line that loads little."""

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import orjson
import psutil
import pytest
import typer
from typer.core import TyperGroup

from farm.cli import app, display, local, options, render
from farm.cli.exits import Exit
from farm.errors import InvalidRequest, Unavailable
from farm.settings import Settings
from tests.cli.conftest import Run
from tests.client.fake import FakeFarm, page


def commands(group: TyperGroup, *path: str) -> set[str]:
    """Everything a person can type below `group`."""
    found = set()
    for name, command in group.commands.items():
        found |= commands(command, *path, name) if isinstance(command, TyperGroup) else {" ".join([*path, name])}
    return found


COMMANDS = commands(typer.main.get_group(app.app))
TRAINING = {"train lora", "train lcm-lora"}
NO_JSON = {"up", "api", "worker", "sweeper", "flower"} | TRAINING
"""Commands that run until they are stopped, and those whose reports are files."""
NO_FARM = {"version"} | TRAINING
"""Commands that speak of no farm: training works on folders."""
VARIABLES = {
    "FARM_DATABASE_URL": "postgresql://farm:a-real-secret@127.0.0.1:1/farm",
    "FARM_REDIS_URL": "redis://:a-real-secret@127.0.0.1:1/0",
}
WORKER = {
    "id": "0190a0a0-0000-7000-8000-000000000001",
    "pool": "default",
    "name": "here/cpu",
    "host": "here",
    "pid": 7,
    "device": "cpu",
    "version": "1",
    "state": "idle",
    "started_at": "2030-01-01T00:00:00Z",
    "heartbeat_at": "2030-01-01T00:00:00Z",
    "running": 0,
    "warm": [{"checkpoint": "crack-tiny", "hash": "a" * 64, "bytes": 5_000_000}],
    "cache": {
        "checkpoints": {"hits": 3, "host": 0, "loads": 1, "load_seconds": 1.5, "hit_rate": 0.75},
        "adapters": {"kept": 2, "bytes": 1024, "hits": 1, "reads": 1, "hit_rate": 0.5},
        "waiting": [{"checkpoint": "other", "hash": "b" * 64, "bytes": 2048}],
        "device_bytes": 5_000_000,
        "device_budget": 4 * 1024**3,
        "host_bytes": 3072,
        "host_budget": 1024**3,
    },
    "resting": [
        {
            "of": "lane",
            "hash": "c" * 64,
            "checkpoint": "crack-tiny",
            "failures": 4,
            "code": "out-of-memory",
            "seconds": 72.5,
        }
    ],
}
CHECKPOINT = {
    "name": "crack-tiny",
    "hash": "a" * 64,
    "family": "crack-tiny",
    "state": "available",
    "bytes": 5_000_000,
    "profile": {},
    "created_at": "2030-01-01T00:00:00Z",
}


@pytest.mark.parametrize("module", [display, options, render])
def test_examples_in_docstrings(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]


def test_help_loads_nothing_heavy() -> None:
    heavy = "'torch', 'celery', 'kombu', 'boto3', 'fastapi', 'sqlalchemy', 'numpy', 'PIL', 'httpx'"
    code = f"import sys, farm.cli.app; sys.exit(str([name for name in ({heavy}) if name in sys.modules] or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


@pytest.mark.parametrize("path", sorted(COMMANDS))
def test_every_command_explains_itself(run: Run, path: str) -> None:
    result = run(*path.split(), "--help")
    assert result.exit_code == 0
    assert ("--data-dir" in result.stdout) == (path not in NO_FARM)
    assert ("--json" in result.stdout) == (path not in NO_JSON)


def test_the_exceptions_are_commands() -> None:
    """Those of a group are found too, and an exception that is none any more goes."""
    assert {"up", "models add", "keys create"} | NO_FARM | NO_JSON <= COMMANDS


def test_settings_of_a_running_farm_come_from_its_data_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("FARM_")]:
        monkeypatch.delenv(name)
    with pytest.raises(Unavailable, match="farm up"):
        local.settings(tmp_path)
    (tmp_path / "environment.json").write_text(json.dumps(VARIABLES))
    assert isinstance(local.settings(tmp_path), Settings)
    monkeypatch.setenv("FARM_API_PORT", "18000")
    monkeypatch.setenv("FARM_REDIS_URL", "redis://:elsewhere@redis:6379/0")
    found = local.settings(tmp_path)
    assert found.api_port == 18000, "what is set by hand counts"
    assert "127.0.0.1" in found.redis_url.get_secret_value(), "but servers are those of one farm"
    monkeypatch.delenv("FARM_REDIS_URL")
    monkeypatch.setenv("FARM_DATABASE_URL", "postgresql://farm:elsewhere@db:5432/farm")
    with pytest.raises(InvalidRequest) as raised:
        local.settings(tmp_path)
    assert raised.value.problems == [{"field": "FARM_REDIS_URL", "problem": "Field required"}], (
        "no mixture of two farms"
    )


def test_status_tells_who_is_really_there(run: Run, fake: FakeFarm) -> None:
    me = psutil.Process()
    services = [
        {"name": "api", "pid": me.pid, "created": me.create_time(), "address": "http://x", "state": "healthy"},
        {"name": "worker", "pid": me.pid, "created": 1.0, "address": "cpu", "state": "healthy"},
    ]
    Path(".farm").mkdir()
    Path(".farm/stack.json").write_text(json.dumps(services))
    fake.on("GET", "/api/v1/queue", page())
    fake.on("GET", "/api/v1/workers", page(WORKER))
    fake.on("GET", "/api/v1/checkpoints", page(CHECKPOINT))
    result = run("status", "--json")
    assert result.exit_code == 0, result.output
    assert orjson.loads(result.stdout) == {
        "services": [
            {"name": "api", "pid": me.pid, "address": "http://x", "state": "healthy"},
            {"name": "worker", "pid": None, "address": "cpu", "state": "stopped"},
        ],
        "lanes": [],
        "workers": [WORKER],
    }
    shown = run("status").stdout
    assert "The queue is empty." in shown
    assert "crack-tiny (4.8 MiB)" in shown
    for words in (
        "4.8 MiB of 4.0 GiB",
        "3.0 KiB of 1.0 GiB",
        "other (2.0 KiB)",
        "75%",
        "1.5 s",
        "50%",
        "cccccccc ",
        "out-of-memory",
        "1 min 12 s",
    ):
        assert words in shown


def test_status_of_an_unreachable_farm_shows_what_is_known(run: Run, fake: FakeFarm) -> None:
    result = run("status", "--json")
    assert orjson.loads(result.stdout) == {"services": [], "lanes": None, "workers": None}
    assert result.exit_code == Exit.NOT_FOUND, "the fake has no such route"
    assert "empty" not in run("status").stdout, "not to be reached is not to have nothing"


@pytest.mark.parametrize("command", ["up", "down", "status"])
@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_data_directory_is_refused(run: Run, command: str, empty: str) -> None:
    """`--data-dir "$DIR"` with nothing in it would mean the folder we are in."""
    result = run(command, "--data-dir", empty)
    assert result.exit_code == 2
    assert "is empty" in result.stderr
    assert list(Path().iterdir()) == []


def test_down_where_nothing_runs(run: Run) -> None:
    result = run("down", "--data-dir", "nothing-here")
    assert result.exit_code == 0
    assert "No farm was running" in result.stdout
    assert orjson.loads(run("down", "--data-dir", "nothing-here", "--json").stdout) == {"was_running": False}


def test_version(run: Run) -> None:
    assert set(orjson.loads(run("version", "--json").stdout)) == {"version"}
    assert run("version").stdout.strip()


def test_parts_need_to_know_their_farm(run: Run) -> None:
    for part in ("api", "worker", "sweeper", "flower", "migrate"):
        result = run(part)
        assert result.exit_code == Exit.UNREACHABLE
        assert "FARM_DATABASE_URL" in result.stderr
