"""A supervisor killed with -9 leaves its children running; the next start, or `farm down`, ends them and only them."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from farm.stack import embedded, running, seaweed, stop_running
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


def test_sockets_of_the_dead_are_swept_and_those_of_the_living_are_not(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="s-"))  # short: a socket's path may hold 107 bytes
    monkeypatch.setattr(seaweed, "SOCKETS", folder)
    paths = {name: folder / f"seaweedfs-{name}-grpc-1.sock" for name in ("master", "volume", "filer", "s3")}
    living, *others = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for one, name in zip((living, *others), ("master", "volume", "filer"), strict=True):
        one.bind(str(paths[name]))
        one.listen()
    for one in others:
        one.close()
    paths["s3"].write_text("no socket")
    for name in ("master", "volume", "s3"):
        os.utime(paths[name], (1.0, 1.0))
    directory = DataDir(data_dir)
    directory.create()
    directory.end_orphans()
    assert {name for name, path in paths.items() if path.exists()} == {"master", "filer", "s3"}, "filer: just made"
    living.close()
    shutil.rmtree(folder)


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
