"""VAEs that replace a checkpoint's own: room is made for them before they come, and they leave again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from farm.errors import OutOfMemory
from farm.recipe import Recipe
from workers.pipelines import reading
from workers.pipelines.compiling import Compiler
from workers.pipelines.engine import Engine
from workers.pipelines.load import estimate_part, load_vae, weighed
from workers.pipelines.programs import Program

from . import toys
from .compilers import Backend
from .conftest import Fetch, farm_settings, go_on, recipe

F32 = torch.float32


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path, sdxl_folder: Path) -> dict[str, Path]:
    """Two VAEs, much larger than the checkpoints' own, and a ControlNet."""
    folder = tmp_path_factory.mktemp("beside")
    made = {"sd": sd_folder, "sdxl": sdxl_folder, "edges": toys.controlnet(folder / "edges", sd_folder)}
    for number, name in enumerate(("soft", "sharp")):
        torch.manual_seed(number)
        toys.vae(block_out_channels=(8, 8, 8, 48)).save_pretrained(folder / name, safe_serialization=True)
        made[name] = folder / name
    return made


@pytest.fixture
def fetch_all(places: dict[str, Path]) -> Fetch:
    return places.__getitem__


@pytest.fixture
def engine_of_all(fetch_all: Fetch) -> Engine:
    return Engine(farm_settings(), fetch_all)


@pytest.fixture(scope="module")
def size(places: dict[str, Path]) -> int:
    """Bytes of one of the VAEs, as a CPU has it."""
    vae = load_vae(places["soft"], "sd", F32, F32)
    found = weighed([vae])
    assert found == pytest.approx(estimate_part(places["soft"], F32), rel=0.05)
    return found


def render(engine: Engine, recipes: Sequence[Recipe]) -> list[np.ndarray]:
    return [one for one in engine.render(engine.stage(recipes), recipes, go_on) if one is not None]


def drawn(engine: Engine, **changes: Any) -> np.ndarray:
    return render(engine, [recipe(steps=1, **changes)])[0]


def kept(engine: Engine) -> set[str]:
    return {hash_ for entry in engine._residents.resident() for hash_ in entry.loaded.vaes}


def bare(fetch: Fetch, checkpoint: str) -> int:
    engine = Engine(farm_settings(), fetch)
    drawn(engine, checkpoint=checkpoint)
    return int(engine.warm()[0]["bytes"])


