"""A fake farm and clients of it that do not dawdle between two tries."""

from collections.abc import Iterator
from datetime import timedelta

import pytest

from farm.client import Farm, flows
from tests.client.fake import FakeFarm


@pytest.fixture
def fake() -> Iterator[FakeFarm]:
    fake = FakeFarm()
    yield fake
    fake.close()


@pytest.fixture
def farm(fake: FakeFarm) -> Iterator[Farm]:
    with Farm(fake.url, "key-of-ours") as farm:
        yield farm


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "FIRST_PAUSE", timedelta(milliseconds=1))
    monkeypatch.setattr(flows, "LONGEST_PAUSE", timedelta(milliseconds=5))
    monkeypatch.setattr(flows, "POLL_FIRST", 0.001)
    for name in ("FARM_URL", "FARM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
