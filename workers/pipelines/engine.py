"""The engine: one device, its warm pipelines, and what a worker asks of them: stage, render, what is warm."""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from farm.errors import FarmError, InvalidRequest, OutOfMemory, RenderFailed
from farm.recipe import AdapterUse, Recipe
from farm.settings import Settings
from workers.pipelines.adapters import Adapter, read_adapter
from workers.pipelines.cache import Entry, Residents
from workers.pipelines.device import Device, choose, is_fatal, is_out_of_memory
from workers.pipelines.load import Pipeline, load, load_vae
from workers.pipelines.lru import Lru
from workers.pipelines.render import OnStep, Picture, render
from workers.pipelines.targets import aliases
from workers.pipelines.upsample import merge_upsampling

ADAPTER_BYTES = 4 * 1024**3
"""Parsed adapters kept in host memory: 40 LCM-LoRAs of SDXL, or hundreds of style adapters."""
LANES_REMEMBERED = 256
CANARY_PIXELS = 64
CANARY_PROMPT = "A single split crack on a concrete wall"

log = structlog.get_logger(__name__)


class WarmState(NamedTuple):
    """What a claim may prefer: lane -> adapter set merged now (empty for none), and checkpoints on the device."""

    lanes: dict[str, str]
    checkpoints: frozenset[str]


@dataclass(eq=False)
class Staged:
    """Everything a micro-batch needs, read and checked, in host memory or on the device already.

    Keeps its checkpoint from being dropped until `close`, which rendering does; an abandoned one closes itself.
    """

    entry: Entry
    vae: Any | None
    uses: tuple[tuple[Adapter, float], ...]
    finalizer: weakref.finalize[..., Staged] | None = None

    def close(self) -> None:
        """Let go of the checkpoint. Harmless when repeated."""
        if self.finalizer is not None:
            self.finalizer()


