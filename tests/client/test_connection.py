"""Which farm is meant, and where its key may go."""

from pathlib import Path

import orjson
import pytest

from farm.client import Farm
from farm.client.connection import CREDENTIALS, Connection, resolve
from farm.errors import InvalidRequest, Unavailable
from tests.client.fake import FakeFarm, Reply


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    (tmp_path / CREDENTIALS).write_bytes(orjson.dumps({"url": "http://127.0.0.1:8000", "api_key": "from-file"}))
    return tmp_path


def test_arguments_come_before_environment_before_file(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(None, None, data_dir) == Connection("http://127.0.0.1:8000", "from-file")
    monkeypatch.setenv("FARM_URL", "https://farm.example/")
    monkeypatch.setenv("FARM_API_KEY", "from-env")
    assert resolve(None, None, data_dir) == Connection("https://farm.example", "from-env")
    assert resolve("http://here", "given", data_dir) == Connection("http://here", "given")


def test_the_files_key_goes_to_the_files_address_only(data_dir: Path) -> None:
    assert resolve("http://elsewhere", None, data_dir).api_key is None


def test_no_farm_anywhere_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="farm up"):
        resolve(None, None, tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"url": "http://x"}'])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CREDENTIALS).write_bytes(content)
    with pytest.raises(InvalidRequest, match=CREDENTIALS):
        resolve(None, None, tmp_path)


def test_an_address_must_be_one() -> None:
    with pytest.raises(InvalidRequest, match="localhost:8000"):
        resolve("localhost:8000", "k", ".")


def test_the_key_is_not_shown() -> None:
    assert "secret" not in repr(Connection("http://x", "secret"))


def test_a_proxy_does_not_stand_before_the_farm_of_this_machine(
    fake: FakeFarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    fake.on("GET", "/api/v1/version", Reply(body={"version": "1"}))
    with Farm(fake.url, "k") as farm:
        assert farm.version() == {"version": "1"}
