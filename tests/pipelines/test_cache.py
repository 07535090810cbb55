"""What stays on the device, in which order it goes, and what never goes."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from farm.errors import InvalidModel, OutOfMemory
from workers.pipelines.cache import Entry, Residents
from workers.pipelines.engine import Engine
from workers.pipelines.load import Pipeline, estimate, load
from workers.pipelines.lru import Lru, Shelf

from .conftest import Fetch, farm_settings, go_on, recipe

CPU = torch.device("cpu")


class Bench:
    """Residents with room for `room` toy checkpoints, and a record of what was loaded."""

    def __init__(self, folder: Path, budget: int) -> None:
        self.loads: list[str] = []
        self.residents = Residents(CPU, budget, Shelf(1))
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
    kept.put("a", 1, 4)
    kept.put("b", 2, 4)
    assert kept.pop("a") == 1
    assert (kept.pop("a"), kept.bytes) == (None, 4)
    kept.put("c", 3, 4)
    kept.make_room(5)
    assert kept.items() == [("c", 4)], "so that five more are within the limit"


class Moved:
    """Stands for a loaded pipeline of 10 bytes; knows where it is."""

    load_seconds = 0.5
    bytes = host_bytes = 10

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = checkpoint
        self.place = "host"
        self.parking: Callable[[], None] = lambda: None

    def move(self, device: torch.device) -> None:
        self.place = str(device)

    def park(self, room: int) -> None:
        assert room > 0
        self.parking()
        self.move(CPU)


class Gpu:
    """Residents of a device of its own with room for two, and host memory for `host` bytes."""

    def __init__(self, host: int) -> None:
        self.shelf = Shelf(host)
        self.residents = Residents(torch.device("cuda:0"), 20, self.shelf)
        self.loads: list[str] = []

    def hold(self, name: str) -> Entry:
        return self.residents.hold(name, lambda: self._read(name))

    def use(self, name: str) -> None:
        entry = self.hold(name)
        self.residents.admit(entry)
        self.residents.release(entry)

    def _read(self, name: str) -> Any:
        self.residents.expect(name, Moved.bytes)
        self.loads.append(name)
        return Moved(name)

    @property
    def waiting(self) -> list[str]:
        return [key[1] for key in self.shelf.sizes("checkpoint")]

    @property
    def resident(self) -> list[str]:
        return [entry.checkpoint for entry in self.residents.resident()]


def test_a_cold_checkpoint_waits_in_host_memory() -> None:
    gpu = Gpu(host=20)
    for name in "abc":
        gpu.use(name)
    assert (gpu.resident, gpu.waiting) == (["b", "c"], ["a"])
    gpu.use("a")
    assert (gpu.resident, gpu.waiting, gpu.loads) == (["c", "a"], ["b"], ["a", "b", "c"])
    for name in "de":
        gpu.use(name)
    assert gpu.waiting == ["c", "a"], "the least recently used left the host too"
    told = gpu.residents.told()
    assert told["checkpoints"] == {"hits": 0, "host": 1, "loads": 5, "load_seconds": 2.5, "hit_rate": 0.0}
    gpu.use("e")
    told = gpu.residents.told()
    assert told["checkpoints"]["hit_rate"] == round(1 / 7, 4)
    assert (told["device_bytes"], told["device_budget"]) == (20, 20)


def test_adapters_and_cold_checkpoints_share_the_host_budget() -> None:
    gpu = Gpu(host=25)
    gpu.shelf.put(("adapter", "x", ""), object(), 8)
    gpu.shelf.put(("adapter", "y", ""), object(), 8)
    for name in "abc":
        gpu.use(name)
    assert gpu.shelf.bytes <= 25
    assert gpu.waiting == ["a"]
    assert list(gpu.shelf.sizes("adapter")) == [("adapter", "y", "")], "room was made before the next was read"


def test_what_is_larger_than_the_host_budget_does_not_wait() -> None:
    gpu = Gpu(host=9)
    for name in "abc":
        gpu.use(name)
    assert (gpu.waiting, gpu.shelf.bytes) == ([], 0)
    gpu.use("a")
    assert gpu.loads == ["a", "b", "c", "a"]


def test_one_that_is_given_up_while_it_leaves_waits_too() -> None:
    """Staged by another thread, so it is only moved; let go of before that is done."""
    gpu = Gpu(host=20)
    staged, used = gpu.hold("a"), gpu.hold("b")
    gpu.residents.admit(staged)
    gpu.residents.admit(used)
    leaving: Any = staged.pipeline
    leaving.parking = lambda: gpu.residents.release(staged)
    gpu.use("c")
    assert gpu.waiting == ["a"]
    assert sorted(gpu.resident) == ["b", "c"]
    gpu.use("a")
    assert gpu.loads == ["a", "b", "c"]


def test_what_can_never_fit_is_refused_before_it_is_read() -> None:
    gpu = Gpu(host=20)
    with pytest.raises(OutOfMemory, match="needs about 21 bytes, the device budget is 20"):
        gpu.residents.expect("a", 21)


def test_one_in_use_waits_in_the_host_and_is_not_forgotten() -> None:
    gpu = Gpu(host=1)
    staged = gpu.hold("a")
    gpu.residents.admit(staged)
    second = gpu.hold("b")
    gpu.residents.admit(second)
    gpu.residents.admit(gpu.hold("c"))
    assert gpu.resident == ["b", "c"]
    place: Any = staged.pipeline
    assert place.place == "cpu"
    gpu.residents.release(second)
    gpu.residents.admit(staged)
    assert sorted(gpu.resident) == ["a", "c"]
    assert gpu.loads == ["a", "b", "c"]


def test_a_thread_that_asks_while_it_leaves_gets_it_back() -> None:
    """Eviction and a new user meet: the checkpoint is read once."""
    gpu = Gpu(host=20)
    gpu.use("a")
    (entry,) = gpu.residents.resident()
    pipeline: Any = entry.pipeline
    started, on = threading.Event(), threading.Event()
    pipeline.parking = lambda: (started.set(), on.wait(10))
    leaving = threading.Thread(target=gpu.residents.evict_idle, args=[Entry("other")])
    leaving.start()
    assert started.wait(10)
    held: list[Entry] = []
    asking = threading.Thread(target=lambda: held.append(gpu.hold("a")))
    asking.start()
    on.set()
    leaving.join(10)
    asking.join(10)
    assert gpu.loads == ["a"]
    assert held[0].pipeline is pipeline
    gpu.residents.admit(held[0])
    assert gpu.resident == ["a"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_the_estimate_is_what_loading_takes(fetch: Fetch, model: str, dtype: torch.dtype) -> None:
    said = estimate(fetch(model), dtype, dtype)
    loaded = load(fetch(model), model, dtype, dtype).bytes
    assert 0.9 * loaded <= said <= loaded * 1.05


def test_a_cpu_makes_room_before_it_reads(bench: Bench, pipeline: Pipeline) -> None:
    for name in "ab":
        bench.use(name)
    bench.residents.expect("c", pipeline.bytes)
    assert bench.resident == ["b"]


def test_an_engine_tells_how_its_cache_serves(engine: Engine) -> None:
    style = [{"hash": "style", "weight": 1.0}]
    for adapters in (style, [], style):
        recipes = [recipe(steps=1, adapters=adapters)]
        engine.render(engine.stage(recipes), recipes, go_on)
    told = engine.cache()
    assert told["checkpoints"]["hit_rate"] == round(2 / 3, 4)
    assert told["checkpoints"]["loads"] == 1
    assert told["checkpoints"]["load_seconds"] > 0
    kept = {name: told["adapters"][name] for name in ("kept", "hits", "reads", "hit_rate")}
    assert kept == {"kept": 1, "hits": 1, "reads": 1, "hit_rate": 0.5}
    assert told["host_bytes"] == told["adapters"]["bytes"] > 0
    assert 0 < told["device_bytes"] < told["device_budget"]
    assert told["waiting"] == []
