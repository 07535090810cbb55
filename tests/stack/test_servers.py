"""The embedded servers: real, closed to strangers, and gone without a trace when the block ends."""

import hashlib
import json
import socket
import stat
import time
from pathlib import Path

import psycopg
import pytest
from redis import Redis

from farm.errors import StackError
from farm.settings import Settings
from farm.stack import datadir, embedded, embedded_servers, running, settings_from, status, stop_running
from farm.stack.ports import LOOPBACK, Ports, is_free
from farm.storage import Store
from tests.stack.watching import family, identities, listening, zombies


def leftovers() -> set[Path]:
    """Sockets that a SeaweedFS of anybody left in the folder where it puts them."""
    return set(Path("/tmp").glob("seaweedfs-*.sock"))  # noqa: S108


def use_all(settings: Settings, word: str) -> None:
    """Leave a row and an object, and knock at Valkey."""
    with psycopg.connect(settings.database_url.get_secret_value()) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS words (word text)")
        connection.execute("INSERT INTO words VALUES (%s)", [word])
    store = Store(settings)
    store.ensure_bucket()
    store.put(f"words/{word}", word.encode(), "text/plain", _sha256(word))
    with Redis.from_url(settings.redis_url.get_secret_value()) as client:
        assert client.ping()


def found(settings: Settings, word: str) -> tuple[bool, str]:
    with psycopg.connect(settings.database_url.get_secret_value()) as connection:
        row = connection.execute("SELECT 1 FROM words WHERE word = %s", [word]).fetchone()
    return row is not None, Store(settings).get(f"words/{word}").decode()


def _sha256(word: str) -> str:
    return hashlib.sha256(word.encode()).hexdigest()


def test_nothing_stays_behind(data_dir: Path) -> None:
    sockets = leftovers()
    with embedded(data_dir) as settings:
        use_all(settings, "crack")
        own = identities(data_dir)
        processes = [each for name in ("postgres", "valkey", "s3") for each in family(own[name])]
        ports = [port for _, port in listening(processes)]
        assert {service["name"]: service["state"] for service in status(data_dir)} == {
            "supervisor": "healthy",
            "postgres": "healthy",
            "valkey": "healthy",
            "s3": "healthy",
        }
        assert running(data_dir) == own["supervisor"]
    assert [process for process in processes if process.is_running()] == []
    assert [port for port in ports if not is_free(port)] == []
    assert zombies() == []
    assert not [path for path in leftovers() - sockets if str(path.stem).endswith(tuple(map(str, ports)))]
    assert status(data_dir) == []
    assert running(data_dir) is None


def test_data_is_kept_also_when_the_ports_are_taken_by_others(data_dir: Path) -> None:
    with embedded(data_dir) as settings:
        use_all(settings, "kept")
    remembered = Ports(data_dir / "ports.json").remembered()
    squatters = []
    for name in ("postgres", "valkey", "s3", "master.grpc", "volume", "filer"):
        squatter = socket.socket()
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind((LOOPBACK, remembered[name]))
        squatter.listen()
        squatters.append(squatter)
    try:
        with embedded(data_dir) as moved:
            assert moved.database_url != settings.database_url
            assert moved.s3_endpoint_url != settings.s3_endpoint_url
            assert found(moved, "kept") == (True, "kept")
            use_all(moved, "more")
    finally:
        for squatter in squatters:
            squatter.close()
    with embedded(data_dir) as again:
        assert again.database_url == moved.database_url
        assert found(again, "kept") == (True, "kept")
        assert found(again, "more") == (True, "more")


