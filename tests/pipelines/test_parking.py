"""Checkpoints that wait in host memory: pinned where there is a GPU, and counted as what torch takes for that."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from workers.pipelines.cache import Residents
from workers.pipelines.load import Pipeline, load
from workers.pipelines.lru import Shelf
from workers.pipelines.pinned import block

PLENTY = 1 << 40


class Pins:
    """Stands for page-locked memory where there is no GPU: remembers what was put there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks: dict[int, torch.Tensor] = {}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.Tensor, "pin_memory", self.pin)
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor.data_ptr() in self.blocks)

    @property
    def pin(self) -> Callable[[torch.Tensor], torch.Tensor]:
        def pin(tensor: torch.Tensor) -> torch.Tensor:
            copy = tensor.clone()
            self.blocks[copy.data_ptr()] = copy
            return copy

        return pin


@pytest.fixture
def pins(monkeypatch: pytest.MonkeyPatch) -> Pins:
    return Pins(monkeypatch)


def weights(pipeline: Pipeline) -> list[torch.Tensor]:
    return [tensor for module in pipeline.modules() for tensor in (*module.parameters(), *module.buffers())]


@pytest.mark.parametrize(("bytes_", "taken"), [(0, 0), (1, 1), (64, 64), (65, 128), (3 << 20, 4 << 20)])
def test_a_block_is_a_power_of_two(bytes_: int, taken: int) -> None:
    assert block(bytes_) == taken


def test_what_is_parked_is_pinned_and_counted_as_blocks(pipeline: Pipeline, pins: Pins) -> None:
    before = [tensor.clone() for tensor in weights(pipeline)]
    own = pipeline.bytes
    assert pipeline.host_bytes == own
    pipeline.park(PLENTY)
    after = weights(pipeline)
    assert len(pins.blocks) == len(after)
    assert all(tensor.is_pinned() for tensor in after)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert [one.stride() for one in before] == [one.stride() for one in after], "channels last stays"
    assert pipeline.host_bytes == sum(block(tensor.nbytes) for tensor in after)
    assert own < pipeline.host_bytes < 2 * own


def test_what_fits_only_unpinned_waits_unpinned(pipeline: Pipeline, pins: Pins) -> None:
    room = sum(block(tensor.nbytes) for tensor in weights(pipeline))
    pipeline.park(room - 1)
    assert pins.blocks == {}
    assert pipeline.host_bytes == pipeline.bytes
    pipeline.park(room)
    assert pipeline.host_bytes == room


def test_the_host_budget_counts_blocks(sd_folder: Path, pins: Pins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipeline, "move", lambda _pipeline, _device: None)
    size = load(sd_folder, "size", torch.float32, torch.float32).bytes
    shelf = Shelf(PLENTY)
    residents = Residents(torch.device("cuda:0"), size + size // 2, shelf)
    for name in ("first", "second"):
        entry = residents.hold(name, lambda name=name: load(sd_folder, name, torch.float32, torch.float32))  # type: ignore[misc]
        residents.admit(entry)
        residents.release(entry)
    assert [entry.checkpoint for entry in residents.resident()] == ["second"]
    assert shelf.sizes("checkpoint") == {("checkpoint", "first"): sum(map(block, map(bytes_of, pins.blocks.values())))}
    assert shelf.bytes > size


def bytes_of(tensor: torch.Tensor) -> int:
    return tensor.nbytes