class Engine:
    """One device. `stage` may run in any thread at any time; `render` and `canary` only inside the device lock."""

    def __init__(self, settings: Settings, fetch: Callable[[str], Path]) -> None:
        """`fetch(hash)` answers the verified local folder or file of a checkpoint, VAE or adapter."""
        self._device: Device = choose(settings)
        self._fetch = fetch
        self._most = settings.micro_batch
        self._residents = Residents(self._device.place, self._device.budget)
        self._adapters: Lru[tuple[str, str], Adapter] = Lru(ADAPTER_BYTES)
        self._limits: dict[str, int] = {}
        self._lanes: OrderedDict[str, tuple[str, AdapterUse | None]] = OrderedDict()

    @property
    def device(self) -> str:
        """Such as `cpu` or `cuda:0`."""
        return str(self._device.place)

    @property
    def dtype(self) -> str:
        """Such as `float32`."""
        return self._device.dtype_name

    def limit(self, lane: str) -> int:
        """Most images of this lane that fit the device at once, as far as is known."""
        return self._limits.get(lane, self._most)

    def stage(self, recipes: Sequence[Recipe]) -> Staged:
        """Fetch, verify and parse what these recipes need, outside the device lock. They share lane and adapter set.

        Raises InvalidModel for a checkpoint or adapter that cannot be used, InvalidRequest for mixed recipes.
        """
        first = recipes[0]
        if any((one.lane, one.adapter_set) != (first.lane, first.adapter_set) for one in recipes):
            raise InvalidRequest("recipes of one micro-batch must share their lane and adapter set")
        entry = self._residents.hold(first.checkpoint, lambda: self._load(first.checkpoint))
        try:
            vae = self._load_vae(first.vae, entry.loaded) if first.vae and first.vae not in entry.loaded.vaes else None
            wanted = [*first.adapters, *([first.acceleration] if first.acceleration else [])]
            uses = tuple((self._adapter(use.hash, entry.loaded), use.weight) for use in wanted)
        except BaseException:
            self._residents.release(entry)
            raise
        staged = Staged(entry, vae, uses)
        staged.finalizer = weakref.finalize(staged, self._residents.release, entry)
        return staged

    def render(self, staged: Staged, recipes: Sequence[Recipe], on_step: OnStep) -> list[Picture | None]:
        """Merge, encode prompts, denoise, decode: one picture per recipe, None for those `on_step` told to drop.

        A micro-batch that does not fit is halved until it does, with the same pictures; `on_step` then counts the
        steps of all parts. Raises OutOfMemory if one image alone does not fit, RenderFailed (with `fatal=True` when
        the device is lost) for everything else that goes wrong.
        """
        try:
            self._prepare(staged, recipes[0])
            return self._in_parts(staged.entry, recipes, on_step)
        finally:
            staged.close()

    def warm(self) -> list[dict[str, Any]]:
        """What is on the device: per checkpoint its adapters, lanes, measured bytes, load seconds and renders."""
        lanes = self.warm_state().lanes
        return [
            {
                "checkpoint": entry.checkpoint,
                "lanes": [lane for lane in lanes if self._lanes[lane][0] == entry.checkpoint],
                "adapters": [{"hash": hash_, "weight": weight} for hash_, weight in entry.loaded.merger.uses],
                "adapter_set": entry.adapter_set,
                "bytes": entry.bytes,
                "pristine_bytes": entry.loaded.merger.bytes,
                "load_seconds": round(entry.loaded.load_seconds, 3),
                "renders": entry.renders,
            }
            for entry in self._residents.resident()
        ]

    def warm_state(self) -> WarmState:
        """The lanes this engine could render without loading or swapping the acceleration, and its checkpoints."""
        resident = {entry.checkpoint: entry for entry in self._residents.resident()}
        lanes = {
            lane: resident[checkpoint].adapter_set
            for lane, (checkpoint, acceleration) in tuple(self._lanes.items())
            if checkpoint in resident and resident[checkpoint].acceleration == acceleration
        }
        return WarmState(lanes, frozenset(resident))

    def canary(self, checkpoint: str | None = None) -> bytes:
        """Render a fixed small recipe and answer its sha256: equal on every healthy device of one class.

        With `checkpoint` unset the most recently used one on the device is taken; RenderFailed if there is none.
        """
        resident = self._residents.resident()
        if checkpoint is None and not resident:
            raise RenderFailed("no checkpoint is loaded that a canary could be rendered with")
        chosen = checkpoint or resident[-1].checkpoint
        recipe = Recipe(
            prompt=CANARY_PROMPT, seed=4, width=CANARY_PIXELS, height=CANARY_PIXELS, steps=2, guidance_scale=1.0,
            scheduler="ddim", checkpoint=chosen,
        )  # fmt: skip
        picture = self.render(self.stage([recipe]), [recipe], lambda _done, _steps: ())[0]
        assert picture is not None  # noqa: S101  # nothing was dropped
        return hashlib.sha256(picture.tobytes()).digest()

    def _prepare(self, staged: Staged, recipe: Recipe) -> None:
        """Everything on the device and merged. Out of memory once: drop what is idle and try again."""
        entry = staged.entry
        for again in (True, False):
            try:
                self._residents.admit(entry)
                if staged.vae is not None and recipe.vae is not None:
                    entry.loaded.vaes.setdefault(recipe.vae, staged.vae.to(self._device.place))
                self._residents.reserve(entry, entry.loaded.merger.extra_bytes(staged.uses))
                entry.loaded.merger.apply(staged.uses)
            except Exception as error:  # noqa: BLE001  # sorted in there: only out of memory passes
                self._raise_unless_memory(error)
            else:
                break
            self._device.free()
            if not (again and self._residents.evict_idle(entry)):
                raise OutOfMemory("the device has no room for this checkpoint with its adapters")
        entry.bytes = entry.loaded.bytes
        entry.acceleration, entry.adapter_set = recipe.acceleration, recipe.adapter_set
        self._lanes[recipe.lane] = (recipe.checkpoint, recipe.acceleration)
        self._lanes.move_to_end(recipe.lane)
        while len(self._lanes) > LANES_REMEMBERED:
            self._lanes.popitem(last=False)

    def _in_parts(self, entry: Entry, recipes: Sequence[Recipe], on_step: OnStep) -> list[Picture | None]:
        """Render as many at once as fit this lane; fewer after each time memory ran out."""
        lane, steps = recipes[0].lane, recipes[0].steps
        size = min(len(recipes), self.limit(lane))
        pictures: list[Picture | None] = []
        dropped: set[int] = set()
        before = 0
        while len(pictures) < len(recipes):
            start = len(pictures)
            part = recipes[start : start + size]
            parts_to_go = [range(at, min(at + size, len(recipes))) for at in range(start, len(recipes), size)]
            live = sum(not dropped.issuperset(indices) for indices in parts_to_go)
            if dropped.issuperset(parts_to_go[0]):
                pictures += [None] * len(part)
                continue
            total = before + live * steps

            def heard(
                done: int, _: int, start: int = start, before: int = before, total: int = total
            ) -> Collection[int]:
                dropped.update(on_step(before + done, total))
                return [index - start for index in dropped]

            try:
                pictures += self._once(entry, part, heard)
                before += steps
            except Exception as error:  # noqa: BLE001  # sorted in there: only out of memory passes
                self._raise_unless_memory(error)
            if len(pictures) > start:
                continue
            # Out of the except block, where the traceback no longer holds the tensors.
            self._device.free()
            if size > 1:
                size = (size + 1) // 2
                self._limits[lane] = size
                log.warning("micro-batch halved", lane=lane, size=size)
            elif not self._residents.evict_idle(entry):
                raise OutOfMemory(f"one image of {recipes[0].width}x{recipes[0].height} does not fit the device")
        return pictures

    def _once(self, entry: Entry, recipes: Sequence[Recipe], on_step: OnStep) -> list[Picture | None]:
        pipeline = entry.loaded
        entry.renders += 1
        chosen = recipes[0].vae
        return render(
            pipeline, pipeline.vaes[chosen] if chosen else pipeline.vae, recipes, on_step, self._device,
            pipeline.merger.text_uses,
        )  # fmt: skip

    @staticmethod
    def _raise_unless_memory(error: Exception) -> None:
        """Let an out-of-memory error pass; everything else leaves as one of the farm's own."""
        if isinstance(error, FarmError):
            raise error
        if not is_out_of_memory(error):
            text = (str(error).strip().splitlines() or [""])[0]
            raise RenderFailed(f"{type(error).__name__}: {text}"[:500], fatal=is_fatal(error)) from error

    def _load(self, checkpoint: str) -> Pipeline:
        folder = self._fetch(checkpoint)
        pipeline = load(folder, checkpoint, self._device.dtype_of(folder), self._device.vae_dtype)
        self._tune(pipeline.vae)
        log.info(
            "checkpoint loaded", checkpoint=checkpoint, seconds=round(pipeline.load_seconds, 3), bytes=pipeline.bytes
        )
        return pipeline

    def _load_vae(self, vae: str, pipeline: Pipeline) -> Any:
        return self._tune(load_vae(self._fetch(vae), pipeline.family, pipeline.unet.dtype, self._device.vae_dtype))

    def _tune(self, vae: Any) -> Any:
        if self._device.on_cpu:
            merge_upsampling(vae)
        return vae

    def _adapter(self, adapter: str, pipeline: Pipeline) -> Adapter:
        """An adapter parsed for pipelines of this structure."""
        key = (adapter, pipeline.structure)
        found = self._adapters.get(key)
        if found is None:
            shapes = pipeline.merger.shapes
            found = read_adapter(self._fetch(adapter), adapter, shapes, aliases(shapes))
            self._adapters.put(key, found, found.bytes)
        return found
