"""Different adapters for each image of one micro-batch: the pictures of separate runs, from one graph."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from farm.recipe import Recipe
from workers.pipelines.engine import Engine
from workers.pipelines.factors import Adapter, Factors, Use
from workers.pipelines.load import Pipeline, load
from workers.pipelines.merge import Merger
from workers.pipelines.slots import MOST_RANK, SLOTS_AT_ONCE, Slots, SlottedConv2d, SlottedLinear, distinct
from workers.pipelines.targets import target_modules

from . import toys
from .conftest import Fetch, farm_settings, go_on, recipe

RELATIVE_ERROR = 1e-4


def adapter(name: str, of: Mapping[str, tuple[int, ...]], seed: int, rank: int = 4, only: str = "") -> Adapter:
    """Random factors for every layer of the UNet whose name holds `only`, strong enough to be seen."""
    wanted = {layer: shape for layer, shape in of.items() if layer.startswith("unet.") and only in layer}
    made = toys.changes(wanted, rank, seed, strength=0.15)
    return Adapter(name, {layer: Factors(*factors) for layer, factors in made.items()})


def inputs(pipeline: Pipeline, rows: int) -> dict[str, Any]:
    source = torch.Generator().manual_seed(9)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source)

    options: dict[str, Any] = {}
    if pipeline.family == "sdxl":
        options["added_cond_kwargs"] = {"text_embeds": noise(rows, 24), "time_ids": noise(rows, 6).abs() * 64}
    return {
        "sample": noise(rows, 4, 8, 8).contiguous(memory_format=torch.channels_last),
        "timestep": torch.tensor(499),
        "encoder_hidden_states": noise(rows, 77, pipeline.unet.config.cross_attention_dim),
        "return_dict": False,
        **options,
    }


def one_row(given: dict[str, Any], row: int) -> dict[str, Any]:
    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cut(inner) for name, inner in value.items()}
        return value[row : row + 1] if isinstance(value, torch.Tensor) and value.dim() else value

    return {name: cut(value) for name, value in given.items()}


def slotted(pipeline: Pipeline, rows: Sequence[Sequence[Use]]) -> None:
    """Have these in slots, and this thread's rows told."""
    pipeline.slots.put(list(distinct(rows)))
    pipeline.slots.engage()
    pipeline.slots.rows.are(pipeline.slots.choose(rows))


@pytest.mark.parametrize("model", ["sd", "sdxl"])
@torch.no_grad()
def test_one_pass_equals_separate_merged_runs(fetch: Fetch, model: str) -> None:
    """Every kind of layer, several ranks, one, two and no adapters a row, weights negative and above one."""
    pipeline = load(fetch(model), model, torch.float32, torch.float32)
    shapes = pipeline.merger.shapes
    fast, whole = adapter("fast", shapes, 1, rank=8), adapter("a", shapes, 2)
    fine, words = adapter("b", shapes, 3, rank=6), adapter("c", shapes, 4, 2, "attn2")
    rows = [[(whole, 1.0)], [], [(fine, -0.7), (words, 1.5)], [(words, 0.3)], [(whole, 0.4)]]
    given = inputs(pipeline, len(rows))
    pipeline.merger.apply([(fast, 1.0)])
    slotted(pipeline, rows)
    assert {type(module) for module in pipeline.unet.modules()} >= {SlottedLinear, SlottedConv2d}
    together = pipeline.unet(**given)[0]
    pipeline.slots.rest()
    plain = pipeline.unet(**given)[0]
    for row, uses in enumerate(rows):
        pipeline.merger.apply([(fast, 1.0), *uses])
        alone = pipeline.unet(**one_row(given, row))[0]
        assert float((together[row] - alone[0]).abs().max() / alone.abs().max()) <= RELATIVE_ERROR
        apart = float((plain[row] - alone[0]).abs().max() / alone.abs().max())
        assert (apart > 20 * RELATIVE_ERROR) == bool(uses), "strong enough for the comparison to mean something"


