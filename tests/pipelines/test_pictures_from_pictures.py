"""Image to image and inpainting against diffusers' own pipelines, and what shares a micro-batch: at most one level of
255 apart, for every scheduler, SD and SDXL."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from PIL import Image

from farm.errors import InvalidRequest
from farm.recipe import Recipe
from workers.pipelines.engine import Engine

from .conftest import farm_settings, go_on, recipe
from .test_against_diffusers import PLAIN, same, scheduler_of

SIZE = 64


def pixels(seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> np.ndarray:
    """Coarse random patches: a picture with something to see at the size of a latent."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))


def half(size: tuple[int, int] = (SIZE, SIZE), edge: float = 0.45) -> np.ndarray:
    """A mask: white right of `edge`, which lies beside the latents' own grid."""
    mask = np.zeros((size[1], size[0], 3), np.uint8)
    mask[:, int(size[0] * edge) :] = 255
    return mask


PICTURES: Mapping[str, np.ndarray] = {
    "a": pixels(1), "b": pixels(2), "wide": pixels(3, (100, 40)), "mask": half(), "other": half(edge=0.7),
}  # fmt: skip


def drawn(engine: Engine, recipes: Sequence[Recipe]) -> list[np.ndarray]:
    answers = engine.render(engine.stage(recipes, PICTURES), recipes, go_on)
    return [picture for picture in answers if picture is not None]


def img2img(number: int = 0, image: str = "a", strength: float = 0.8, **more: Any) -> Recipe:
    return recipe(number, task="img2img", image=image, strength=strength, **more)


def inpaint(number: int = 0, image: str = "a", mask: str = "mask", strength: float = 1.0, **more: Any) -> Recipe:
    more = {"composite": False, **more}
    return recipe(number, task="inpaint", image=image, mask=mask, strength=strength, **more)


PIPES: dict[tuple[str, str], Any] = {
    ("sd", "img2img"): StableDiffusionImg2ImgPipeline,
    ("sd", "inpaint"): StableDiffusionInpaintPipeline,
    ("sdxl", "img2img"): StableDiffusionXLImg2ImgPipeline,
    ("sdxl", "inpaint"): StableDiffusionXLInpaintPipeline,
}


def by_diffusers(folder: Path, recipes: Sequence[Recipe], **parts: Any) -> list[np.ndarray]:
    first = recipes[0]
    options: dict[str, Any] = {"add_watermarker": False} if first.checkpoint == "sdxl" else {"safety_checker": None}
    pipe = PIPES[first.checkpoint, first.task].from_pretrained(folder, local_files_only=True, **options, **parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler_of(first.scheduler, pipe.scheduler.config)
    given: dict[str, Any] = {"image": [Image.fromarray(PICTURES[str(one.image)]) for one in recipes]}
    if first.mask:
        given["mask_image"] = [Image.fromarray(PICTURES[str(one.mask)]) for one in recipes]
        given |= {"width": first.width, "height": first.height}
    answer = pipe(
        [one.prompt for one in recipes],
        strength=first.strength,
        num_inference_steps=first.steps,
        guidance_scale=first.guidance_scale,
        generator=[torch.Generator().manual_seed(one.seed) for one in recipes],
        output_type="pil",
        **given,
    )
    return [np.asarray(image) for image in answer.images]


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.8, 1.0])
def test_img2img_with_lcm(engine: Engine, sd_folder: Path, strength: float) -> None:
    recipes = [img2img(0, "a", strength), img2img(1, "b", strength)]
    same(drawn(engine, recipes), by_diffusers(sd_folder, recipes))


@pytest.mark.parametrize("scheduler", PLAIN)
def test_img2img_with_plain_schedulers(engine: Engine, sd_folder: Path, scheduler: str) -> None:
    recipes = [img2img(n, image, 0.6, scheduler=scheduler, steps=7, guidance_scale=3.0) for n, image in enumerate("ab")]
    same(drawn(engine, recipes), by_diffusers(sd_folder, recipes))


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_with_lcm(engine: Engine, sd_folder: Path, strength: float) -> None:
    recipes = [inpaint(0, "a", "mask", strength), inpaint(1, "b", "other", strength)]
    same(drawn(engine, recipes), by_diffusers(sd_folder, recipes))


