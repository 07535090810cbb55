"""Which checkpoints stay on the device: by measured bytes within a budget, least recently used out first.

What leaves a GPU waits in host memory, within the host's own budget, and comes back without being read again. On a CPU
both are the same memory, so what leaves is forgotten.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from threading import Lock
from typing import Any, NoReturn

import torch

from farm.errors import OutOfMemory
from farm.recipe import AdapterUse
from workers.pipelines.load import Pipeline
from workers.pipelines.lru import Shelf


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


@dataclass
class Served:
    """How checkpoints were found when micro-batches asked for them: on the device, in host memory, or on disk."""

    hits: int = 0
    host: int = 0
    loads: int = 0
    load_seconds: float = 0.0


class Residents:
    """The checkpoints of one device.

    `hold` and `release` may be called from any thread; `admit` and `reserve` change what the device holds and belong
    inside the device lock.
    """

    def __init__(self, device: torch.device, budget: int, shelf: Shelf) -> None:
        """`budget` in bytes of the device; `shelf` is the host memory in which cold checkpoints wait."""
        self._device = device
        self._budget = budget
        self._shelf = shelf
        self._waits = device.type != "cpu"
        self._served = Served()
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
                    entry.pipeline = self._found(checkpoint, load)
                    entry.bytes = entry.pipeline.bytes
                else:
                    with self._lock:
                        self._served.hits += 1
        except BaseException:
            self.release(entry)
            raise
        return entry

    def release(self, entry: Entry) -> None:
        """One user less. What nobody uses and is not on the device waits in host memory, while there is room."""
        with self._lock:
            entry.users -= 1
            self._put_away(entry)

    def expect(self, checkpoint: str, bytes_: int) -> None:
        """A checkpoint of about so many bytes is about to be read: others make room for it first.

        Raises OutOfMemory if it could never fit the device.
        """
        if bytes_ > self._budget:
            self._refuse(checkpoint, f"about {bytes_:,}")
        if self._waits:
            self._shelf.make_room(bytes_)
            return
        with self._lock:
            excess = bytes_ + sum(other.bytes for other in self._entries.values() if other.on_device) - self._budget
            for other in [one for one in self._entries.values() if self._droppable(one)]:
                if excess <= 0:
                    return
                excess -= other.bytes
                self._forget(other)

    def refuse_beside(self, pipeline: Pipeline, bytes_: int) -> None:
        """Raises OutOfMemory if a checkpoint could never be on the device with so many bytes beside it."""
        if bytes_ and (need := pipeline.bare_bytes + bytes_) > self._budget:
            self._refuse(pipeline.checkpoint, f"with what goes beside it about {need:,}")

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
        gone = [other for other in idle if self._retire(other)]
        return bool(gone)

    def resident(self) -> list[Entry]:
        """Checkpoints on the device, least recently used first."""
        with self._lock:
            return [entry for entry in self._entries.values() if entry.on_device]

    @property
    def bytes(self) -> int:
        """Measured bytes of everything on the device."""
        return sum(entry.bytes for entry in self.resident())

    def told(self) -> dict[str, Any]:
        """How checkpoints were found so far, and how much of the device's budget they take."""
        with self._lock:
            served = asdict(self._served)
        asked = served["hits"] + served["host"] + served["loads"]
        return {
            "checkpoints": {
                **served,
                "load_seconds": round(served["load_seconds"], 3),
                "hit_rate": round(served["hits"] / asked, 4) if asked else None,
            },
            "device_bytes": self.bytes,
            "device_budget": self._budget,
        }

    def _make_room(self, entry: Entry, need: int) -> None:
        """Evict others, least recently used first, until `need` bytes for `entry` are within the budget.

        One that another thread staged goes last, and stays in host memory until that micro-batch is rendered. On a CPU
        that frees nothing, so there it stays and the budget is passed for so long.
        """
        if need > self._budget:
            self._refuse(entry.checkpoint, f"{need:,}")
        with self._lock:
            others = [other for other in self._entries.values() if other is not entry and other.on_device]
            excess = need + sum(other.bytes for other in others) - self._budget
            idle = [one for one in others if self._droppable(one)]
        for other in idle:
            if excess > 0 and self._retire(other):
                excess -= other.bytes
        for other in others:
            if excess > 0 and self._waits and other.on_device:
                with other.loading:
                    other.loaded.park(self._shelf.limit)
                    with self._lock:
                        other.on_device = False
                        # Its micro-batch may have been given up meanwhile.
                        self._put_away(other)
                excess -= other.bytes

    @staticmethod
    def _droppable(entry: Entry) -> bool:
        return entry.on_device and entry.users <= 0

    def _retire(self, entry: Entry) -> bool:
        """From the device, to wait in host memory or to be forgotten. False where a thread began to use it."""
        with entry.loading:
            with self._lock:
                if not self._droppable(entry):
                    return False
                if not self._waits:
                    self._forget(entry)
                    return True
            entry.loaded.park(self._shelf.limit)
            with self._lock:
                entry.on_device = False
                self._put_away(entry)
        return True

    def _put_away(self, entry: Entry) -> None:
        """Under the lock: what nobody uses and is not on the device waits on the shelf, unless it is larger."""
        if entry.users <= 0 and not entry.on_device and self._entries.get(entry.checkpoint) is entry:
            del self._entries[entry.checkpoint]
            if self._waits and entry.pipeline is not None and (size := entry.pipeline.host_bytes) <= self._shelf.limit:
                self._shelf.put(("checkpoint", entry.checkpoint), entry.pipeline, size)

    def _found(self, checkpoint: str, load: Callable[[], Pipeline]) -> Pipeline:
        waiting: Pipeline | None = self._shelf.pop(("checkpoint", checkpoint))
        loaded = waiting or load()
        with self._lock:
            self._served.host += waiting is not None
            self._served.loads += waiting is None
            self._served.load_seconds += loaded.load_seconds if waiting is None else 0.0
        return loaded

    def _forget(self, entry: Entry) -> None:
        entry.on_device = False
        self._entries.pop(entry.checkpoint, None)

    def _refuse(self, checkpoint: str, need: str) -> NoReturn:
        raise OutOfMemory(
            f"checkpoint {checkpoint[:12]} needs {need} bytes, the device budget is {self._budget:,}",
            checkpoint=checkpoint,
        )