def test_a_port_that_somebody_took_for_a_moment_is_left_to_them(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was free when it was chosen and is again when the server has died of it: the log alone says why it did."""
    with socket.socket() as squatter:
        squatter.bind((LOOPBACK, 0))
        squatter.listen()
        port = squatter.getsockname()[1]
        data_dir.mkdir(parents=True, exist_ok=True)
        (data_dir / "ports.json").write_text(json.dumps({"valkey": port}))
        before = iter([True])
        monkeypatch.setattr(
            "farm.stack.ports.is_free", lambda wanted: next(before, False) if wanted == port else is_free(wanted)
        )
        monkeypatch.setattr("farm.stack.servers.is_free", lambda _port: True)
        with embedded(data_dir, durable=False) as settings:
            use_all(settings, "elsewhere")
    assert Ports(data_dir / "ports.json").remembered()["valkey"] != port


def test_two_run_side_by_side(data_dir: Path) -> None:
    other = data_dir.with_name("other")
    with embedded(data_dir, durable=False) as one, embedded(other, durable=False) as two:
        use_all(one, "one")
        use_all(two, "two")
        assert found(one, "one") == (True, "one")
        with psycopg.connect(two.database_url.get_secret_value()) as connection:
            assert connection.execute("SELECT word FROM words").fetchall() == [("two",)]


def test_one_data_directory_has_one_owner(data_dir: Path) -> None:
    with (
        embedded(data_dir, durable=False),
        pytest.raises(StackError, match=r"already running .*`farm down --data-dir"),
        embedded(data_dir),
    ):
        raise AssertionError("two owners")


def test_a_server_can_be_restarted(data_dir: Path) -> None:
    with embedded_servers(data_dir) as servers:
        settings = settings_from(servers.environment())
        use_all(settings, "before")
        for service in servers.services:
            pid = service.pid
            service.restart()
            assert service.pid != pid
        assert found(settings, "before") == (True, "before")


def test_starting_again_is_quick(data_dir: Path) -> None:
    with embedded(data_dir, durable=False):
        pass
    started = time.monotonic()
    with embedded(data_dir, durable=False):
        seconds = time.monotonic() - started
    # About 0.6 s on an idle machine; tests run beside others.
    assert seconds < 10.0


def test_secrets_are_private_and_kept(data_dir: Path) -> None:
    with embedded_servers(data_dir, durable=False) as servers:
        secrets = servers.secrets
        words = [value for value in vars(secrets).values() if isinstance(value, str)]
        for service in servers.services:
            for process in family(identities(data_dir)[service.name]):
                assert not [word for word in words if word in " ".join(process.cmdline())]
    assert len(set(words)) == len(words)
    assert all(len(word) == 48 for word in words)
    assert not [word for word in words if word in repr(secrets)]
    private = [data_dir / "secrets.json", data_dir / "stack.json", data_dir / "valkey" / "valkey.conf"]
    private += [data_dir / "s3" / name for name in ("access.json", "key.pem", "certificate.pem")]
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in private if path.exists()} == {
        path.name: "0o600" for path in private if path.exists()
    }
    assert not (data_dir / "postgres" / "password").exists()
    with embedded_servers(data_dir, durable=False) as servers:
        assert servers.secrets == secrets


def test_lost_secrets_are_a_clear_error(data_dir: Path) -> None:
    with embedded(data_dir, durable=False):
        pass
    (data_dir / "secrets.json").unlink()
    with pytest.raises(StackError, match=r"secrets\.json is gone, but the database"), embedded(data_dir):
        raise AssertionError("started without its password")
    assert stop_running(data_dir) is False


def test_another_major_version_is_a_clear_error(data_dir: Path) -> None:
    with embedded(data_dir, durable=False):
        pass
    version = data_dir / "postgres" / "data" / "PG_VERSION"
    version.write_text("17\n")
    with pytest.raises(StackError, match=r"made by PostgreSQL 17.*runs PostgreSQL 18.*pg_dump"), embedded(data_dir):
        raise AssertionError("started on a foreign cluster")
    assert status(data_dir) == []
    version.write_text("18\n")
    with embedded(data_dir, durable=False):
        pass


@pytest.mark.parametrize(("limit", "value"), [("NEEDED_BYTES", 2**60), ("NEEDED_SHARE", 1.0)])
def test_a_full_disk_is_a_clear_error(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: float
) -> None:
    monkeypatch.setattr(datadir, limit, value)
    with pytest.raises(StackError, match=r"MiB free, and the farm needs at least"), embedded(data_dir):
        raise AssertionError("started on a full disk")


def test_a_data_directory_that_is_a_file_is_a_clear_error(data_dir: Path) -> None:
    data_dir.write_text("no folder")
    with pytest.raises(StackError, match="cannot use"), embedded(data_dir):
        raise AssertionError("started in a file")


def test_nothing_was_running(data_dir: Path) -> None:
    assert stop_running(data_dir) is False
    assert not data_dir.exists()