@pytest.mark.parametrize("scheduler", PLAIN)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting_with_plain_schedulers(engine: Engine, sd_folder: Path, scheduler: str, strength: float) -> None:
    recipes = [inpaint(strength=strength, scheduler=scheduler, steps=6, guidance_scale=3.0)]
    same(drawn(engine, recipes), by_diffusers(sd_folder, recipes))


@pytest.mark.parametrize(("scheduler", "guidance"), [("lcm", 1.0), ("euler", 4.0)])
def test_sdxl(engine: Engine, sdxl_folder: Path, scheduler: str, guidance: float) -> None:
    more = {"checkpoint": "sdxl", "scheduler": scheduler, "guidance_scale": guidance}
    for recipes in (
        [img2img(0, **more), img2img(1, "b", **more)],
        [inpaint(0, strength=0.7, **more), inpaint(1, "b", strength=0.7, **more)],
    ):
        same(drawn(engine, recipes), by_diffusers(sdxl_folder, recipes))


def test_a_tiny_vae_encodes_without_drawing(sd_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    widths = (8, 8, 8, 8)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )  # fmt: skip
    tiny.save_pretrained(tmp_path, safe_serialization=True)
    engine = Engine(farm_settings(), {"sd": sd_folder, "tiny": tmp_path}.__getitem__)
    for recipes in ([img2img(vae="tiny", strength=0.5)], [inpaint(vae="tiny", strength=0.6)]):
        same(drawn(engine, recipes), by_diffusers(sd_folder, recipes, vae=tiny))


def test_what_the_mask_leaves_alone_comes_back_pixel_by_pixel(engine: Engine) -> None:
    plain, whole = drawn(engine, [inpaint()])[0], drawn(engine, [inpaint(composite=True)])[0]
    anew = half()[:, :, 0] >= 128
    assert np.array_equal(whole[~anew], PICTURES["a"][~anew])
    assert np.array_equal(whole[anew], plain[anew])
    assert not np.array_equal(plain[~anew], PICTURES["a"][~anew]), "a VAE alone does not give it back"


def test_a_picture_of_another_size_is_made_to_fit(engine: Engine) -> None:
    (made,) = drawn(engine, [img2img(image="wide", strength=0.25)])
    assert made.shape == (SIZE, SIZE, 3)


def test_neighbours_with_other_pictures_and_strengths_change_nothing(engine: Engine) -> None:
    """Strengths that begin at the same step share a lane; each picture is as it is alone."""
    some = [img2img(0, "a", 0.8), img2img(1, "b", 0.9), img2img(2, "wide", 0.75)]
    assert len({one.lane for one in some}) == 1
    assert some[0].lane != img2img(0, "a", 0.7).lane
    together = drawn(engine, some)
    for one, picture in zip(some, together, strict=True):
        (alone,) = drawn(engine, [one])
        assert np.abs(alone.astype(int) - picture).max() <= 1
    assert len({picture.tobytes() for picture in together}) == 3
    masked = [inpaint(0, "a", "mask"), inpaint(1, "b", "other")]
    assert masked[0].lane == masked[1].lane
    assert masked[0].lane != inpaint(composite=True).lane
    assert np.abs(drawn(engine, masked)[1].astype(int) - drawn(engine, [masked[1]])[0]).max() <= 1


def test_steps_are_counted_as_they_are_done(engine: Engine) -> None:
    heard: list[tuple[int, int]] = []
    one = img2img(strength=0.5)
    engine.render(engine.stage([one], PICTURES), [one], lambda done, steps: heard.append((done, steps)) or ())
    assert heard == [(1, 2), (2, 2)]


def test_a_picture_that_is_not_handed_over(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="nowhere"):
        engine.stage([img2img(image="nowhere")], PICTURES)


def test_half_precision_stays_near(fetch: Any) -> None:
    recipes = [img2img(0), img2img(1, "b")]
    exact = drawn(Engine(farm_settings(), fetch), recipes)
    rough = drawn(Engine(farm_settings(dtype="bfloat16"), fetch), recipes)
    assert max(np.abs(one.astype(int) - other).max() for one, other in zip(exact, rough, strict=True)) <= 48
