"""What a process keeps of the catalogue is what the database holds, whoever changed it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from uuid import UUID

import pytest

from farm.catalogue import Kept
from farm.db import Database
from farm.ids import new_id
from farm.modelfiles import FoundModel
from farm.queries import keys
from farm.queries import models as rows
from farm.settings import Settings
from farm.storage import Store

OTHER_PROCESS = """
import sys
from farm.db import Database
from farm.modelfiles import FoundModel
from farm.queries import models as rows
from farm.settings import Settings
with Database(Settings()).transaction() as conn:
    found = FoundModel(hash="b" * 64, family="crack-tiny", bytes=1, files=(), profile={}, source={})
    rows.insert(conn, name=sys.argv[1], kind="style", found=found)
"""


class Reader:
    """A process that keeps the catalogue, with connections of its own."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self.database = Database(settings, pool_size=1)
        self.kept = Kept(store)
        self.project = new_id()

    def adapters(self, project: UUID | None = None) -> list[str]:
        with self.database.transaction() as conn:
            return sorted(self.kept.load(conn, project or self.project).adapters)

    def add(self, name: str, mark: str = "a", project: UUID | None = None) -> None:
        with self.database.transaction() as conn:
            found = FoundModel(hash=mark * 64, family="crack-tiny", bytes=1, files=(), profile={}, source={})
            rows.insert(conn, name=name, kind="style", found=found, project_id=project)

    def hash_of(self, name: str) -> str:
        with self.database.transaction() as conn:
            return self.kept.load(conn, self.project).adapters[name].hash


@pytest.fixture
def two(settings: Settings, store: Store) -> Iterator[tuple[Reader, Reader]]:
    readers = (Reader(settings, store), Reader(settings, store))
    yield readers
    for reader in readers:
        reader.database.dispose()


def test_processes_see_what_the_other_registers_at_once(two: tuple[Reader, Reader], settings: Settings) -> None:
    one, other = two
    assert one.adapters() == other.adapters() == []
    one.add("moss")
    assert one.adapters() == other.adapters() == ["moss"]
    other.add("night")
    assert one.adapters() == other.adapters() == ["moss", "night"]
    environment = {
        **os.environ,
        "FARM_DATABASE_URL": settings.database_url.get_secret_value(),
        "FARM_REDIS_URL": settings.redis_url.get_secret_value(),
    }
    subprocess.run([sys.executable, "-c", OTHER_PROCESS, "rust"], env=environment, check=True)
    assert one.adapters() == other.adapters() == ["moss", "night", "rust"]


def test_a_name_that_changes_hands_is_noticed(two: tuple[Reader, Reader]) -> None:
    one, other = two
    one.add("moss", "a")
    assert other.hash_of("moss") == "a" * 64
    with one.database.transaction() as conn:
        rows.remove(conn, "moss")
        found = FoundModel(hash="c" * 64, family="crack-tiny", bytes=1, files=(), profile={}, source={})
        rows.insert(conn, name="moss", kind="style", found=found)
    assert other.hash_of("moss") == "c" * 64
    with one.database.transaction() as conn:
        rows.remove(conn, "moss")
    assert other.adapters() == []


def test_each_project_gets_what_all_share_and_its_own(two: tuple[Reader, Reader]) -> None:
    one, other = two
    with one.database.transaction() as conn:
        ours, theirs = (keys.ensure_project(conn, new_id(), name) for name in ("ours", "theirs"))
    one.add("moss")
    one.add("rust", "b", ours)
    other.add("night", "c", theirs)
    assert one.adapters(ours) == ["moss", "rust"]
    assert one.adapters(theirs) == ["moss", "night"]
    assert other.adapters(new_id()) == ["moss"]


def test_what_is_not_committed_is_not_seen(two: tuple[Reader, Reader]) -> None:
    one, other = two
    other.adapters()

    with one.database.engine.connect() as conn:
        found = FoundModel(hash="a" * 64, family="crack-tiny", bytes=1, files=(), profile={}, source={})
        rows.insert(conn, name="moss", kind="style", found=found)
        assert sorted(one.kept.load(conn, one.project).adapters) == ["moss"]
        assert other.adapters() == []
        conn.rollback()
    assert one.adapters() == other.adapters() == []


def test_nothing_is_read_twice(two: tuple[Reader, Reader], monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = two
    one.add("moss")
    one.adapters()

    def available(_: object) -> list[object]:
        raise AssertionError("the catalogue was read again")

    monkeypatch.setattr(rows, "available", available)
    assert one.adapters() == ["moss"]
    assert one.adapters(new_id()) == ["moss"], "nor for another project"
    other.add("night")
    with pytest.raises(AssertionError):
        one.adapters()
