"""WebP and JPEG: the pixels they keep, the recipe in them, and replays of what loses pixels."""

import io
import json
from hashlib import sha256
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, ImageSequence

from farm import imagefile, jobs
from farm.db import Database
from farm.formats import EXIF_ROOM, refuse_crowded
from farm.painter import paint, sample_scene
from farm.recipe import Recipe
from farm.settings import Settings
from farm.states import JobState
from farm.storage import Store
from tests import stub_worker
from tests.farm.conftest import Queue
from tests.stub_worker import StubRenderer
from tests.workers.test_pictures import NAMES, RECIPE
from workers.executor import Executor
from workers.formats import (
    DESCRIPTION,
    EXIF_IFD,
    UNICODE,
    USER_COMMENT,
    decode,
    decode_animation,
    encode,
    encode_animation,
    exif,
)
from workers.pictures import Pixels, difference, metadata

WALL = paint(sample_scene(np.random.default_rng(1)), 96, 64, 1).picture


def recipe_of(format_: str | None, quality: int | None, **more: object) -> Recipe:
    return Recipe.parse({**RECIPE.model_dump(mode="json"), "format": format_, "quality": quality, **more})


@pytest.mark.parametrize("format_", [None, "webp"])
def test_png_and_webp_keep_every_pixel(format_: str | None) -> None:
    recipe = recipe_of(format_, None)
    assert recipe.lossless
    noise = np.random.default_rng(2).integers(0, 256, (33, 97, 3)).astype(np.uint8)
    for pixels in (WALL, noise, noise[::2, ::-1]):
        assert np.array_equal(decode(encode(pixels, recipe, texts={}, png_level=1), recipe), pixels)


@pytest.mark.parametrize(("format_", "kind"), [("webp", "WEBP"), ("jpeg", "JPEG")])
def test_a_quality_trades_pixels_for_bytes(format_: str, kind: str) -> None:
    sizes, apart = [], []
    for quality in (20, 60, 95):
        recipe = recipe_of(format_, quality)
        assert not recipe.lossless
        file = encode(WALL, recipe, texts={}, png_level=1)
        with Image.open(io.BytesIO(file)) as image:
            assert (image.format, image.size, image.mode) == (kind, WALL.shape[1::-1], "RGB")
            assert not image.getexif(), "no text"
        sizes.append(len(file))
        apart.append(difference(decode(file, recipe), WALL).mean_levels)
    assert sizes == sorted(sizes)
    assert apart == sorted(apart, reverse=True)
    assert 0 < apart[-1] < 3
    assert sizes[1] < len(encode(WALL, recipe_of(None, None), texts={}, png_level=1)) / 2


def test_a_jpeg_keeps_the_colour_of_every_pixel() -> None:
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2, 0] = 255
    recipe = recipe_of("jpeg", 100)
    assert difference(decode(encode(stripes, recipe, texts={}, png_level=1), recipe), stripes).levels < 16


@pytest.mark.parametrize(("format_", "quality"), [("webp", None), ("webp", 80), ("jpeg", 90)])
@pytest.mark.parametrize("prompt", ["plain", "Mörtel 裂 \U0001f9f1"])
def test_the_recipe_travels_in_the_exif(format_: str, quality: int | None, prompt: str) -> None:
    recipe = recipe_of(format_, quality, prompt=prompt)
    texts = metadata(recipe, names=NAMES, labels={"site": "Süd"})
    file = encode(WALL, recipe, texts=texts, png_level=1)
    with Image.open(io.BytesIO(file)) as image:
        found = image.getexif()
    comment = found.get_ifd(EXIF_IFD)[USER_COMMENT]
    assert comment.removeprefix(UNICODE).decode("utf-16-be") == texts["parameters"]
    told = json.loads(found[DESCRIPTION])
    assert told == json.loads(texts["farm"])
    assert Recipe.parse(told["recipe"]) == recipe
    assert imagefile.check(file, 10**6).media_type == f"image/{format_}", "may be sent back as a picture to start from"


@pytest.mark.parametrize("letter", ["x", "ß", "裂", "\U0001f9f1"])
def test_whatever_is_let_in_has_room_in_a_jpeg(letter: str) -> None:
    """The limit at submission is never below what the worker writes, and not far above it."""
    names = {**NAMES, "checkpoint": letter * 200, "vae": letter * 200}
    labels = {str(key): letter * 500 for key in range(8)}

    def recipe_with(length: int) -> tuple[Recipe, bool]:
        body = {**RECIPE.model_dump(mode="json", exclude_none=True), "format": "jpeg", "quality": 90}
        body |= {"prompt": letter * length, "negative_prompt": letter * length}
        told = [json.dumps(one, ensure_ascii=False).encode() for one in (names, labels)]
        return Recipe.parse(body), refuse_crowded(body, *told) is None

    most = max(length for length in range(50, 12_001, 50) if recipe_with(length)[1])
    recipe, _ = recipe_with(most)
    texts = metadata(recipe, names=names, labels=labels)
    assert EXIF_ROOM * 0.8 < len(exif(texts)) < 65_533
    encode(WALL, recipe, texts=texts, png_level=1)


