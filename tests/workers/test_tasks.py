"""Jobs that draw from pictures, from the upload to the stored picture: queue, S3 and the real engine on the model that
comes with the package."""

import io
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from sqlalchemy import text

from farm import catalogue, jobs, submission, uploads
from farm.db import Database
from farm.errors import Conflict, InvalidRequest
from farm.objects import upload_key
from farm.queries import claiming
from farm.settings import Settings
from farm.states import JobState
from farm.storage import Store
from tests.farm.conftest import Queue
from workers.executor import Executor
from workers.modelstore import ModelStore
from workers.pipelines.engine import Engine
from workers.training import crack_tiny_control

PROMPT = "A single split crack on a concrete wall"
SIZE = 128


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def wall(level: int) -> np.ndarray:
    noise = np.random.default_rng(level).integers(-12, 13, (SIZE, SIZE, 1))
    return np.clip(np.full((SIZE, SIZE, 3), level) + noise, 0, 255).astype(np.uint8)


def mask() -> np.ndarray:
    made = np.zeros((SIZE, SIZE, 3), np.uint8)
    made[:, SIZE // 2 :] = 255
    return made


class Shop:
    """A farm with the default model: sends pictures, submits jobs, renders them, fetches what came of it."""

    def __init__(self, farm: Queue, database: Database, store: Store, settings: Settings) -> None:
        self.farm, self.database, self.store, self.settings = farm, database, store, settings
        farm.do(catalogue.install_default, store)
        self.engine = Engine(settings, ModelStore(database, store, settings).fetch)
        self.executor = Executor(database, store, self.engine, settings, farm.worker, end=lambda *_: None)

    def send(self, pixels: np.ndarray) -> str:
        sent, _ = uploads.add(self.database, self.store, self.settings, self.farm.project, png(pixels), "image/png")
        return sent.hash

    def submit(self, *rows: dict[str, Any]) -> list[Any]:
        known = self.farm.do(catalogue.load, self.store)
        now = self.farm.do(claiming.database_now)
        ask = uploads.Known(lambda hashes: self.farm.do(uploads.sizes, self.farm.project, hashes))
        full = [{"prompt": PROMPT, "seed": 7 + number, **row} for number, row in enumerate(rows)]
        with submission.prepare(
            full, defaults={}, catalogue=known, settings=self.settings, name="t", now=now, uploads=ask
        ) as prepared:
            batch = self.farm.do(jobs.submit, prepared, project_id=self.farm.project, pool=self.settings.pool)
        return self.jobs_of(batch)

    def jobs_of(self, batch: Any) -> list[Any]:
        return self.farm.do(jobs.list_jobs, self.farm.project, batch=batch.id).items

    def render(self) -> int:
        """Micro-batches until nothing is left; answers how many there were."""
        done = 0
        while self.executor.work_once():
            done += 1
        return done

    def job(self, job: Any) -> Any:
        return self.farm.do(jobs.get_job, self.farm.project, job.id)

    def picture(self, job: Any) -> np.ndarray:
        now = self.job(job)
        assert now.state is JobState.SUCCEEDED, now.error
        stored = self.farm.do(jobs.image_of, self.farm.project, job.id)
        with Image.open(io.BytesIO(self.store.get(stored.key))) as image:
            return np.asarray(image)


@pytest.fixture
def shop(farm: Queue, database: Database, store: Store, settings: Settings) -> Shop:
    return Shop(farm, database, store, settings.model_copy(update={"device": "cpu", "threads": 1}))


def apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other).mean())


def test_pictures_of_two_sources_and_strengths_in_one_micro_batch(shop: Shop) -> None:
    dark, bright = wall(60), wall(200)
    rows = [{"image": shop.send(dark), "strength": 0.5}, {"image": shop.send(bright), "strength": 0.6}]
    first, second = shop.submit(*rows)
    assert (first.task, first.source, first.strength) == ("img2img", rows[0]["image"], 0.5)
    assert (first.width, first.height) == (SIZE, SIZE), "as large as its picture"
    assert shop.render() == 1, "both begin at the same step"
    assert apart(shop.picture(first), dark) < apart(shop.picture(first), bright)
    assert apart(shop.picture(second), bright) < apart(shop.picture(second), dark)
    shop.submit({"image": rows[0]["image"], "strength": 0.5}, {"image": rows[0]["image"], "strength": 1.0})
    assert shop.render() == 2, "from another step on it is another lane"