def test_a_compiled_unet_is_compiled_once() -> None:
    """One graph for slots and one without; other adapters, weights, rows and merged weights change tensors only."""
    torch.manual_seed(0)
    unet = toys.unet(
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    targets = target_modules({"unet": unet.requires_grad_(False).eval()})
    merger, slots = Merger(targets), Slots(targets)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(unet, backend=counter, fullgraph=True, dynamic=False)
    given = (torch.randn(4, 4, 8, 8), torch.tensor(499), torch.randn(4, 77, toys.WIDTH))
    made = [adapter(f"{number:02}", merger.shapes, number) for number in range(2 * SLOTS_AT_ONCE)]

    @torch.no_grad()
    def same() -> bool:
        return bool(torch.allclose(compiled(*given)[0], unet(*given)[0], atol=1e-5))

    assert same()
    assert counter.frame_count == 1
    for turn in range(6):
        rows = [[(made[(turn * 3 + row) % len(made)], 0.1 * turn - 0.5)] for row in range(4)]
        merger.apply([(made[turn], 1.0)])
        slots.put(list(distinct(rows)))
        slots.engage()
        slots.rows.are(slots.choose(rows))
        assert same()
        assert counter.frame_count == 2, "slots, and never again"
        slots.rest()
        assert same()
        assert counter.frame_count == 2


def test_slots_are_reused_and_the_oldest_make_room(pipeline: Pipeline) -> None:
    shapes = pipeline.merger.shapes
    made = [adapter(f"{number:02}", shapes, number, only="attn1") for number in range(SLOTS_AT_ONCE + 2)]
    slots = pipeline.slots
    assert slots.extra_bytes(made[:3]) > 0
    before = pipeline.bytes
    assert slots.put(made[:SLOTS_AT_ONCE]) == SLOTS_AT_ONCE
    assert pipeline.bytes == before + slots.bytes, "counted with the checkpoint"
    assert slots.extra_bytes(made[:3]) == 0
    assert slots.put(made[:2]) == 0
    assert slots.put(made[SLOTS_AT_ONCE:]) == 2
    assert set(slots.resident) == {one.hash for one in made} - {"02", "03"}
    assert slots.put(made) == 2, "more than there were slots: more are made, and what was there stays"
    assert slots.count == 1 + 2 * SLOTS_AT_ONCE
    with torch.no_grad():
        given = inputs(pipeline, 1)
        slotted(pipeline, [[(made[5], 1.0)]])
        in_slot = pipeline.unet(**given)[0]
        slots.clear()
        pipeline.merger.apply([(made[5], 1.0)])
        assert torch.allclose(in_slot, pipeline.unet(**given)[0], atol=1e-4)
    assert pipeline.bytes == before + pipeline.merger.bytes
    assert {type(module) for module in pipeline.unet.modules()}.isdisjoint({SlottedLinear, SlottedConv2d})


def test_a_layer_without_slots_is_known() -> None:
    grouped = Slots({"unet.c.weight": nn.Conv2d(4, 4, 3, groups=2)})
    factors = Factors(torch.zeros(1, 2, 3, 3), torch.zeros(4, 1, 1, 1), 1.0)
    assert not grouped.takes([Adapter("a", {"unet.c.weight": factors})])
    high = torch.zeros(MOST_RANK + 1, 16)
    linear = Slots({"unet.l.weight": nn.Linear(16, 16)})
    assert not linear.takes([Adapter("a", {"unet.l.weight": Factors(high, high.t(), 1.0)})])
    assert linear.takes([Adapter("a", {"unet.l.weight": Factors(high[1:], high[1:].t(), 1.0)})])


FAST = {"hash": "fast", "weight": 1.0}
STYLES: list[list[dict[str, Any]]] = [
    [{"hash": "style", "weight": 0.8}],
    [],
    [{"hash": "words", "weight": 1.0}],
    [{"hash": "style", "weight": -0.5}, {"hash": "words", "weight": 0.5}],
    [{"hash": "style", "weight": 0.8}],
]


def mixed(**changes: Any) -> list[Recipe]:
    return [recipe(n, acceleration=FAST, adapters=style, **changes) for n, style in enumerate(STYLES)]


def render(engine: Engine, recipes: Sequence[Recipe], on_step: Any = go_on) -> list[Any]:
    return engine.render(engine.stage(recipes), recipes, on_step)


def apart(one: Any, other: Any) -> int:
    return int(np.abs(one.astype(int) - other).max())


@pytest.mark.parametrize(("guidance", "cores"), [(1.0, 1), (3.0, 2)])
def test_pictures_with_slots_are_those_of_each_alone(fetch: Fetch, guidance: float, cores: int) -> None:
    """With two cores parts with different rows run side by side; one adapter changes the text encoder too."""
    threads = torch.get_num_threads()
    try:
        engine = Engine(farm_settings(threads=cores), fetch)
        recipes = mixed(guidance_scale=guidance, negative_prompt="moss")
        together = render(engine, recipes)
        (warm,) = engine.warm()
        assert {one["hash"] for one in warm["slots"]} == {"style", "words"}
        for one, picture in zip(recipes, together, strict=True):
            assert apart(render(engine, [one])[0], picture) <= 1
    finally:
        torch.set_num_threads(threads)


def test_one_set_after_the_other_where_that_is_cheaper(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = mixed()
    with_slots = render(engine, recipes)
    monkeypatch.setattr(engine.costs, "choose", lambda _lane, groups: "merged" if groups == [2, 1, 1, 1] else "slots")
    heard: list[tuple[int, int]] = []

    def drop_two(step: int, steps: int) -> list[int]:
        heard.append((step, steps))
        return [1, 4] if step >= 3 else []

    merged = render(engine, recipes, drop_two)
    assert [picture is None for picture in merged] == [False, True, False, False, True]
    assert [step for step, _ in heard] == list(range(1, 13)), "the group of which all is dropped is left out"
    assert heard[-1] == (12, 12)
    for place in (0, 2, 3):
        assert apart(merged[place], with_slots[place]) <= 1


def test_no_room_for_slots(engine: Engine, fetch: Fetch) -> None:
    recipes = mixed(steps=1)
    most = 0
    for one in recipes:
        render(engine, [one])
        most = max(most, engine.warm()[0]["bytes"])
    tight = Engine(farm_settings(device_budget_bytes=most + 1000), fetch)
    assert all(picture is not None for picture in render(tight, recipes))
    assert tight.warm()[0]["slots"] == []