@pytest.mark.parametrize("fps", [1, 7, 60])
def test_an_animation_holds_exactly_its_frames(fps: int) -> None:
    frames = np.random.default_rng(1).integers(0, 256, (5, 33, 97, 3)).astype(np.uint8)
    # Equal neighbours are one frame of the file, shown longer.
    frames[2] = frames[1]
    made = encode_animation(frames, fps=fps, texts={})
    assert np.array_equal(decode_animation(made, frames=5, fps=fps), frames)
    with Image.open(io.BytesIO(made)) as image:
        assert len(list(ImageSequence.Iterator(image))) == 4
        assert not image.getexif(), "no text"


def test_an_animation_that_stands_still_holds_its_frames_too() -> None:
    frames = np.repeat(np.random.default_rng(1).integers(0, 256, (1, 33, 97, 3)).astype(np.uint8), 6, axis=0)
    assert np.array_equal(decode_animation(encode_animation(frames, fps=8, texts={}), frames=6, fps=8), frames)


def test_an_animation_says_what_it_is() -> None:
    recipe = RECIPE.model_copy(update={"prompt": "ein Riß 裂", "motion": "c" * 64, "frames": 2, "fps": 4})
    texts = metadata(recipe, names={**NAMES, "motion": "wind"}, labels={})
    with Image.open(io.BytesIO(encode_animation(np.zeros((2, 8, 8, 3), np.uint8), fps=4, texts=texts))) as image:
        exif = image.getexif()
    comment = exif.get_ifd(EXIF_IFD)[USER_COMMENT]
    assert comment.removeprefix(UNICODE).decode("utf-16-be") == texts["parameters"]
    assert "Motion: wind, Frames: 2" in texts["parameters"]
    assert Recipe.parse(json.loads(exif[DESCRIPTION])["recipe"]) == recipe


@pytest.fixture
def executor(database: Database, store: Store, settings: Settings, farm: Queue) -> Executor:
    return Executor(database, store, StubRenderer(), settings, farm.worker)


def test_every_format_of_one_lane_is_stored_as_what_it_is(executor: Executor, farm: Queue, store: Store) -> None:
    wanted: list[dict[str, Any]] = [
        {"format": "png"},
        {"format": "webp"},
        {"format": "webp", "quality": 80},
        {"format": "jpeg"},
    ]
    batch = farm.submit([{"prompt": "a crack", "seed": 7, **one} for one in wanted])
    assert executor.work_once()
    made = farm.do(jobs.list_jobs, farm.project, batch=batch.id).items
    assert [job.state for job in made] == [JobState.SUCCEEDED] * 4, "in one micro-batch"
    assert [(job.format, job.quality, job.suffix) for job in made] == [
        ("png", None, "png"), ("webp", None, "webp"), ("webp", 80, "webp"), ("jpeg", 90, "jpg"),
    ]  # fmt: skip
    for job in made:
        image = farm.do(jobs.image_of, farm.project, job.id)
        answer = httpx.get(store.presign(image.key, "picture", 60))
        file = answer.content
        assert (sha256(file).hexdigest(), len(file)) == (job.image.sha256, job.image.bytes)
        assert image.key.endswith(f"{job.image.sha256}.{job.suffix}")
        kinds = {answer.headers["content-type"], imagefile.check(file, 10**6).media_type}
        assert kinds == {f"image/{job.format}"}


@pytest.mark.parametrize("wanted", [{"format": "webp"}, {"format": "webp", "quality": 70}, {"format": "jpeg"}])
def test_a_replay_compares_what_the_files_show(
    executor: Executor, farm: Queue, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, Any]
) -> None:
    batch = farm.submit([{"prompt": "a crack", "seed": 7, **wanted}])
    assert executor.work_once()
    original = farm.do(jobs.list_jobs, farm.project, batch=batch.id).items[0]
    assert replayed(executor, farm, original.id) == (0, 0.0)
    real = stub_worker.picture

    def other(recipe: Recipe) -> Pixels:
        made = real(recipe).copy()
        made[:32] = 255 - made[:32]
        return made

    monkeypatch.setattr(stub_worker, "picture", other)
    levels, mean = replayed(executor, farm, original.id)
    assert levels > 100
    assert mean > 10


def replayed(executor: Executor, farm: Queue, job_id: object) -> tuple[int, float]:
    replay = farm.do(jobs.replay_job, farm.project, job_id)
    assert executor.work_once()
    found = farm.do(jobs.get_job, farm.project, replay.id).replay
    return found.levels, found.mean_levels
