"""Things kept by their bytes, least recently used out first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Lru(Generic[K, V]):
    """At most `limit` bytes; the newest entry stays even if it alone is larger. Safe to share between threads."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._lock = Lock()
        self._kept: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: K) -> V | None:
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                return None
            self._kept.move_to_end(key)
            return found[0]

    def put(self, key: K, value: V, size: int) -> None:
        """Keep `value`, which takes `size` bytes."""
        with self._lock:
            replaced = self._kept.pop(key, None)
            self.bytes += size - (replaced[1] if replaced else 0)
            self._kept[key] = (value, size)
            while self.bytes > self.limit and len(self._kept) > 1:
                _, (_, dropped) = self._kept.popitem(last=False)
                self.bytes -= dropped

    def pop(self, key: K) -> V | None:
        """Let go of one thing and answer it."""
        with self._lock:
            found = self._kept.pop(key, None)
            if found is None:
                return None
            self.bytes -= found[1]
            return found[0]

    def make_room(self, size: int) -> None:
        """Let go of what was used longest ago until `size` more bytes are within the limit, or nothing is left."""
        with self._lock:
            while self._kept and self.bytes + size > self.limit:
                _, (_, dropped) = self._kept.popitem(last=False)
                self.bytes -= dropped

    def items(self) -> list[tuple[K, int]]:
        """Everything kept with its bytes, least recently used first."""
        with self._lock:
            return [(key, size) for key, (_, size) in self._kept.items()]

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self.bytes = 0


class Shelf(Lru[tuple[str, ...], Any]):
    """Host memory for what is not on the device: keys begin with `adapter` or `checkpoint`, one budget for both."""

    def sizes(self, kind: str) -> dict[tuple[str, ...], int]:
        """Bytes of everything kept of one kind, least recently used first."""
        return {key: size for key, size in self.items() if key[0] == kind}
