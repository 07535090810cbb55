"""The engine: one device, its warm pipelines, and what a worker asks of them: stage, render, what is warm."""

from __future__ import annotations

import hashlib
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import structlog
import torch

from farm.errors import FarmError, InvalidRequest, OutOfMemory, RenderFailed
from farm.recipe import AdapterUse, Recipe
from farm.settings import Settings
from workers.pipelines.cache import Entry, Residents
from workers.pipelines.compiling import compiler_for
from workers.pipelines.costs import Costs, Way
from workers.pipelines.device import Device, choose, host_budget, is_fatal, is_out_of_memory
from workers.pipelines.guides import guide_of
from workers.pipelines.lru import Shelf
from workers.pipelines.merge import text_key
from workers.pipelines.motion import is_motion
from workers.pipelines.parts import in_parts
from workers.pipelines.prompts import Text, all_known, texts
from workers.pipelines.reading import Library
from workers.pipelines.render import OnStep, Picture, asked, render
from workers.pipelines.room import fitting, need_of
from workers.pipelines.sampling import evaluations
from workers.pipelines.seating import Staged, clear_others, seat, tighten
from workers.pipelines.slots import distinct

LANES_REMEMBERED = 256
CANARY_PIXELS = 64
CANARY_PROMPT = "A single split crack on a concrete wall"

log = structlog.get_logger(__name__)

T = TypeVar("T")


class WarmState(NamedTuple):
    """What a claim may prefer: lane -> adapter set merged now (empty for none), and checkpoints on the device.

    `mixes`: several adapter sets of one lane may come in one micro-batch, but for the lanes in `apart`, where one set
    at a time was measured to be cheaper.
    """

    lanes: dict[str, str]
    checkpoints: frozenset[str]
    mixes: bool
    apart: frozenset[str]


