"""A supervisor killed with -9 leaves its children running; the next start, or `farm down`, ends them and only them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from farm.stack import embedded, running, stop_running
from farm.stack.datadir import DataDir
from farm.stack.processes import Identity
from tests.stack.watching import family, identities, wait_until

# Started from a second thread, so that the kernel's own parting signal, which is an extra, plays no part.
SUPERVISOR = """
import sys, threading
from pathlib import Path
from farm.stack import embedded_servers

def serve():
    with embedded_servers(Path(sys.argv[1]), durable=False) as servers:
        print(servers.environment()["FARM_DATABASE_URL"], flush=True)
        threading.Event().wait()

threading.Thread(target=serve).start()
"""


@pytest.fixture
def killed(data_dir: Path) -> Iterator[dict[str, Identity]]:
    """The servers of a supervisor that was just killed with -9."""
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(data_dir)], stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE kept ()")
    assert running(data_dir) == Identity.of(process.pid)
    left = identities(data_dir)
    process.kill()
    process.wait()
    process.stdout.close()
    del left["supervisor"]
    assert all(identity.alive for identity in left.values())
    yield left
    stop_running(data_dir)


def environment() -> dict[str, str]:
    root = str(Path(__file__).parent.parent.parent)
    return os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


def test_the_next_start_ends_them(data_dir: Path, killed: dict[str, Identity]) -> None:
    processes = [process for identity in killed.values() for process in family(identity)]
    assert running(data_dir) is None
    with embedded(data_dir, durable=False) as settings:
        assert [process for process in processes if process.is_running()] == []
        with psycopg.connect(settings.database_url.get_secret_value()) as connection:
            connection.execute("TABLE kept")


def test_down_ends_them(data_dir: Path, killed: dict[str, Identity]) -> None:
    processes = [process for identity in killed.values() for process in family(identity)]
    assert stop_running(data_dir) is True
    assert [process for process in processes if process.is_running()] == []
    assert identities(data_dir) == {}
    assert stop_running(data_dir) is False


def test_a_stranger_that_got_the_process_id_lives_on(data_dir: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    identity = Identity.of(stranger.pid)
    assert identity is not None
    directory = DataDir(data_dir)
    directory.create()
    earlier = identity.created - 60.0
    entry = {"name": "worker", "pid": stranger.pid, "created": earlier, "address": "cpu", "state": "healthy"}
    directory.write_stack([entry])  # type: ignore[list-item]
    assert stop_running(data_dir) is False
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_down_stops_a_living_supervisor(data_dir: Path) -> None:
    code = SUPERVISOR.replace("threading.Thread(target=serve).start()", "serve()")
    process = subprocess.Popen([sys.executable, "-c", code, str(data_dir)], stdout=subprocess.PIPE, env=environment())
    assert process.stdout is not None
    process.stdout.readline()
    left = identities(data_dir)
    assert stop_running(data_dir) is True
    process.wait(10)
    process.stdout.close()
    wait_until(lambda: not any(identity.alive for identity in left.values()))
