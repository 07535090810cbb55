"""Pictures as bytes: exact pixels, metadata that others read, and nothing in it that is nobody's business."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from farm.painter import paint, sample_scene
from farm.recipe import AdapterUse, Recipe
from tests.stub_worker import picture
from workers.pictures import a1111, encode_png, encode_thumbnail, metadata

RECIPE = Recipe(
    prompt="A single split crack on a concrete wall",
    negative_prompt="people",
    seed=42,
    width=96,
    height=64,
    steps=4,
    guidance_scale=1.5,
    scheduler="lcm",
    checkpoint="a" * 64,
    adapters=(AdapterUse(hash="d" * 64, weight=0.5),),
)
NAMES = {"checkpoint": "crack-tiny", "adapters": [{"name": "moss", "weight": 0.5}], "acceleration": "lcm-lora"}


@pytest.mark.parametrize("level", [0, 1, 6, 9])
@pytest.mark.parametrize("size", [(1, 1), (64, 96), (97, 33)])
def test_a_png_holds_exactly_the_pixels(level: int, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3)).astype(np.uint8)
    with Image.open(io.BytesIO(encode_png(pixels, texts={}, level=level))) as image:
        image.load()
        assert (image.mode, image.size) == ("RGB", size[::-1])
        assert np.array_equal(np.asarray(image), pixels)
        assert not image.info.keys() - {"dpi", "gamma", "srgb"}, "no text"


def test_a_slice_of_a_larger_array_is_encoded_too() -> None:
    pixels = picture(RECIPE)[::2, ::-1]
    with Image.open(io.BytesIO(encode_png(pixels, texts={}, level=1))) as image:
        assert np.array_equal(np.asarray(image), pixels)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        encode_png(np.zeros((8, 8, 4), np.uint8), texts={}, level=1)


def test_walls_take_no_more_bytes_than_pillow_makes_of_them() -> None:
    for seed in range(4):
        pixels = paint(sample_scene(np.random.default_rng(seed)), 128, 128, seed).picture
        pillow = io.BytesIO()
        Image.fromarray(pixels).save(pillow, "PNG", compress_level=1)
        assert len(encode_png(pixels, texts={}, level=1)) <= len(pillow.getvalue()) * 1.08


@pytest.mark.parametrize("prompt", ["plain", "Mörtel", "コンクリート — crack"])
def test_the_recipe_travels_in_the_png(prompt: str) -> None:
    recipe = RECIPE.model_copy(update={"prompt": prompt})
    origin = {"name": "moss", "sha256": "d" * 64, "source": "hf:owner/moss", "revision": "e" * 40}
    texts = metadata(recipe, names={**NAMES, "models": [origin]}, labels={"site": "north"})
    with Image.open(io.BytesIO(encode_png(picture(recipe), texts=texts, level=1))) as image:
        image.load()
        told = json.loads(image.info["farm"])
        assert Recipe.parse(told["recipe"]) == recipe
        assert told["recipe_hash"] == recipe.hash
        assert told["labels"] == {"site": "north"}
        assert told["names"] == NAMES
        assert told["models"] == [origin]
        assert set(told) == {"farm", "recipe", "recipe_hash", "names", "models", "labels"}
        assert image.info["parameters"].startswith(prompt)


def test_parameters_read_as_the_web_uis_write_them() -> None:
    lines = a1111(RECIPE, NAMES).splitlines()
    assert lines[0] == "A single split crack on a concrete wall <lora:moss:0.5>"
    assert lines[1] == "Negative prompt: people"
    pairs = dict(pair.split(": ", 1) for pair in lines[2].split(", "))
    assert pairs["Steps"] == "4"
    assert pairs["Sampler"] == "LCM"
    assert pairs["CFG scale"] == "1.5"
    assert pairs["Seed"] == "42"
    assert pairs["Size"] == "96x64"
    assert pairs["Model"] == "crack-tiny"


def test_a_thumbnail_keeps_the_shape_and_grows_nothing() -> None:
    wide = np.zeros((100, 400, 3), np.uint8)
    for longer_side, expected in ((200, (200, 50)), (1000, (400, 100))):
        with Image.open(io.BytesIO(encode_thumbnail(wide, longer_side=longer_side))) as image:
            assert (image.format, image.size) == ("WEBP", expected)
