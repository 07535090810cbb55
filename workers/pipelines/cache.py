"""Which checkpoints stay on the device: by measured bytes within a budget, least recently used out first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

import torch

from farm.errors import OutOfMemory
from farm.recipe import AdapterUse
from workers.pipelines.load import Pipeline


@dataclass(eq=False)
class Entry:
    """A checkpoint in memory. `users` counts the micro-batches staged on it; `bytes` was measured.

    `acceleration` and `adapter_set` say what is merged into it.
    """

    checkpoint: str
    loading: Lock = field(default_factory=Lock)
    pipeline: Pipeline | None = None
    users: int = 0
    on_device: bool = False
    bytes: int = 0
    renders: int = 0
    acceleration: AdapterUse | None = None
    adapter_set: str = ""

    @property
    def loaded(self) -> Pipeline:
        assert self.pipeline is not None  # noqa: S101  # hold() answers only after loading
        return self.pipeline


class Residents:
    """The checkpoints of one device.

    `hold` and `release` may be called from any thread; `admit` and `reserve` change what the device holds and belong
    inside the device lock.
    """

    def __init__(self, device: torch.device, budget: int) -> None:
        self._device = device
        self._budget = budget
        self._lock = Lock()
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def hold(self, checkpoint: str, load: Callable[[], Pipeline]) -> Entry:
        """Load a checkpoint into host memory unless it is there, and count one more user. Two threads that ask for
        the same checkpoint load it once."""
        with self._lock:
            entry = self._entries.setdefault(checkpoint, Entry(checkpoint))
            entry.users += 1
        try:
            with entry.loading:
                if entry.pipeline is None:
                    entry.pipeline = load()
                    entry.bytes = entry.pipeline.bytes
        except BaseException:
            self.release(entry)
            raise
        return entry

    def release(self, entry: Entry) -> None:
        """One user less. What nobody uses stays only if it is on the device."""
        with self._lock:
            entry.users -= 1
            if entry.users <= 0 and not entry.on_device and self._entries.get(entry.checkpoint) is entry:
                del self._entries[entry.checkpoint]

    def admit(self, entry: Entry) -> None:
        """Put a held checkpoint on the device, making room first. Raises OutOfMemory if it cannot fit alone."""
        with self._lock:
            self._entries.move_to_end(entry.checkpoint)
        entry.bytes = entry.loaded.bytes
        if not entry.on_device:
            self._make_room(entry, entry.bytes)
            try:
                entry.loaded.move(self._device)
            except BaseException:
                entry.loaded.move(torch.device("cpu"))
                raise
            with self._lock:
                entry.on_device = True

    def reserve(self, entry: Entry, extra: int) -> None:
        """Make room for `extra` more bytes of a checkpoint that is on the device, by evicting others."""
        if extra:
            self._make_room(entry, entry.loaded.bytes + extra)

    def evict_idle(self, keep: Entry) -> bool:
        """Drop everything but `keep` that nobody uses. Answers whether anything went."""
        with self._lock:
            idle = [other for other in self._entries.values() if other is not keep and self._droppable(other)]
            for other in idle:
                self._drop(other)
        return bool(idle)

    def resident(self) -> list[Entry]:
        """Checkpoints on the device, least recently used first."""
        with self._lock:
            return [entry for entry in self._entries.values() if entry.on_device]

    @property
    def bytes(self) -> int:
        """Measured bytes of everything on the device."""
        return sum(entry.bytes for entry in self.resident())

    def _make_room(self, entry: Entry, need: int) -> None:
        """Evict others, least recently used first, until `need` bytes for `entry` are within the budget.

        A checkpoint that another thread staged is never dropped: it waits in host memory instead. On a CPU that frees
        nothing, so there it stays and the budget is passed until that micro-batch is rendered.
        """
        if need > self._budget:
            raise OutOfMemory(
                f"checkpoint {entry.checkpoint[:12]} needs {need:,} bytes, the device budget is {self._budget:,}",
                checkpoint=entry.checkpoint,
            )
        with self._lock:
            others = [other for other in self._entries.values() if other is not entry and other.on_device]
            excess = need + sum(other.bytes for other in others) - self._budget
            for other in [one for one in others if self._droppable(one)]:
                if excess <= 0:
                    return
                excess -= other.bytes
                self._drop(other)
            if excess <= 0 or self._device.type == "cpu":
                return
            waiting = [other for other in others if other.on_device and other.users > 0]
        for other in waiting:
            if excess > 0:
                other.loaded.move(torch.device("cpu"))
                other.on_device = False
                excess -= other.bytes

    @staticmethod
    def _droppable(entry: Entry) -> bool:
        return entry.on_device and entry.users <= 0

    def _drop(self, entry: Entry) -> None:
        entry.on_device = False
        self._entries.pop(entry.checkpoint, None)