def test_inpainting_leaves_the_rest_as_it_was(shop: Shop) -> None:
    source = wall(120)
    (job,) = shop.submit({"image": shop.send(source), "mask": shop.send(mask())})
    assert (job.task, job.strength, job.composite) == ("inpaint", 1.0, True)
    shop.render()
    made = shop.picture(job)
    assert np.array_equal(made[:, : SIZE // 2], source[:, : SIZE // 2])
    assert not np.array_equal(made[:, SIZE // 2 :], source[:, SIZE // 2 :])


def test_a_controlnet_that_comes_with_the_package_is_followed(
    farm: Queue, database: Database, store: Store, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of random numbers, written by the trainer's own export, lies beside the model."""
    assets = tmp_path / "crack-tiny"
    shutil.copytree(catalogue.ASSETS, assets, ignore=shutil.ignore_patterns("control-*"))
    net = crack_tiny_control.controlnet_for(UNet2DConditionModel.from_pretrained(assets / "unet"), 3)
    torch.manual_seed(0)
    torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=5.0)
    for block in (net.controlnet_mid_block, *net.controlnet_down_blocks):
        torch.nn.init.normal_(block.weight, std=0.05)
    assert crack_tiny_control.export(assets / "control-mask", net) <= crack_tiny_control.LARGEST
    monkeypatch.setattr(catalogue, "ASSETS", assets)
    shop = Shop(farm, database, store, settings.model_copy(update={"device": "cpu", "threads": 1}))
    image = shop.send(mask())
    followed = shop.submit({"seed": 3, "controls": [{"name": "crack-tiny-mask", "image": image}]})
    plain = shop.submit({"seed": 3})
    other = shop.submit({"seed": 3, "controls": [{"name": "crack-tiny-mask", "image": shop.send(mask()[:, ::-1])}]})
    assert shop.render() == 2, "with and without; masks of one micro-batch may differ"
    pictures = [shop.picture(job) for (job,) in (followed, plain, other)]
    assert min(apart(one, pictures[1]) for one in (pictures[0], pictures[2])) > 1
    # Rounding alone moves a pixel in a million; what is in the mask moves one in ten.
    assert apart(pictures[0], pictures[2]) > 0.02


def test_what_a_job_names_stays_until_the_job_goes(shop: Shop) -> None:
    source = shop.send(wall(90))
    (job,) = shop.submit({"image": source})
    with pytest.raises(Conflict, match="delete them first"):
        shop.farm.do(uploads.delete, shop.farm.project, source, shop.settings)
    shop.farm.do(lambda conn: conn.execute(text("UPDATE uploads SET used_at = used_at - interval '30 days'")))
    assert shop.farm.do(uploads.forget_unused, shop.settings, 10) == 1
    assert shop.farm.do(uploads.forget_unused, shop.settings, 10) == 0, "in use counts as used"
    shop.render()
    replay = shop.farm.do(jobs.replay_job, shop.farm.project, job.id)
    shop.farm.do(jobs.delete_job, shop.farm.project, job.id)
    shop.render()
    assert shop.job(replay).replay.levels == 0, "it still draws from the same picture"
    with pytest.raises(Conflict):
        shop.farm.do(uploads.delete, shop.farm.project, source, shop.settings)
    shop.farm.do(jobs.delete_job, shop.farm.project, replay.id)
    shop.farm.do(uploads.delete, shop.farm.project, source, shop.settings)


def test_a_picture_that_is_gone_ends_its_own_job_only(shop: Shop) -> None:
    gone, there = shop.send(wall(50)), shop.send(wall(51))
    first, second = shop.submit({"image": gone}, {"image": there})
    shop.store.delete_many([upload_key(shop.farm.project, gone)])
    shop.render()
    ended = shop.job(first)
    assert (ended.state, ended.error.code) == (JobState.FAILED, "not-found")
    assert shop.job(second).state is JobState.SUCCEEDED


def test_other_bytes_than_were_sent_are_not_drawn_from(shop: Shop) -> None:
    source = shop.send(wall(52))
    (job,) = shop.submit({"image": source})
    other = png(wall(53))
    shop.store.put(upload_key(shop.farm.project, source), other, "image/png", sha256(other).hexdigest())
    assert shop.executor.work_once()
    assert shop.job(job).error.code == "integrity"


WRONG: list[tuple[Callable[[str], dict[str, Any]], str, str]] = [
    (lambda _: {"image": "a" * 64}, "image", "there is no upload"),
    (lambda _: {"image": "A" * 64}, "image", "pattern"),
    (lambda _: {"strength": 0.5}, "strength", "needs an image"),
    (lambda one: {"mask": one}, "mask", "needs an image"),
    (lambda one: {"image": one, "composite": True}, "composite", "needs a mask"),
    (lambda one: {"image": one, "strength": 0.0}, "strength", "greater than"),
    (lambda one: {"image": one, "strength": 0.2}, "strength", "give at least 0.25"),
    (lambda one: {"image": one, "strength": 1.01}, "strength", "less than"),
    (lambda one: {"controls": [{"name": "edges", "image": one}]}, "controls.0.name", "there is no ControlNet"),
    (lambda one: {"controls": [{"name": "e", "image": one, "start": 0.5, "end": 0.5}]}, "controls.0.start", "below"),
    (lambda _: {"controls": [{"name": "e", "image": "b" * 64}]}, "controls.0.image", "there is no upload"),
    (lambda one: {"controls": [{"name": "e", "image": one}] * 5}, "controls", "at most 4"),
    (lambda _: {"frames": 8}, "frames", "needs a motion adapter"),
    (lambda _: {"fps": 8}, "fps", "needs a motion adapter"),
    (lambda _: {"motion": "wind"}, "motion", "there is no motion adapter named wind"),
    (lambda _: {"motion": "wind", "frames": 65}, "frames", "less than"),
    (lambda one: {"motion": "wind", "image": one}, "image", "does not go with motion"),
    (lambda _: {"motion": "wind", "format": "jpeg"}, "format", "stored as lossless WebP, not as jpeg"),
    (lambda _: {"motion": "wind", "format": "webp", "quality": 80}, "quality", "keeps every pixel"),
]


def test_what_does_not_go_together_is_refused_with_its_field(shop: Shop) -> None:
    one = shop.send(wall(70))
    for made, field, words in WRONG:
        with pytest.raises(InvalidRequest) as caught:
            shop.submit(made(one))
        problems = [found for found in caught.value.problems if found["field"] == field]
        assert problems, (field, caught.value.problems)
        assert words in problems[0]["problem"]
    with pytest.raises(InvalidRequest) as caught:
        shop.submit({"image": shop.send(np.zeros((40, 300, 3), np.uint8))})
    assert {found["field"] for found in caught.value.problems} == {"width", "height"}
    assert shop.submit({"image": shop.send(np.zeros((40, 300, 3), np.uint8)), "width": 128})[0].height == 128


def test_a_thousand_jobs_of_a_thousand_pictures_are_looked_up_in_pieces(shop: Shop) -> None:
    asked: list[int] = []
    known = shop.farm.do(catalogue.load, shop.store)
    now = shop.farm.do(claiming.database_now)

    def ask(hashes: Any) -> dict[str, uploads.Size]:
        asked.append(len(hashes))
        return {hash_: uploads.Size(SIZE, SIZE) for hash_ in hashes if not hash_.startswith("ff")}

    rows = [{"prompt": PROMPT, "image": f"{number:064x}"} for number in range(1200)]
    with submission.prepare(
        rows, defaults={}, catalogue=known, settings=shop.settings, name="t", now=now, uploads=uploads.Known(ask)
    ) as prepared:
        assert (prepared.jobs, prepared.lanes) == (1200, 1)
        with pytest.raises(Conflict, match="deleted meanwhile"):
            shop.farm.do(jobs.submit, prepared, project_id=shop.farm.project, pool=shop.settings.pool)
    assert asked == [500, 500, 200]
    rows[700]["image"] = "ff" * 32
    with pytest.raises(InvalidRequest) as caught:
        submission.prepare(
            rows, defaults={}, catalogue=known, settings=shop.settings, name="t", now=now, uploads=uploads.Known(ask)
        )
    assert [(found["line"], found["field"]) for found in caught.value.problems] == [(701, "image")]
