"""The engine as a worker uses it: cancel, memory, failures, what is warm, the canary."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from farm.errors import InvalidModel, InvalidRequest, OutOfMemory, RenderFailed
from farm.recipe import Recipe
from workers.pipelines import device
from workers.pipelines.cache import Entry
from workers.pipelines.engine import Engine
from workers.pipelines.load import Pipeline
from workers.pipelines.merge import Merger

from .conftest import Fetch, farm_settings, go_on, recipe, with_room_for

FAST = {"hash": "fast", "weight": 1.0}


def render(engine: Engine, recipes: Sequence[Recipe], on_step: Callable[..., Any] = go_on) -> list[Any]:
    return engine.render(engine.stage(recipes), recipes, on_step)


def unet_of(engine: Engine) -> Any:
    """The live UNet of the toy checkpoint, which is loaded for it."""
    render(engine, [recipe(steps=1)])
    (entry,) = engine._residents.resident()
    return entry.loaded.unet


def test_on_step_counts_and_drops(engine: Engine) -> None:
    heard: list[tuple[int, int]] = []

    def drop_second(step: int, steps: int) -> list[int]:
        heard.append((step, steps))
        return [1] if step == 2 else []

    recipes = [recipe(n) for n in range(3)]
    pictures = render(engine, recipes, drop_second)
    assert heard == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert pictures[1] is None
    whole = render(engine, recipes)
    assert np.array_equal(pictures[0], whole[0])
    assert np.array_equal(pictures[2], whole[2])


def test_all_dropped_stops_at_once(engine: Engine) -> None:
    heard: list[int] = []

    def drop_all(step: int, _steps: int) -> range:
        heard.append(step)
        return range(2)

    assert render(engine, [recipe(0), recipe(1)], drop_all) == [None, None]
    assert heard == [1]


@pytest.mark.parametrize("rows", [4, 3, 1])
def test_a_micro_batch_that_does_not_fit_is_halved(engine: Engine, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    recipes = [recipe(n) for n in range(8)]
    whole = render(engine, recipes)
    asked = with_room_for(unet_of(engine), rows, monkeypatch)
    heard: list[tuple[int, int]] = []

    def drop_last(step: int, steps: int) -> list[int]:
        heard.append((step, steps))
        return [7]

    pictures = render(engine, recipes, drop_last)
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(pictures[:7], whole[:7], strict=True))
    assert pictures[7] is None
    assert [step for step, _ in heard] == list(range(1, len(heard) + 1)), "one count over all parts"
    assert heard[-1] == (len(heard), len(heard)), "the last step is told as the last"
    fits = engine.limit(recipes[0].lane)
    assert fits == {4: 4, 3: 2, 1: 1}[rows], "8 images as 4 + 4, as 2 + 2 + 2 + 2, one by one"
    asked.clear()
    render(engine, recipes)
    assert max(asked) == fits, "the size is remembered for the lane"
    assert engine.limit("another lane") == engine.micro_batch == 16, "what a CPU takes unless told otherwise"


@pytest.mark.parametrize("rows", [4, 2])
def test_a_mixed_micro_batch_is_halved_likewise(engine: Engine, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Eight images, eight weights of a style: 4 + 4 and 2 + 2 + 2 + 2, with slots, and the same pictures."""
    styles = [[{"hash": "style", "weight": n / 4 - 1}] for n in range(8)]
    recipes = [recipe(n, acceleration=FAST, adapters=style) for n, style in enumerate(styles)]
    whole = render(engine, recipes)
    (entry,) = engine._residents.resident()
    asked = with_room_for(entry.loaded.unet, rows, monkeypatch)
    halved = render(engine, recipes)
    assert sorted(set(asked), reverse=True) == ([8, 4] if rows == 4 else [8, 4, 2])
    assert asked.count(rows) == recipes[0].steps * 8 // rows
    assert entry.loaded.slots.resident == ("style",)
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(halved, whole, strict=True))


@pytest.mark.parametrize("pieces", [2, 1])
def test_a_vae_that_runs_out_halves_it_too(engine: Engine, monkeypatch: pytest.MonkeyPatch, pieces: int) -> None:
    """It decodes four of these pictures in one go: with eight images, with four, and so on."""
    recipes = [recipe(n, steps=1) for n in range(8)]
    whole = render(engine, recipes)
    vae = engine._residents.resident()[0].loaded.vae
    asked: list[int] = []
    decode = vae.decode

    def limited(latents: torch.Tensor, **options: Any) -> Any:
        asked.append(len(latents))
        if len(latents) > pieces:
            raise torch.OutOfMemoryError("no room")
        return decode(latents, **options)

    monkeypatch.setattr(vae, "decode", limited)
    for mine, theirs in zip(render(engine, recipes), whole, strict=True):
        assert np.abs(mine.astype(int) - theirs).max() <= 1
    assert asked == ([4, 4] + [2] * 4 if pieces == 2 else [4, 4, 2] + [1] * 8)
    assert engine.limit(recipes[0].lane) == pieces


