"""What stays on the device, in which order it goes, and what never goes."""

import threading
from pathlib import Path

import pytest
import torch

from farm.errors import InvalidModel, OutOfMemory
from workers.pipelines.cache import Entry, Residents
from workers.pipelines.engine import Engine
from workers.pipelines.load import Pipeline, load
from workers.pipelines.lru import Lru

from .conftest import Fetch, farm_settings, go_on, recipe

CPU = torch.device("cpu")


class Bench:
    """Residents with room for `room` toy checkpoints, and a record of what was loaded."""

    def __init__(self, folder: Path, budget: int) -> None:
        self.loads: list[str] = []
        self.residents = Residents(CPU, budget)
        self._folder = folder

    def hold(self, name: str) -> Entry:
        return self.residents.hold(name, lambda: self._read(name))

    def use(self, name: str) -> None:
        """Held, put on the device, let go."""
        entry = self.hold(name)
        self.residents.admit(entry)
        self.residents.release(entry)

    @property
    def resident(self) -> list[str]:
        return [entry.checkpoint for entry in self.residents.resident()]

    def _read(self, name: str) -> Pipeline:
        self.loads.append(name)
        return load(self._folder, name, torch.float32, torch.float32)


@pytest.fixture
def bench(sd_folder: Path, pipeline: Pipeline) -> Bench:
    return Bench(sd_folder, 2 * pipeline.bytes)


def test_least_recently_used_goes_first(bench: Bench, pipeline: Pipeline) -> None:
    for name in ("a", "b", "a", "c"):
        bench.use(name)
    assert bench.resident == ["a", "c"]
    assert bench.loads == ["a", "b", "c"]
    assert bench.residents.bytes == 2 * pipeline.bytes
    bench.use("b")
    assert bench.resident == ["c", "b"]


def test_one_in_use_never_goes(bench: Bench) -> None:
    held = bench.hold("a")
    bench.residents.admit(held)
    for name in ("b", "c", "d"):
        bench.use(name)
    assert bench.resident[0] == "a"
    bench.residents.release(held)
    bench.use("b")
    assert bench.resident == ["d", "b"]


def test_staged_and_dropped_without_rendering(bench: Bench) -> None:
    bench.residents.release(bench.hold("a"))
    assert bench.resident == []
    bench.use("a")
    assert bench.loads == ["a", "a"]


def test_two_threads_load_once(bench: Bench) -> None:
    start = threading.Barrier(4)

    def hold() -> None:
        start.wait()
        bench.hold("a")

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bench.loads == ["a"]
    assert bench.hold("a").users == 5


def test_a_failed_load_leaves_nothing(bench: Bench) -> None:
    def fail() -> Pipeline:
        raise InvalidModel("broken")

    with pytest.raises(InvalidModel):
        bench.residents.hold("a", fail)
    assert bench.hold("a").users == 1


def test_larger_than_the_budget(sd_folder: Path, pipeline: Pipeline) -> None:
    small = Bench(sd_folder, pipeline.bytes - 1)
    with pytest.raises(OutOfMemory, match=r"needs [\d,]+ bytes, the device budget is"):
        small.residents.admit(small.hold("a"))


def test_pristine_copies_count(fetch: Fetch, sd_folder: Path, engine: Engine) -> None:
    """Two bare checkpoints fit; with one of them merged, the other has to go."""
    bare = [recipe(steps=1)]
    engine.render(engine.stage(bare), bare, go_on)
    size = engine.warm()[0]["bytes"]
    places = {"sd": sd_folder, "other": sd_folder}
    tight = Engine(
        farm_settings(device_budget_bytes=2 * size + 1000),
        lambda name: places[name] if name in places else fetch(name),
    )
    for checkpoint in places:
        bare = [recipe(steps=1, checkpoint=checkpoint)]
        tight.render(tight.stage(bare), bare, go_on)
    assert tight.warm_state().checkpoints == {"sd", "other"}
    merged = [recipe(steps=1, checkpoint="other", acceleration={"hash": "fast", "weight": 1.0})]
    tight.render(tight.stage(merged), merged, go_on)
    assert tight.warm_state().checkpoints == {"other"}
    (warm,) = tight.warm()
    assert warm["bytes"] == size + warm["pristine_bytes"] > size


def test_things_kept_by_bytes() -> None:
    kept: Lru[str, int] = Lru(10)
    kept.put("a", 1, 4)
    kept.put("b", 2, 4)
    assert kept.get("a") == 1
    kept.put("c", 3, 4)
    assert (kept.get("b"), kept.bytes, len(kept)) == (None, 8, 2)
    kept.put("huge", 4, 99)
    assert (kept.get("huge"), len(kept)) == (4, 1), "the newest stays, or nothing larger than the limit could be used"
    kept.put("huge", 5, 3)
    assert (kept.get("huge"), kept.bytes) == (5, 3)
    kept.clear()
    assert (kept.get("huge"), kept.bytes) == (None, 0)
