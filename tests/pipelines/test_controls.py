"""ControlNets against diffusers' own pipelines, what shares a micro-batch, what they cost, and which are refused."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from farm.errors import InvalidModel, OutOfMemory
from farm.recipe import Recipe
from farm.views import CheckpointView
from workers.pipelines.engine import Engine
from workers.pipelines.inspecting import inspect

from . import toys
from .conftest import Fetch, farm_settings, recipe
from .test_against_diffusers import same, scheduler_of
from .test_pictures_from_pictures import PICTURES, drawn

Places = dict[str, Path]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path, sdxl_folder: Path) -> Places:
    folder = tmp_path_factory.mktemp("controlnets")
    return {
        "sd": sd_folder,
        "sdxl": sdxl_folder,
        "edges": toys.controlnet(folder / "edges", sd_folder),
        "depth": toys.controlnet(folder / "depth", sd_folder, seed=6),
        "xl-edges": toys.controlnet(folder / "xl", sdxl_folder, seed=7),
    }


@pytest.fixture
def fetch_all(places: Places) -> Fetch:
    return places.__getitem__


@pytest.fixture
def controlled(fetch_all: Fetch) -> Engine:
    return Engine(farm_settings(), fetch_all)


def use(name: str = "edges", image: str = "mask", **more: Any) -> dict[str, Any]:
    return {"hash": name, "image": image, **more}


PIPES: dict[tuple[str, str], Any] = {
    ("sd", "txt2img"): StableDiffusionControlNetPipeline,
    ("sd", "img2img"): StableDiffusionControlNetImg2ImgPipeline,
    ("sdxl", "txt2img"): StableDiffusionXLControlNetPipeline,
}


def by_diffusers(places: Places, recipes: Sequence[Recipe]) -> list[np.ndarray]:
    first = recipes[0]
    uses = first.controls or ()
    nets = [ControlNetModel.from_pretrained(places[one.hash], local_files_only=True) for one in uses]
    options: dict[str, Any] = {"add_watermarker": False} if first.checkpoint == "sdxl" else {"safety_checker": None}
    several = len(nets) > 1
    pipe = PIPES[first.checkpoint, first.task].from_pretrained(
        places[first.checkpoint], controlnet=nets if several else nets[0], local_files_only=True, **options
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler_of(first.scheduler, pipe.scheduler.config)
    # Of several ControlNets, diffusers wants the pictures of each image together.
    followed = [[Image.fromarray(PICTURES[use.image]) for use in one.controls or ()] for one in recipes]
    given: dict[str, Any] = {"width": first.width, "height": first.height}
    given["image"] = followed if several else [pictures[0] for pictures in followed]
    if first.task == "img2img":
        given |= {
            "control_image": given["image"],
            "image": [Image.fromarray(PICTURES[str(one.image)]) for one in recipes],
            "strength": first.strength,
        }
    weights = [one.weight for one in uses]
    answer = pipe(
        [one.prompt for one in recipes],
        num_inference_steps=first.steps,
        guidance_scale=first.guidance_scale,
        controlnet_conditioning_scale=weights if several else weights[0],
        control_guidance_start=[one.start for one in uses],
        control_guidance_end=[one.end for one in uses],
        generator=[torch.Generator().manual_seed(one.seed) for one in recipes],
        output_type="pil",
        **given,
    )
    return [np.asarray(image) for image in answer.images]


CASES: dict[str, dict[str, Any]] = {
    "lcm": {"controls": [use()]},
    "guided": {"controls": [use(weight=0.7)], "scheduler": "euler", "steps": 6, "guidance_scale": 3.0},
    "for a while": {"controls": [use(start=0.25, end=0.75)], "steps": 8},
    "two": {"controls": [use("depth", "a", weight=0.5), use(weight=1.5, end=0.6)], "steps": 5},
    "xl": {"checkpoint": "sdxl", "controls": [use("xl-edges", weight=0.8)], "guidance_scale": 2.0},
    "from a picture": {"controls": [use()], "task": "img2img", "image": "a", "strength": 0.6},
}


@pytest.mark.parametrize("case", CASES)
def test_as_diffusers_does_it(controlled: Engine, places: Places, case: str) -> None:
    body = CASES[case]
    other = [{**one, "image": "b"} for one in body["controls"]]
    recipes = [recipe(0, **body), recipe(1, **{**body, "controls": other})]
    ours = drawn(controlled, recipes)
    same(ours, by_diffusers(places, recipes))
    for changed, least in ((None, 5), (other, 2)):
        (drew,) = drawn(controlled, [recipe(0, **{**body, "controls": changed})])
        assert np.abs(drew.astype(int) - ours[0]).max() > least, "the control changes the picture, and what it shows"


def test_neighbours_that_follow_other_pictures_change_nothing(controlled: Engine) -> None:
    some = [recipe(n, controls=[use(image=image)]) for n, image in enumerate(("a", "b", "mask"))]
    assert len({one.lane for one in some}) == 1
    assert len({one.pipeline_key for one in some}) == 1
    assert some[0].pipeline_key != recipe().pipeline_key
    for changed in (use(weight=0.5), use(start=0.5), use(end=0.5), use("depth")):
        assert recipe(0, controls=[changed]).lane != some[0].lane
    together = drawn(controlled, some)
    for one, picture in zip(some, together, strict=True):
        assert np.abs(drawn(controlled, [one])[0].astype(int) - picture).max() <= 1


def test_a_recipe_without_controls_is_what_it_was_before_there_were_any() -> None:
    assert recipe(controls=[]).canonical() == recipe().canonical()
    assert b"controls" not in recipe().canonical()
    one, other = use(image="a"), use("depth", "b")
    assert recipe(controls=[one, other]).hash == recipe(controls=[other, one]).hash


def test_inpainting_follows_too(controlled: Engine) -> None:
    masked = {"task": "inpaint", "image": "a", "mask": "mask", "strength": 1.0, "composite": True}
    plain, followed = (
        drawn(controlled, [recipe(**masked)])[0],
        drawn(controlled, [recipe(**masked, controls=[use()])])[0],
    )
    kept = PICTURES["mask"][:, :, 0] < 128
    assert np.array_equal(followed[kept], PICTURES["a"][kept])
    assert not np.array_equal(followed, plain)


def test_they_are_counted_and_told(controlled: Engine) -> None:
    drawn(controlled, [recipe()])
    (before,) = controlled.warm()
    drawn(controlled, [recipe(controls=[use()])])
    (after,) = controlled.warm()
    assert (before["controlnets"], after["controlnets"]) == ([], [{"hash": "edges"}])
    assert after["bytes"] > before["bytes"]


def test_one_leaves_for_another_where_there_is_no_room_for_both(controlled: Engine, fetch_all: Fetch) -> None:
    drawn(controlled, [recipe()])
    bare = controlled.warm()[0]["bytes"]
    drawn(controlled, [recipe(controls=[use()])])
    size = controlled.warm()[0]["bytes"] - bare
    tight = Engine(farm_settings(device_budget_bytes=bare + size + size // 2), fetch_all)
    wide = [recipe(controls=[use()]), recipe(controls=[use("depth")])]
    for one in (*wide, *wide):
        assert np.abs(drawn(tight, [one])[0].astype(int) - drawn(controlled, [one])[0]).max() <= 1
        assert [net["hash"] for net in tight.warm()[0]["controlnets"]] == [one.controls[0].hash]  # type: ignore[index]
    with pytest.raises(OutOfMemory, match="with what goes beside it"):
        tight.stage([recipe(controls=[use(), use("depth")])], PICTURES)


def looked_at(path: Path, places: Places, family: str | None = None) -> Any:
    unet = json.loads((places["sd"] / "unet" / "config.json").read_text())
    known = [
        CheckpointView(
            name="toy", hash="sd", family="toy", state="available", bytes=1, created_at="2030-01-01T00:00:00Z",
            profile={"cross_attention_dim": unet["cross_attention_dim"]},
        )
    ]  # fmt: skip
    return inspect(path, "controlnet", {"family": family}, path / "scratch", known, places.__getitem__)


def test_the_family_is_found(places: Places) -> None:
    assert looked_at(places["edges"], places).family == "toy"
    with pytest.raises(InvalidModel, match="as toy: "):
        looked_at(places["xl-edges"], places)
    with pytest.raises(InvalidModel, match="there is no family nothing"):
        looked_at(places["edges"], places, "nothing")


def without_a_weight(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights.pop("controlnet_mid_block.weight")
    save_file(weights, path)


def as_a_pickle(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")


def of_another_class(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "FluxControlNetModel"}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_a_weight, "controlnet_mid_block.weight: this weight"),
        (as_a_pickle, "pickle"),
        (of_another_class, "this is an adapter"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, sd_folder: Path, places: Places, spoil: Callable[[Path], None], words: str
) -> None:
    made = toys.controlnet(tmp_path / "net", sd_folder)
    spoil(made)
    with pytest.raises(InvalidModel, match=words):
        looked_at(made, places)