def test_what_is_idle_leaves_for_a_checkpoint_that_does_not_fit(
    engine: Engine, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out while it is moved to the device, and while adapters are merged into it."""
    wanted = recipe(steps=1, acceleration=FAST)
    expected = render(Engine(farm_settings(), fetch), [wanted])
    for place, name in ((Pipeline, "move"), (Merger, "apply")):
        act = getattr(place, name)

        def tight(self: Any, *given: Any, act: Any = act) -> Any:
            if "sdxl" in engine.warm_state().checkpoints:
                raise torch.OutOfMemoryError("no room")
            return act(self, *given)

        engine._residents.evict_idle(Entry("none"))
        render(engine, [recipe(checkpoint="sdxl", steps=1)])
        monkeypatch.setattr(place, name, tight)
        assert np.array_equal(render(engine, [wanted])[0], expected[0])
        assert engine.warm_state().checkpoints == {"sd"}
        monkeypatch.undo()


def test_one_image_that_does_not_fit(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with_room_for(unet_of(engine), 0, monkeypatch)
    with pytest.raises(OutOfMemory, match="one image of 64x64 does not fit"):
        render(engine, [recipe(n) for n in range(4)])
    monkeypatch.undo()
    assert render(engine, [recipe()])[0] is not None, "and the engine goes on"


def test_idle_checkpoints_go_before_a_picture_is_given_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = unet_of(engine)
    render(engine, [recipe(checkpoint="sdxl", steps=1)])
    forward = unet.forward

    def tight(*args: Any, **options: Any) -> Any:
        if "sdxl" in engine.warm_state().checkpoints:
            raise torch.OutOfMemoryError("no room")
        return forward(*args, **options)

    monkeypatch.setattr(unet, "forward", tight)
    assert render(engine, [recipe()])[0] is not None
    assert engine.warm_state().checkpoints == {"sd"}


def test_a_thousand_times_out_of_memory_leave_memory_flat(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each failing forward holds a megabyte; nothing collects cycles meanwhile, so a single leaked frame would show."""
    unet = unet_of(engine)
    vae = engine._residents.resident()[0].loaded.vae

    def cheap(latents: torch.Tensor, *_args: Any, **_options: Any) -> tuple[torch.Tensor]:
        held = torch.ones(2**18)
        if len(latents) > 1:
            raise torch.OutOfMemoryError("no room")
        return (latents * held[0],)

    monkeypatch.setattr(unet, "forward", cheap)
    monkeypatch.setattr(vae, "decode", lambda latents, **_options: (latents.new_zeros(len(latents), 3, 8, 8),))
    monkeypatch.setattr(engine._device.__class__, "free", lambda _self: None)
    recipes = [recipe(n, steps=1) for n in range(2)]
    process = psutil.Process()

    def cycle() -> None:
        engine._limits.clear()
        assert len(render(engine, recipes)) == 2

    for _ in range(50):
        cycle()
    gc.disable()
    try:
        tensors = sum(type(thing) is torch.Tensor for thing in gc.get_objects())
        before = process.memory_info().rss
        for _ in range(950):
            cycle()
        grown = process.memory_info().rss - before
        assert sum(type(thing) is torch.Tensor for thing in gc.get_objects()) <= tensors
    finally:
        gc.enable()
    assert grown < 64 * 1024**2, "one leaked frame each would be a gigabyte"


def test_whatever_goes_wrong_is_a_render_failure(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = unet_of(engine)
    for error, fatal in ((RuntimeError("bad kernel\nwith a trace"), False), (RuntimeError("CUDA error: gone"), True)):

        def broken(*_args: Any, error: Exception = error, **_options: Any) -> Any:
            raise error

        monkeypatch.setattr(unet, "forward", broken)
        with pytest.raises(RenderFailed) as caught:
            render(engine, [recipe()])
        assert caught.value.details["fatal"] is fatal
        assert "trace" not in caught.value.message


def test_a_picture_that_is_not_a_number_is_no_picture(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = unet_of(engine)
    forward = unet.forward

    def spoilt(*args: Any, **options: Any) -> Any:
        (answer,) = forward(*args, **options)
        answer[1] = float("nan")
        return (answer,)

    monkeypatch.setattr(unet, "forward", spoilt)
    with pytest.raises(RenderFailed, match="not a number") as caught:
        render(engine, [recipe(n) for n in range(3)])
    assert caught.value.details["rows"] == [1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scheduler": "magic"}, "scheduler 'magic' is not one of lcm, ddim"),
        ({"steps": 51}, "takes 1 to 50 steps, not 51"),
        ({"scheduler": "ddim", "steps": 1001}, "takes 1 to 1000 steps"),
        ({"width": 60}, "60x64: width and height must be multiples of 8"),
    ],
)
def test_what_the_pipeline_cannot_do_is_refused(engine: Engine, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        render(engine, [recipe(**changes)])


def test_recipes_of_two_lanes_are_refused(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="must share their lane"):
        engine.stage([recipe(), recipe(steps=2)])


def test_a_refused_adapter_lets_go_of_its_checkpoint(engine: Engine) -> None:
    with pytest.raises(InvalidModel, match="base family"):
        engine.stage([recipe(checkpoint="sdxl", acceleration=FAST)])
    assert engine._residents._entries == {}


def test_an_abandoned_stage_lets_go_of_its_checkpoint(engine: Engine) -> None:
    staged = engine.stage([recipe()])
    assert staged.entry.users == 1
    entry = staged.entry
    staged.close()
    staged.close()
    assert entry.users == 0
    staged = engine.stage([recipe()])
    entry = staged.entry
    del staged
    gc.collect()
    assert entry.users == 0


def test_what_is_warm(engine: Engine) -> None:
    assert engine.warm() == []
    style = [{"hash": "style", "weight": 0.5}]
    bare, fast, styled = recipe(), recipe(acceleration=FAST), recipe(acceleration=FAST, adapters=style)
    render(engine, [bare])
    assert engine.warm_state()[:2] == ({bare.lane: ""}, {"sd"})
    render(engine, [fast])
    assert engine.warm_state().lanes == {fast.lane: ""}, "another acceleration is merged now"
    render(engine, [styled])
    assert styled.lane == fast.lane
    assert engine.warm_state().lanes == {fast.lane: styled.adapter_set}
    (warm,) = engine.warm()
    assert warm["checkpoint"] == "sd"
    assert warm["lanes"] == [fast.lane]
    assert warm["adapters"] == [{"hash": "fast", "weight": 1.0}, {"hash": "style", "weight": 0.5}]
    assert warm["bytes"] > warm["pristine_bytes"] > 0
    assert warm["load_seconds"] > 0
    assert warm["renders"] == 3


def test_prompts_are_encoded_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    unet_of(engine)
    (entry,) = engine._residents.resident()
    encoder = entry.loaded.encoders[0].model
    seen: list[int] = []
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda *a, **o: (seen.append(len(a[0])), forward(*a, **o))[1])
    render(engine, [recipe(1), recipe(2), recipe(1, seed=5)])
    assert seen == [1, 1]
    render(engine, [recipe(2, acceleration=FAST)])
    assert seen == [1, 1], "the acceleration adapter does not touch the text encoder"
    render(engine, [recipe(2, adapters=[{"hash": "words", "weight": 1.0}])])
    assert seen == [1, 1, 1], "this one does"


def test_the_canary_sings_the_same_song(engine: Engine, fetch: Fetch) -> None:
    with pytest.raises(RenderFailed, match="no checkpoint is loaded"):
        engine.canary()
    song = engine.canary("sd")
    assert len(song) == 32
    render(engine, [recipe(acceleration=FAST)])
    assert engine.canary() == song
    assert Engine(farm_settings(), fetch).canary("sd") == song
    assert engine.canary("sdxl") != song


def test_a_container_has_less_memory_than_its_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Budgets taken from the machine's memory would have the container killed."""
    limit, unset = tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"
    monkeypatch.setattr(device, "CGROUP_LIMITS", (limit, unset))
    whole = psutil.virtual_memory().total
    assert device.machine_memory() == whole
    limit.write_text("max\n")
    assert device.machine_memory() == whole
    limit.write_text(f"{2**30}\n")
    assert device.machine_memory() == 2**30
    assert device.host_budget() == 2**28
    assert device.choose(farm_settings()).budget == 2**29
    assert device.choose(farm_settings(device_budget_bytes=2**32)).budget == 2**32, "what was asked for stays"


def test_device_and_number_type(fetch: Fetch) -> None:
    threads = torch.get_num_threads()
    try:
        engine = Engine(farm_settings(threads=3, dtype="bfloat16", device="cpu"), fetch)
        assert (engine.device, engine.dtype, torch.get_num_threads()) == ("cpu", "bfloat16", 3)
    finally:
        torch.set_num_threads(threads)
    for name, reason in (("cuda:99", "CUDA devices"), ("xla", "must be auto, cpu")):
        with pytest.raises(ValueError, match=reason):
            Engine(farm_settings(device=name), fetch)
