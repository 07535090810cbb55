"""What micro-batches are rendered with, read once and kept: checkpoints, VAEs and adapters by content hash."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import structlog

from farm.recipe import AdapterUse
from workers.pipelines.adapters import read_adapter
from workers.pipelines.cache import Entry, Residents
from workers.pipelines.device import Device
from workers.pipelines.factors import Adapter, Use
from workers.pipelines.load import Pipeline, estimate, estimate_part, load, load_net, load_vae
from workers.pipelines.lru import Shelf
from workers.pipelines.targets import aliases
from workers.pipelines.upsample import merge_upsampling

log = structlog.get_logger(__name__)


class Library:
    """Reads models from local files and keeps what was read within the host's budget. Any thread, any time."""

    def __init__(self, device: Device, residents: Residents, shelf: Shelf, fetch: Callable[[str], Path]) -> None:
        """`fetch(hash)` answers the verified local folder or file of a checkpoint, VAE or adapter."""
        self._device, self._residents, self._shelf, self._fetch = device, residents, shelf, fetch
        self._lock = Lock()
        self._hits = self._reads = 0

    def hold(self, checkpoint: str) -> Entry:
        """A checkpoint in memory, counted as in use until it is released."""
        return self._residents.hold(checkpoint, lambda: self._load(checkpoint))

    def vae(self, vae: str, pipeline: Pipeline) -> Any:
        """A VAE that replaces a checkpoint's own, in host memory."""
        return self._tuned(load_vae(self._fetch(vae), pipeline.family, pipeline.unet.dtype, self._device.vae_dtype))

    def nets(self, wanted: Sequence[str], pipeline: Pipeline) -> dict[str, Any]:
        """ControlNets and motion adapters by hash, those not yet at this checkpoint read into host memory.

        Raises OutOfMemory, before any is read, when they can never fit the device beside the checkpoint.
        """
        folders = {hash_: self._fetch(hash_) for hash_ in wanted}
        sizes = [estimate_part(folder, pipeline.unet.dtype) for folder in folders.values()]
        self._residents.refuse_beside(pipeline, sum(sizes))
        known = dict(pipeline.nets)
        return {hash_: known.get(hash_) or load_net(folder, pipeline.unet.dtype) for hash_, folder in folders.items()}

    def uses(self, wanted: Sequence[AdapterUse], pipeline: Pipeline) -> tuple[Use, ...]:
        """Adapters parsed for pipelines of this structure, at their weights."""
        return tuple((self._adapter(use.hash, pipeline), use.weight) for use in wanted)

    def told(self) -> dict[str, Any]:
        """How often adapters were found parsed, how many are kept and what takes how much of the host's budget."""
        adapters = self._shelf.sizes("adapter")
        waiting = self._shelf.sizes("checkpoint")
        asked = self._hits + self._reads
        return {
            "adapters": {
                "kept": len(adapters),
                "bytes": sum(adapters.values()),
                "hits": self._hits,
                "reads": self._reads,
                "hit_rate": round(self._hits / asked, 4) if asked else None,
            },
            "waiting": [{"checkpoint": key[1], "bytes": bytes_} for key, bytes_ in waiting.items()],
            "host_bytes": self._shelf.bytes,
            "host_budget": self._shelf.limit,
        }

    def _load(self, checkpoint: str) -> Pipeline:
        folder = self._fetch(checkpoint)
        # Before a single weight is read: refused if it can never fit, and others leave first if it can.
        dtype = self._device.dtype_of(folder)
        self._residents.expect(checkpoint, estimate(folder, dtype, self._device.vae_dtype))
        pipeline = load(folder, checkpoint, dtype, self._device.vae_dtype)
        self._tuned(pipeline.vae)
        log.info(
            "checkpoint loaded", checkpoint=checkpoint, seconds=round(pipeline.load_seconds, 3), bytes=pipeline.bytes
        )
        return pipeline

    def _tuned(self, vae: Any) -> Any:
        if self._device.on_cpu:
            merge_upsampling(vae)
        return vae

    def _adapter(self, adapter: str, pipeline: Pipeline) -> Adapter:
        key = ("adapter", adapter, pipeline.structure)
        found: Adapter | None = self._shelf.get(key)
        with self._lock:
            self._hits += found is not None
            self._reads += found is None
        if found is None:
            shapes = pipeline.merger.shapes
            found = read_adapter(self._fetch(adapter), adapter, shapes, aliases(shapes))
            self._shelf.put(key, found, found.bytes)
        return found
