"""`farm up` as a whole, with a stub for the renderer: one pass through its life, as starting it takes seconds."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import httpx
import psutil
import pytest
from typer.testing import CliRunner

from farm.cli.app import app
from farm.db import Database, migrate
from farm.errors import SchemaMismatch, StackError
from farm.stack import embedded, running, status, stop_running
from farm.stack.ports import LOOPBACK, is_free
from farm.stack.processes import Identity
from farm.stack.stack import Stack
from tests.stack.watching import family, identities, listening, wait_until

SERVICES = {"supervisor", "postgres", "valkey", "s3", "api", "worker", "sweeper", "flower"}
READY = "The farm is up at "
CODE = """
import sys
from farm.cli.app import app
from farm.stack import programs

programs.WORKER = "tests.stub_worker"
app(["up", "--data-dir", sys.argv[1], "--port", "0"])
"""


class Up:
    """A `farm up` in a process of its own."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        root = str(Path(__file__).parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-c", CODE, str(data_dir)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "FARM_DEVICE": "cpu", "STUB_STEP_SECONDS": "0.7"},
        )
        self.said: list[str] = []

    def hear(self, wanted: str) -> str:
        """Read on until a line starts with `wanted`; answers that line."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.rstrip("\n"))
            if line.startswith(wanted):
                return self.said[-1]
        raise AssertionError(f"it ended without saying {wanted!r}: {self.said}")

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def up(data_dir: Path) -> Iterator[Up]:
    started = Up(data_dir)
    yield started
    started.end()
    stop_running(data_dir)


def states(data_dir: Path) -> dict[str, str]:
    return {service["name"]: service["state"] for service in status(data_dir)}


def api(data_dir: Path) -> httpx.Client:
    """A client with the key that `farm up` wrote."""
    credentials = json.loads((data_dir / "credentials.json").read_text())
    headers = {"Authorization": f"Bearer {credentials['api_key']}"}
    return httpx.Client(base_url=f"{credentials['url']}/api/v1", headers=headers, timeout=10, trust_env=False)


def die(data_dir: Path, up: Up, *names: str) -> None:
    """Kill services with -9 and hear that each is missed."""
    there = identities(data_dir)
    for name in names:
        os.kill(there[name].pid, signal.SIGKILL)
    missed: set[str] = set()
    while missed != set(names):
        name, _, event = up.hear("").partition(": ")
        if event.startswith("ended with signal 9; starting again"):
            missed.add(name)


def vanishing(up: Up, there: Mapping[str, Identity]) -> list[set[str]]:
    """Which services went, look by look, until all of `farm up` has ended."""
    left, gone = set(there), []
    while up.process.poll() is None or left:
        if now := {name for name in left if not there[name].alive}:
            gone.append(now)
            left -= now
        time.sleep(0.005)
    return gone


@pytest.mark.timeout(300)
def test_a_whole_life(data_dir: Path, up: Up, record_property: Callable[[str, object], None]) -> None:
    assert str(data_dir / "credentials.json") in up.hear(READY)
    assert states(data_dir) == dict.fromkeys(SERVICES, "healthy")
    shown = dict(line.split(maxsplit=1) for line in up.said[:-1])
    assert shown == {service["name"]: service["address"] for service in status(data_dir)[1:]}

    # Loopback only; a key that works, in a private file; Flower behind its password.
    everything = [process for identity in identities(data_dir).values() for process in family(identity)]
    assert {address for address, _ in listening(everything)} == {LOOPBACK}
    assert stat.S_IMODE((data_dir / "credentials.json").stat().st_mode) == 0o600
    key = (data_dir / "credentials.json").read_text()
    flower = next(service["address"] for service in status(data_dir) if service["name"] == "flower")
    assert httpx.get(f"{flower}/workers").status_code == httpx.codes.UNAUTHORIZED

    # What dies comes back; a worker's jobs are taken back at once, not when their lease of 20 s runs out.
    with api(data_dir) as client:
        job = client.post("/jobs", json={"prompt": "a crack"}).raise_for_status().json()["id"]

        def state() -> tuple[str, int]:
            view = client.get(f"/jobs/{job}").raise_for_status().json()
            return view["state"], view["attempt"]

        wait_until(lambda: state() == ("running", 1))
        die(data_dir, up, "worker")
        assert state()[0] == "queued"
        assert states(data_dir)["worker"] == "restarting"
        up.hear("worker")
        wait_until(lambda: state() == ("succeeded", 2), 60)
    for names in (("postgres",), ("valkey", "s3", "api", "sweeper", "flower")):
        before = identities(data_dir)
        die(data_dir, up, *names)
        wait_until(lambda: set(states(data_dir).values()) == {"healthy"})
        after = identities(data_dir)
        assert {name for name in before if after[name] != before[name]} == set(names), "the others stayed"
    with api(data_dir) as client:
        assert client.get(f"/jobs/{job}/image", params={"redirect": False}).status_code == httpx.codes.OK

    # Killed itself, it leaves nothing that the next start does not end.
    left = identities(data_dir)
    up.process.kill()
    up.process.wait()
    started = time.monotonic()
    again = Up(data_dir)
    try:
        again.hear(READY)
        record_property("second_start_seconds", round(time.monotonic() - started, 1))
        assert not any(identity.alive for identity in left.values())
        assert (data_dir / "credentials.json").read_text() == key
        with api(data_dir) as client:
            assert client.get(f"/jobs/{job}").json()["state"] == "succeeded"

        # Ctrl-C: first what lets work in, then what works, then the servers they need until they have left.
        there = identities(data_dir)
        everything = [process for identity in there.values() for process in family(identity)]
        ports = [port for _, port in listening(everything)]
        again.process.send_signal(signal.SIGINT)
        order = vanishing(again, there)
        assert again.process.wait(10) == 0
        again.hear("The farm has stopped.")
        place = {name: number for number, names in enumerate(order) for name in names}
        parts = {place[name] for name in ("worker", "sweeper", "flower")}
        servers = {place[name] for name in ("s3", "valkey", "postgres")}
        assert 0 == place["api"] < min(parts)
        assert max(parts) < min(servers)
        assert max(servers) <= place["supervisor"]
        assert psutil.wait_procs(everything, timeout=1)[1] == []
        assert [port for port in ports if not is_free(port)] == []
        assert status(data_dir) == []
        assert running(data_dir) is None
    finally:
        again.end()


def test_stopped_while_starting(data_dir: Path, up: Up) -> None:
    """By `farm down`, which asks `farm up` as Ctrl-C does and waits for it."""
    up.hear("postgres")
    left = identities(data_dir)
    down = CliRunner().invoke(app, ["down", "--data-dir", str(data_dir), "--json"])
    assert json.loads(down.stdout) == {"was_running": True}
    assert up.process.wait(10) == 0
    up.hear("The farm has stopped.")
    assert not any(line.startswith(READY) for line in up.said)
    assert not any(identity.alive for identity in left.values())
    assert status(data_dir) == []


def test_a_newer_schema_is_a_clear_error(data_dir: Path) -> None:
    with embedded(data_dir, durable=False) as settings:
        migrate(settings)
        database = Database(settings)
        with database.transaction() as conn:
            conn.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
        database.dispose()
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with pytest.raises(SchemaMismatch, match=r"schema 9999, newer than this farm's .*upgrade the farm"):
        Stack(data_dir, 0).up()
    assert {process.pid for process in psutil.Process().children(recursive=True)} == before
    assert status(data_dir) == []


def test_a_port_in_use_is_a_clear_error(data_dir: Path) -> None:
    with socket.socket() as holder:
        holder.bind((LOOPBACK, 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(
            StackError, match=rf"port {port} on 127.0.0.1 is in use \(by .*process {os.getpid()}\).*--port"
        ):
            Stack(data_dir, port).up()
    assert running(data_dir) is None
