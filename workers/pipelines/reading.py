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
from workers.pipelines.load import Pipeline, estimate, estimate_part, load, load_net, load_vae, weighed
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

    def beside(self, nets: Sequence[str], vae: str | None, pipeline: Pipeline) -> tuple[dict[str, Any], dict[str, Any]]:
        """By hash, ControlNets and motion adapters, and the VAE that replaces the checkpoint's own; those not yet at
        this checkpoint are read into host memory.

        Raises OutOfMemory, before any is read, when they can never fit the device beside the checkpoint.
        """
        dtype, vae_dtype = pipeline.unet.dtype, self._device.vae_dtype
        # A VAE may need the wider number type.
        wide = max(dtype, vae_dtype, key=lambda one: one.itemsize)
        known = {**pipeline.nets, **pipeline.vaes}
        types = {**dict.fromkeys(nets, dtype), **({vae: wide} if vae else {})}
        folders = {hash_: self._fetch(hash_) for hash_ in types if hash_ not in known}
        need = weighed(known[hash_] for hash_ in types if hash_ in known)
        need += sum(estimate_part(folder, types[hash_]) for hash_, folder in folders.items())
        self._residents.refuse_beside(pipeline, need)
        found = {hash_: known.get(hash_) or load_net(folders[hash_], dtype) for hash_ in nets}
        if not vae:
            return found, {}
        return found, {vae: known.get(vae) or self._tuned(load_vae(folders[vae], pipeline.family, dtype, vae_dtype))}

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
