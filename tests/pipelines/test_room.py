"""What activations are estimated to take: held against what the layers allocate, and what it does to micro-batches."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from farm.recipe import Recipe
from workers.pipelines import device
from workers.pipelines.device import Device
from workers.pipelines.engine import Engine
from workers.pipelines.load import Pipeline
from workers.pipelines.room import Need, fitting, need_of, unet_values, vae_values

from .conftest import Fetch, farm_settings, go_on, recipe, with_room_for

META = torch.device("meta")
MIB = 2**20


class Peak(TorchDispatchMode):
    """Most bytes of tensors alive at once. On the meta device nothing is allocated, and sizes are true all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = call(*args, **(kwargs or {}))
        for one in pytree.tree_leaves(answer):
            if isinstance(one, Tensor) and (key := one.untyped_storage()._cdata) not in self._seen:
                storage = one.untyped_storage()
                self._seen[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, key)
        return answer

    def _gone(self, key: int) -> None:
        self.now -= self._seen.pop(key)


@pytest.fixture
def _fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on every device this runs on; the meta device alone would write out the products of all tokens."""
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", lambda query, *_, **__: torch.empty_like(query))


def built(kind: Any, **config: Any) -> Any:
    with META:
        return kind(**config).requires_grad_(False).eval()


@torch.inference_mode()
def values(call: Callable[[], object]) -> int:
    """Most float32 values alive at once."""
    with Peak() as peak:
        call()
    return peak.most // 4


SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    # Of the ten there are: each uses the memory of the one before.
    "transformer_layers_per_block": (1, 2, 2),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
}


@pytest.mark.usefixtures("_fused_attention")
@pytest.mark.parametrize(("side", "config"), [(64, {"cross_attention_dim": 768}), (128, SDXL)])
def test_a_unet_takes_what_was_estimated(side: int, config: dict[str, Any]) -> None:
    unet = built(UNet2DConditionModel, **config)
    words = torch.empty(1, 77, config["cross_attention_dim"], device=META)
    latents, time = torch.empty(1, 4, side, side, device=META), torch.empty((), device=META)
    taken = values(lambda: unet(latents, time, words, return_dict=False))
    assert taken <= sum(unet_values(unet.config, side**2)) <= 1.3 * taken


WIDTHS = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


@pytest.mark.usefixtures("_fused_attention")
@pytest.mark.parametrize(("kind", "config"), [(AutoencoderKL, WIDTHS), (AutoencoderTiny, {})])
def test_a_vae_takes_what_was_estimated(kind: Any, config: dict[str, Any]) -> None:
    vae = built(kind, **config)
    decoded = values(lambda: vae.decode(torch.empty(1, 4, 64, 64, device=META), return_dict=False))
    encoded = values(lambda: vae.encode(torch.empty(1, 3, 512, 512, device=META)))
    need = Need(drawn=0, decoded=vae_values(vae, 512**2), at_once=1, kept=0)
    assert max(decoded, encoded) <= need.of(1) <= 2 * max(decoded, encoded), "with what allocators leave unused"


def test_what_a_lane_adds(pipeline: Pipeline) -> None:
    def need(**changes: Any) -> Need:
        return need_of(pipeline, pipeline.vae, recipe(**changes), device.choose(farm_settings()))

    plain = need()
    assert need(guidance_scale=2.0).drawn == 2 * plain.drawn
    assert need(width=128).drawn == pytest.approx(2 * plain.drawn, rel=0.01)
    assert need(width=128).decoded == 2 * plain.decoded
    assert need(width=128, height=256).at_once == plain.at_once // 4, "a piece of one picture, on every core"
    control = {"hash": "edges", "image": "mask"}
    assert need(controls=[control]).drawn > plain.drawn
    moving = need(motion="moves", frames=4, fps=8)
    assert (moving.drawn, moving.decoded, moving.pictures) == (4 * plain.drawn, plain.decoded, 4)


def test_as_many_as_fit() -> None:
    need = Need(drawn=100, decoded=300, at_once=2, kept=0)
    assert [need.of(images) for images in (1, 2, 6, 8)] == [450, 900, 900, 1200]

    def found(free: int, most: int = 8, padded: Callable[[int], int] = lambda images: images) -> int:
        return fitting(need, most, lambda: free, padded, lambda: False)

    assert [found(free) for free in (1200, 1199, 900, 899, 449, -5)] == [8, 4, 4, 1, 1, 1]
    assert found(900, most=5) == 5
    assert found(1199, most=5, padded=lambda images: 8 if images > 4 else images) == 3, "rows that are added count"
    freed = iter((200, 1200))
    assert fitting(need, 8, lambda: next(freed), lambda images: images, lambda: True) == 8
    assert next(freed, None) is None, "room was made once, for one that did not fit"


def rendered(engine: Engine, recipes: Sequence[Recipe]) -> list[Any]:
    return engine.render(engine.stage(recipes), recipes, go_on)


def test_a_micro_batch_begins_as_small_as_memory_is(fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(farm_settings(), fetch)
    recipes = [recipe(n, steps=1) for n in range(8)]
    whole = rendered(engine, recipes)
    rendered(engine, [recipe(checkpoint="sdxl", steps=1)])
    (entry,) = [one for one in engine._residents.resident() if one.checkpoint == "sd"]
    asked = with_room_for(entry.loaded.unet, 8, monkeypatch)
    need = need_of(entry.loaded, entry.loaded.vae, recipes[0], engine._device)
    monkeypatch.setattr(Device, "room", property(lambda _self: need.of(4)))
    for mine, theirs in zip(rendered(engine, recipes), whole, strict=True):
        assert np.abs(mine.astype(int) - theirs).max() <= 1
    assert asked == [4, 4]
    assert engine.warm_state().checkpoints == {"sd", "sdxl"}
    monkeypatch.setattr(Device, "room", property(lambda _self: 0))
    asked.clear()
    rendered(engine, recipes[:2])
    assert asked == [1, 1], "one is tried in any case"
    assert engine.warm_state().checkpoints == {"sd"}, "after what is idle made room"
    monkeypatch.undo()
    asked = with_room_for(entry.loaded.unet, 8, monkeypatch)
    rendered(engine, recipes)
    assert asked == [8], "what was short once is not remembered"


def test_free_memory_of_a_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "CGROUP_LIMITS", (tmp_path / "memory.max",))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 900 * MIB}))
    assert device.free_memory() == 900 * MIB
    (tmp_path / "memory.current").write_text(f"{500 * MIB}\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert device.free_memory() == 900 * MIB
    (tmp_path / "memory.max").write_text(f"{600 * MIB}\n")
    assert device.free_memory() == 100 * MIB
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {50 * MIB}\nactive_file 7\n")
    assert device.free_memory() == 150 * MIB, "files it could let go of"
    (tmp_path / "memory.current").write_text(f"{700 * MIB}\n")
    assert device.free_memory() == 0


def test_free_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"mem_get_info": (100, 800), "memory_reserved": 70, "memory_allocated": 30}
    for name, answer in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda _place, answer=answer: answer)
    assert Device(torch.device("cuda:0"), torch.float16, 1).room == 140, "what torch keeps without using it is free"