def test_one_that_can_never_fit_is_refused_before_it_is_read(
    fetch_all: Fetch, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tight = Engine(farm_settings(device_budget_bytes=bare(fetch_all, "sd") + size // 2), fetch_all)
    monkeypatch.setattr(reading, "load_vae", lambda *_: pytest.fail("it was read"))
    with pytest.raises(OutOfMemory, match="with what goes beside it"):
        tight.stage([recipe(vae="soft")])
    assert tight._residents._entries == {}
    assert drawn(tight).shape == (64, 64, 3)


def test_it_is_counted_and_leaves_for_another(fetch_all: Fetch, size: int) -> None:
    wide = Engine(farm_settings(), fetch_all)
    plain = bare(fetch_all, "sd")
    pictures = {name: drawn(wide, vae=name) for name in ("soft", "sharp")}
    assert kept(wide) == {"soft", "sharp"}
    assert wide.warm()[0]["bytes"] >= plain + 2 * size
    assert {one["hash"] for one in wide.warm()[0]["vaes"]} == {"soft", "sharp"}
    tight = Engine(farm_settings(device_budget_bytes=plain + 2 * size), fetch_all)
    for name in ("soft", "sharp", "soft"):
        assert np.array_equal(drawn(tight, vae=name), pictures[name])
        assert kept(tight) == {name}, "there is no room for both, their transposed kernels counted"
        assert tight.cache()["device_bytes"] <= tight.cache()["device_budget"]


def test_one_that_left_while_it_was_staged_comes_back(fetch_all: Fetch, size: int) -> None:
    tight = Engine(farm_settings(device_budget_bytes=bare(fetch_all, "sd") + 2 * size), fetch_all)
    first = drawn(tight, vae="soft")
    again = [recipe(steps=1, vae="soft")]
    staged = tight.stage(again)
    drawn(tight, vae="sharp")
    assert kept(tight) == {"sharp"}
    (picture,) = tight.render(staged, again, go_on)
    assert picture is not None
    assert np.array_equal(picture, first)


def test_other_checkpoints_make_room_for_it(fetch_all: Fetch, size: int) -> None:
    budget = bare(fetch_all, "sd") + bare(fetch_all, "sdxl") + size // 2
    engine = Engine(farm_settings(device_budget_bytes=budget), fetch_all)
    for checkpoint in ("sdxl", "sd"):
        drawn(engine, checkpoint=checkpoint)
    assert engine.warm_state().checkpoints == {"sd", "sdxl"}
    drawn(engine, vae="soft")
    assert engine.warm_state().checkpoints == {"sd"}


def test_beside_a_controlnet_both_count(fetch_all: Fetch, places: dict[str, Path], size: int) -> None:
    beside = size + estimate_part(places["edges"], F32)
    tight = Engine(farm_settings(device_budget_bytes=bare(fetch_all, "sd") + beside - size // 2), fetch_all)
    control = [{"hash": "edges", "image": "mask"}]
    picture = {"mask": np.zeros((64, 64, 3), np.uint8)}
    tight.stage([recipe(controls=control)], picture).close()
    with pytest.raises(OutOfMemory, match="with what goes beside it"):
        tight.stage([recipe(controls=control, vae="soft")], picture)


def starved(engine: Engine, monkeypatch: pytest.MonkeyPatch, tight: Callable[[], bool]) -> None:
    """VAEs that are read from now on run out of memory wherever they are moved, as long as it is tight."""
    load = load_vae

    def read(*given: Any) -> Any:
        vae = load(*given)
        move = vae.to

        def to(place: torch.device) -> Any:
            if tight():
                raise torch.OutOfMemoryError("no room")
            return move(place)

        vae.to = to
        return vae

    monkeypatch.setattr(reading, "load_vae", read)


def test_what_nobody_wants_leaves_when_the_device_runs_out(
    engine_of_all: Engine, fetch_all: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of_all
    expected = drawn(Engine(farm_settings(), fetch_all), vae="soft")
    drawn(engine, vae="sharp")
    drawn(engine, checkpoint="sdxl")
    starved(engine, monkeypatch, lambda: bool(kept(engine)) or "sdxl" in engine.warm_state().checkpoints)
    assert np.array_equal(drawn(engine, vae="soft"), expected)
    assert (kept(engine), engine.warm_state().checkpoints) == ({"soft"}, {"sd"})


def test_where_that_is_not_enough_the_engine_goes_on(engine_of_all: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    starved(engine_of_all, monkeypatch, lambda: True)
    with pytest.raises(OutOfMemory, match="no room for this checkpoint"):
        drawn(engine_of_all, vae="soft")
    assert kept(engine_of_all) == set()
    assert drawn(engine_of_all).shape == (64, 64, 3)


def test_what_was_compiled_of_one_leaves_with_it(fetch_all: Fetch, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the weights; and the next VAE's programs must not be taken for this one's."""
    tight = Engine(farm_settings(device_budget_bytes=bare(fetch_all, "sd") + 2 * size), fetch_all)
    drawn(tight, vae="soft")
    (entry,) = tight._residents.resident()
    compiler = Compiler(tight._device, Backend())
    monkeypatch.setattr(tight, "compiler", compiler)
    soft = entry.loaded.vaes["soft"]
    entry.loaded.programs[compiler._number(soft), "decode"] = Program(lambda: None, [], [], ())
    entry.loaded.programs[compiler._number(entry.loaded.unet), "__call__"] = kept_on = Program(lambda: None, [], [], ())
    gone = weakref.ref(soft)
    del soft
    drawn(tight, vae="sharp")
    assert list(entry.loaded.programs.values()) == [kept_on]
    assert gone() is None
    assert compiler._number(entry.loaded.vaes["sharp"]) not in {0, 1}
