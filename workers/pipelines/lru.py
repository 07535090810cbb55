"""Things kept by their bytes, least recently used out first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Generic, TypeVar

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

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self.bytes = 0