class Engine:
    """One device. `stage` may run in any thread at any time; `render` and `canary` only inside the device lock."""

    def __init__(self, settings: Settings, fetch: Callable[[str], Path]) -> None:
        """`fetch(hash)` answers the verified local folder or file of a checkpoint, VAE or adapter."""
        self._device: Device = choose(settings)
        self._most, self._mixes = settings.micro_batch or self._device.micro_batch, settings.mix_adapters
        shelf = Shelf(settings.host_budget_bytes or host_budget())
        self._residents = Residents(self._device.place, self._device.budget, shelf)
        self._library = Library(self._device, self._residents, shelf, fetch)
        self._limits: dict[str, int] = {}
        self._lanes: OrderedDict[str, tuple[str, AdapterUse | None]] = OrderedDict()
        self.costs = Costs()
        self.compiler = compiler_for(settings.compile, self._device, self._most)

    @property
    def device(self) -> str:
        """Such as `cpu` or `cuda:0`."""
        return str(self._device.place)

    @property
    def dtype(self) -> str:
        """Such as `float32`."""
        return self._device.dtype_name

    @property
    def micro_batch(self) -> int:
        """Most images denoised together, of any lane."""
        return self._most

    def limit(self, lane: str) -> int:
        """Most images of this lane that fit the device at once, as far as is known."""
        return self._limits.get(lane, self._most)

    def stage(self, recipes: Sequence[Recipe], pictures: Mapping[str, Picture] = MappingProxyType({})) -> Staged:
        """Fetch, verify and parse what these recipes need, outside the device lock. They share their lane.

        `pictures` holds what they draw from by hash, of any size. Raises InvalidModel for a model that cannot be used,
        InvalidRequest for recipes of two lanes or a picture that is missing, OutOfMemory for what can never fit.
        """
        first = recipes[0]
        if any(one.lane != first.lane for one in recipes):
            raise InvalidRequest("recipes of one micro-batch must share their lane")
        guides = tuple(guide_of(one, pictures) for one in recipes) if first.pictures else ()
        entry = self._library.hold(first.checkpoint)
        try:
            beside = [*(use.hash for use in first.controls or ()), *([first.motion] if first.motion else ())]
            nets, vaes = self._library.beside(beside, first.vae, entry.loaded)
            acceleration = self._library.uses([first.acceleration] if first.acceleration else [], entry.loaded)
            styles = {one.adapter_set: self._library.uses(one.adapters, entry.loaded) for one in recipes}
        except BaseException:
            self._residents.release(entry)
            raise
        staged = Staged(entry, acceleration, styles, nets, vaes, guides)
        staged.finalizer = weakref.finalize(staged, self._residents.release, entry)
        return staged

    def render(self, staged: Staged, recipes: Sequence[Recipe], on_step: OnStep) -> list[Picture | None]:
        """Merge, encode prompts, denoise, decode: one picture per recipe, None for those `on_step` told to drop.

        Several adapter sets are rendered at once with slots, or one after the other merged, whichever was measured to
        be cheaper; a single set is always merged. A micro-batch that is estimated not to fit, or does not, is halved
        until it does, with the same pictures; `on_step` then counts the steps of all parts. Raises OutOfMemory if one
        image alone does not fit, RenderFailed (with `fatal=True` when the device is lost) for whatever else goes wrong.
        """
        first = recipes[0]
        entry, lane = staged.entry, first.lane
        steps = evaluations(first.scheduler, first.steps, first.first_step)
        groups: dict[str, list[int]] = {}
        for place, recipe in enumerate(recipes):
            groups.setdefault(recipe.adapter_set, []).append(place)
        try:
            # Slots know a row for each image; an animation has one for each frame, and costs too much for it to matter.
            way: Way = "merged" if first.motion else self._way(staged, lane, [len(one) for one in groups.values()])
            with self.compiler.turn:
                self._settled(staged, partial(seat, staged, self._residents, self._device, self.compiler.forget))
                fits = self._fitting(staged, recipes, way)
                return in_parts(
                    list(groups.values()) if way == "merged" else [list(range(len(recipes)))],
                    steps,
                    on_step,
                    lambda part, heard: self._once(staged, recipes, part, heard, way),
                    lambda: min(self.limit(lane), fits),
                    partial(self._shrink, entry, first),
                )
        finally:
            staged.close()

    def warm(self) -> list[dict[str, Any]]:
        """What is on the device: per checkpoint its adapters, lanes, measured bytes, load seconds and renders."""
        # Heartbeats ask in their own thread, while rendering changes all of this: copies first.
        known, lanes = dict(self._lanes), self.warm_state().lanes
        told = []
        for entry in self._residents.resident():
            nets = dict(entry.loaded.nets)
            one = {
                "checkpoint": entry.checkpoint,
                "lanes": [lane for lane in lanes if lane in known and known[lane][0] == entry.checkpoint],
                "adapters": [{"hash": hash_, "weight": weight} for hash_, weight in entry.loaded.merger.uses],
                "adapter_set": entry.adapter_set,
                "slots": [{"hash": hash_} for hash_ in entry.loaded.slots.resident],
                "controlnets": [{"hash": hash_} for hash_, net in nets.items() if not is_motion(net)],
                "motions": [{"hash": hash_} for hash_, net in nets.items() if is_motion(net)],
                "vaes": [{"hash": hash_} for hash_ in tuple(entry.loaded.vaes)],
                "bytes": entry.bytes,
                "pristine_bytes": entry.loaded.merger.bytes,
                "load_seconds": round(entry.loaded.load_seconds, 3),
                "renders": entry.renders,
            }
            told.append(one)
        return told

    def cache(self) -> dict[str, Any]:
        """How well the cache serves: hit rates, load seconds, bytes within budgets, what waits in host memory."""
        return {**self._residents.told(), **self._library.told(), "compiled": self.compiler.told()}

    def warm_state(self) -> WarmState:
        """The lanes this engine could render without loading or swapping the acceleration, and its checkpoints."""
        resident = {entry.checkpoint: entry for entry in self._residents.resident()}
        lanes = {
            lane: resident[checkpoint].adapter_set
            for lane, (checkpoint, acceleration) in tuple(self._lanes.items())
            if checkpoint in resident and resident[checkpoint].acceleration == acceleration
        }
        return WarmState(lanes, frozenset(resident), self._mixes, self.costs.apart(self._most))

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

    def _way(self, staged: Staged, lane: str, groups: Sequence[int]) -> Way:
        """How to render groups of so many images, each with an adapter set of its own."""
        if len(groups) == 1:
            # Merged whatever it costs: the pictures of one set then have the same bits in every process.
            return "merged"
        pipeline, adapters = staged.entry.loaded, list(distinct(list(staged.styles.values())))
        bytes_ = staged.bytes + pipeline.merger.bytes + pipeline.slots.bytes + staged.bytes_ahead(slots=True)
        if not pipeline.slots.takes(adapters) or bytes_ > self._device.budget:
            return "merged"
        return self.costs.choose(lane, groups)

    def _fitting(self, staged: Staged, recipes: Sequence[Recipe], way: Way) -> int:
        """How many images the device is estimated to have room for at once, with everything where it belongs."""
        first, pipeline = recipes[0], staged.entry.loaded
        most = max(1, self._most // (first.frames or 1))
        need = need_of(pipeline, pipeline.vaes[first.vae] if first.vae else pipeline.vae, first, self._device)

        def evict() -> bool:
            gone = self._residents.evict_idle(staged.entry)
            self._device.free()
            return gone

        ahead = staged.bytes_ahead(slots=way == "slots")
        size = fitting(need, most, lambda: self._device.room - ahead, self.compiler.rows, evict)
        if size < min(most, len(recipes)):
            log.info("micro-batch kept small: memory is short", lane=first.lane, size=size, each=need.of(1))
        return size

    def _once(
        self, staged: Staged, every: Sequence[Recipe], part: Sequence[int], on_step: OnStep, way: Way
    ) -> list[Picture | None] | None:
        """Render those at these places at once. None when memory ran out; everything it held is let go by then."""
        recipes = [every[place] for place in part]
        guides = [staged.guides[place] for place in part] if staged.guides else []
        entry, pipeline, lane = staged.entry, staged.entry.loaded, recipes[0].lane
        filling = self._prepare(staged, recipes[0], way)
        vae = pipeline.vaes[recipes[0].vae] if recipes[0].vae else pipeline.vae
        started = time.perf_counter()
        try:
            told = self._texts(staged, recipes, way)
            chosen = (
                pipeline.slots.choose([staged.styles[one.adapter_set] for one in recipes]) if way == "slots" else None
            )
            entry.renders += 1
            # What draws frames is put together anew for each motion adapter.
            ask = asked if recipes[0].motion else partial(self.compiler.ask, pipeline)
            pictures = render(pipeline, vae, recipes, told, on_step, self._device, chosen, guides, ask)
        except Exception as error:  # noqa: BLE001  # sorted in there: only out of memory passes
            self._raise_unless_memory(error)
        else:
            if all(picture is not None for picture in pictures):
                self.costs.rendered(lane, way, len(recipes), filling + time.perf_counter() - started)
            return pictures
        # Out of the except block, where the traceback no longer holds the tensors.
        self.compiler.free(pipeline)
        self._device.free()
        return None

    @torch.inference_mode()
    def _texts(self, staged: Staged, recipes: Sequence[Recipe], way: Way) -> list[Text]:
        """What each image is told. With slots the text encoders take one set after the other, which costs little: every
        prompt is encoded alone anyway, and once."""
        pipeline, spread = staged.entry.loaded, self._device.spread
        if way == "merged":
            return texts(pipeline, recipes, pipeline.merger.text_uses, spread)
        told: dict[int, Text] = {}
        groups: dict[str, list[int]] = {}
        for place, recipe in enumerate(recipes):
            groups.setdefault(recipe.adapter_set, []).append(place)
        for adapter_set, places in groups.items():
            some = [recipes[place] for place in places]
            uses = [(one.text_part, weight) for one, weight in staged.styles[adapter_set] if one.changes_text]
            key = text_key([*staged.acceleration, *uses])
            if not all_known(pipeline, some, key):
                pipeline.merger.apply([*staged.acceleration, *uses])
            told.update(zip(places, texts(pipeline, some, key, spread), strict=True))
        return [told[place] for place in range(len(recipes))]

    def _settled(self, staged: Staged, act: Callable[[], T], *, again: bool = True) -> T:
        """What has to be on the device before anything is rendered. Out of memory once: drop what is idle and try
        again."""
        try:
            return act()
        except Exception as error:  # noqa: BLE001  # sorted in there: only out of memory passes
            self._raise_unless_memory(error)
        # Out of the except block, where the traceback no longer holds the tensors.
        pipeline = staged.entry.loaded
        pipeline.clear_slots()
        self.compiler.free(pipeline)
        left = clear_others(staged, self.compiler.forget)
        self._device.free()
        if not again or not (self._residents.evict_idle(staged.entry) or left):
            raise OutOfMemory("the device has no room for this checkpoint with its adapters")
        return self._settled(staged, act, again=False)

    def _prepare(self, staged: Staged, recipe: Recipe, way: Way) -> float:
        """Adapters merged or in slots; answers the seconds that filling slots took."""
        filling = self._settled(staged, partial(self._merge, staged, recipe, way))
        entry = staged.entry
        entry.bytes = entry.loaded.bytes
        entry.acceleration = recipe.acceleration
        entry.adapter_set = recipe.adapter_set if way == "merged" else ""
        self._lanes[recipe.lane] = (recipe.checkpoint, recipe.acceleration)
        self._lanes.move_to_end(recipe.lane)
        while len(self._lanes) > LANES_REMEMBERED:
            self._lanes.popitem(last=False)
        return filling

    def _merge(self, staged: Staged, recipe: Recipe, way: Way) -> float:
        """The weights as this recipe's lane wants them; its adapter set merged, or every set of `staged` in slots.

        Answers the seconds that filling slots took.
        """
        pipeline = staged.entry.loaded
        uses = [*staged.acceleration, *(staged.styles[recipe.adapter_set] if way == "merged" else ())]
        adapters = [] if way == "merged" else list(distinct(list(staged.styles.values())))
        extra = pipeline.merger.extra_bytes(uses) + (pipeline.slots.extra_bytes(adapters) if adapters else 0)
        tighten(staged, extra, self._device, self.compiler.forget, with_slots=way == "merged")
        self._residents.reserve(staged.entry, extra)
        started = time.perf_counter()
        if pipeline.merger.apply(uses) and way == "merged":
            self._device.finish()
            self.costs.swapped(recipe.lane, time.perf_counter() - started)
        if way == "merged":
            pipeline.slots.rest()
            return 0.0
        started = time.perf_counter()
        pipeline.slots.put(adapters)
        pipeline.slots.engage()
        return time.perf_counter() - started

    def _shrink(self, entry: Entry, recipe: Recipe, images: int) -> None:
        """So many images at once were too many for this lane."""
        if images > 1:
            self._limits[recipe.lane] = (images + 1) // 2
            log.warning("micro-batch halved", lane=recipe.lane, size=self._limits[recipe.lane])
        elif not self._residents.evict_idle(entry):
            raise OutOfMemory(f"one image of {recipe.width}x{recipe.height} does not fit the device")

    @staticmethod
    def _raise_unless_memory(error: Exception) -> None:
        """Let an out-of-memory error pass; everything else leaves as one of the farm's own."""
        if isinstance(error, FarmError):
            raise error
        if not is_out_of_memory(error):
            text = (str(error).strip().splitlines() or [""])[0]
            raise RenderFailed(f"{type(error).__name__}: {text}"[:500], fatal=is_fatal(error)) from error
