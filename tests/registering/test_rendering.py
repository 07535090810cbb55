"""What was registered, rendered as a worker renders it: toy models, the real engine, queue and store."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from farm import jobs
from farm.ids import new_id
from farm.recipe import Recipe
from tests.api.conftest import Api, address, serving, small
from tests.pipelines import toys
from tests.pipelines.conftest import with_room_for
from tests.registering.conftest import PROFILE, Bench, _never, noise
from tests.registering.hub import COMMIT, Hub
from workers.executor import Executor
from workers.modelstore import ModelStore
from workers.pipelines import costs
from workers.pipelines import engine as engines
from workers.pipelines import render as rendering
from workers.pipelines.engine import Engine
from workers.pipelines.merge import Merger

pytestmark = pytest.mark.timeout(300)

PLAIN = {"checkpoint": "toy", "acceleration": "none", "guidance_scale": 1.0}


@pytest.fixture
def api(bench: Bench) -> Iterator[Api]:
    """The API of the farm that the bench belongs to."""
    own = small(bench.settings)
    with serving(own) as server:
        running = Api(address(server), server, bench.database, own)
        yield running
        running.http.close()


def furthest(one: np.ndarray, other: np.ndarray) -> int:
    """Most levels of 255 that a pixel differs by."""
    return int(np.abs(one.astype(int) - other).max())


def test_from_a_request_to_register_to_a_picture(
    bench: Bench, api: Api, hub: Hub, sd_folder: Path, style_layers: Any, tmp_path: Path
) -> None:
    lora = tmp_path / "rust" / "pytorch_lora_weights.safetensors"
    lora.parent.mkdir()
    toys.kohya(lora, toys.changes(style_layers, strength=2.0))
    hub.repositories |= {"toys/sd": sd_folder, "toys/rust": lora.parent}
    hashes = {}
    for route, name, more in (("checkpoints", "sd", {"profile": PROFILE}), ("adapters", "rust", {})):
        asked = api.http.post(f"/{route}", json={"name": name, "source": f"hf:toys/{name}@{COMMIT}", **more})
        assert asked.status_code == 202, asked.text
        refused = api.http.post("/jobs", json={"prompt": "a crack", "checkpoint": name})
        assert refused.status_code == 422, "not before it is available"
        assert bench.registrar.once()
        ended = httpx.get(f"{api.url}{asked.headers['location']}", headers=api.http.headers).json()
        assert ended["state"] == "available", ended["reason"]
        (listed,) = api.http.get(f"/{route}").json()["items"]
        assert (listed["name"], listed["source"]["revision"]) == (name, COMMIT)
        hashes[name] = ended["hash"]

    out = io.BytesIO()
    Image.effect_noise((64, 64), 60).save(out, "PNG")
    source = api.http.post("/uploads", content=out.getvalue(), headers={"Content-Type": "image/png"}).json()["hash"]
    row = {"prompt": "a crack", "seed": 1, "steps": 2, "checkpoint": "sd", "acceleration": "none"}
    rust = [{"name": "rust", "weight": 0.8}]
    pictures = []
    for more in ({}, {"adapters": rust}, {"image": source, "strength": 0.5}):
        answer = api.http.post("/jobs", json={**row, **more})
        assert answer.status_code == 201, answer.text
        assert bench.executor.work_once()
        job = api.http.get(f"/jobs/{answer.json()['id']}").json()
        assert job["state"] == "succeeded", job["error"]
        link = api.http.get(f"/jobs/{job['id']}/image", params={"redirect": "false"}).json()["url"]
        with Image.open(io.BytesIO(httpx.get(link).content)) as image:
            image.load()
            told = json.loads(image.info["farm"])
            pictures.append(np.asarray(image))
        assert told["models"] == [
            {"name": name, "sha256": hashes[name], "source": f"hf:toys/{name}@{COMMIT}", "revision": COMMIT}
            | ({"file_sha256": told["models"][1]["file_sha256"]} if name == "rust" else {})
            for name in (["sd", "rust"] if more.get("adapters") else ["sd"])
        ]
    assert min(furthest(pictures[0], other) for other in pictures[1:]) > 1, "each is another picture"
    assert told["recipe"]["image"] == source


def test_several_controlnets_are_followed_at_once(bench: Bench, sd_folder: Path, tmp_path: Path) -> None:
    bench.add("toy", sd_folder, profile=PROFILE)
    nets = {
        name: bench.add(name, toys.controlnet(tmp_path / name, sd_folder, seed), "controlnet").hash
        for seed, name in enumerate(("edges", "depth"))
    }
    one, other = bench.picture(1), bench.picture(2)

    def row(edges: str, depth: str | None) -> dict[str, Any]:
        first = {"name": "edges", "image": edges, "weight": 1.5}
        second = {"name": "depth", "image": depth, "weight": 2.0, "end": 0.75}
        return {**PLAIN, "seed": 1, "steps": 4, "controls": [first, second] if depth else [first]}

    both, single = bench.submit(row(one, other), row(other, one), row(one, one)), bench.submit(row(one, None))
    claims = [bench.executor.work_once() for _ in range(3)]
    assert claims == [True, True, False], "whatever they follow, those of the same ControlNets are one micro-batch"
    pictures = [bench.pixels(job) for job in (*both, *single)]
    for number, picture in enumerate(pictures):
        assert min(furthest(picture, beside) for beside in pictures[:number] + pictures[number + 1 :]) > 1
    with Image.open(io.BytesIO(bench.stored(both[0]))) as image:
        image.load()
        told = json.loads(image.info["farm"])
    assert [model["name"] for model in told["models"]] == ["toy", *sorted(nets, key=lambda name: nets[name])]
    assert {use["hash"]: use["image"] for use in told["recipe"]["controls"]} == {
        nets["edges"]: one,
        nets["depth"]: other,
    }
    (warm,) = bench.engine.warm()
    assert {net["hash"] for net in warm["controlnets"]} == set(nets.values())
    # Each ControlNet follows its own picture: as without queue and store.
    direct = bench.executor.try_out(Recipe.model_validate(told["recipe"]), {one: noise(1), other: noise(2)})
    assert furthest(direct, pictures[0]) <= 1


class Clock:
    """What the engine's clock says: rendering and swapping take what a test says, everything else no time at all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.slots = self.merged = self.swap = 0.0
        """Seconds: an image with slots, one merged, a swap of adapters."""
        self.heard: list[tuple[str, int]] = []
        """How each part was rendered, and how many images it was."""
        render, apply = rendering.render, Merger.apply

        def timed(pipeline: Any, vae: Any, recipes: Sequence[Any], *rest: Any) -> Any:
            slots = rest[3] is not None
            self.heard.append(("slots" if slots else "merged", len(recipes)))
            self.now += len(recipes) * (self.slots if slots else self.merged)
            return render(pipeline, vae, recipes, *rest)

        def applied(merger: Merger, uses: Any) -> Any:
            changed = apply(merger, uses)
            self.now += self.swap if changed else 0.0
            return changed

        monkeypatch.setattr(engines, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(engines, "render", timed)
        monkeypatch.setattr(Merger, "apply", applied)


def test_different_adapters_in_one_claim_and_what_they_cost_decides_how(
    bench: Bench, sd_folder: Path, style_layers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.add("toy", sd_folder, profile=PROFILE)
    hashes = {
        bench.add(
            name, toys.kohya(tmp_path / f"{name}.safetensors", toys.changes(style_layers, 4, seed, 2.0)), "style"
        ).hash
        for seed, name in enumerate(("rust", "moss"))
    }
    clock = Clock(monkeypatch)
    monkeypatch.setattr(costs, "LEAST", 1)

    def heard(steps: int) -> tuple[list[tuple[str, int]], list[Any]]:
        """How two images of each adapter were rendered, and their jobs."""
        clock.heard.clear()
        uses = [[{"name": name, "weight": 0.9}] for name in ("rust", "moss", "rust", "moss")]
        made = bench.submit(*({**PLAIN, "steps": steps, "adapters": one} for one in uses))
        before = bench.executor.claims
        while bench.executor.work_once():
            pass
        claims.append(bench.executor.claims - before)
        return list(clock.heard), made

    claims: list[int] = []
    slots, merged = [("slots", 4)], [("merged", 2), ("merged", 2)]
    # A lane where slots are dear: they are tried, then merging is, and that remains.
    clock.slots, clock.merged = 3.0, 1.0
    way, made = heard(3)
    assert (way, claims) == (slots, [1])
    (warm,) = bench.engine.warm()
    assert {one["hash"] for one in warm["slots"]} == hashes
    mixed = [bench.pixels(job) for job in made]
    assert furthest(mixed[0], mixed[1]) > 1
    assert heard(3)[0] == slots, "the first measurement is warm-up"
    way, made = heard(3)
    assert way == merged
    assert all(furthest(bench.pixels(job), one) <= 1 for job, one in zip(made, mixed, strict=True)), "either way"
    (dear,) = bench.engine.warm_state().apart
    assert dear in bench.engine.warm()[0]["lanes"]
    assert bench.engine.costs.choose(dear, [2, 2]) == "merged"
    assert bench.executor.warm().apart == {dear}, "what the next claim is told"
    assert heard(3)[0] == merged
    assert claims == [1, 1, 1, 2], "one adapter set a claim from then on"

    # Another lane, where merging is cheaper image by image, but swapping is dear.
    clock.slots, clock.merged, clock.swap = 1.5, 1.0, 2.0
    assert [heard(4)[0] for _ in range(4)] == [slots, slots, merged, slots]
    assert claims[4:] == [1] * 4
    assert bench.engine.warm_state().apart == {dear}


def test_another_checkpoint_is_staged_while_the_device_renders(
    bench: Bench, sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetched from the store, verified and loaded by the other thread between two steps of the first."""
    shutil.copytree(toys.sd(tmp_path / "second", seed=1), tmp_path / "other")
    hashes = [
        bench.add(name, folder, profile=PROFILE).hash
        for name, folder in (("toy", sd_folder), ("other", tmp_path / "other"))
    ]
    cold = bench.settings.model_copy(update={"cache_dir": tmp_path / "cold"})
    engine = Engine(cold, ModelStore(bench.database, bench.store, cold).fetch)
    executor = Executor(bench.database, bench.store, engine, cold, new_id(), end=_never)
    executor._pace.ahead.took(1.0)
    stage, render = engine.stage, engine.render
    staged: list[str] = []
    second = Event()
    waited: list[tuple[bool, frozenset[str]]] = []

    def staging(recipes: Any, pictures: Any) -> Any:
        made = stage(recipes, pictures)
        staged.append(recipes[0].checkpoint)
        if len(staged) == 2:
            second.set()
        return made

    def drawing(held: Any, recipes: Any, on_step: Any) -> Any:
        def heard(step: int, steps: int) -> Any:
            answer = on_step(step, steps)
            if not waited and step == steps - 1:
                waited.append((second.wait(60), engine.warm_state().checkpoints))
            return answer

        return render(held, recipes, heard)

    monkeypatch.setattr(engine, "stage", staging)
    monkeypatch.setattr(engine, "render", drawing)
    made = bench.submit(*({**PLAIN, "steps": 4, "checkpoint": name} for name in ("toy", "other", "toy", "other")))
    threads = [Thread(target=executor.work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert waited == [(True, {staged[0]})], "what changes the device waits for it"
    assert set(staged) == set(hashes)
    assert len(staged) == 2
    assert engine.warm_state().checkpoints == set(hashes)
    pictures = [bench.pixels(job) for job in made]
    # The bench's own engine, one after the other.
    for job, picture in zip(made, pictures, strict=True):
        again = bench.do(jobs.replay_job, bench.project, job.id)
        assert bench.executor.work_once()
        assert bench.job(again).replay.levels <= 1
        assert picture.std() > 0


def test_too_many_for_the_device_succeed_in_parts(
    bench: Bench, sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.add("toy", sd_folder, profile=PROFILE)
    rows = [dict(PLAIN)] * 8
    whole = bench.submit(*rows)
    assert bench.executor.work_once()
    (entry,) = bench.engine._residents.resident()
    asked = with_room_for(entry.loaded.unet, 3, monkeypatch)
    halved = bench.submit(*rows)
    assert bench.executor.work_once()
    assert not bench.executor.work_once(), "one claim, and nothing comes again"
    assert asked[:2] == [8, 4], "tried at once, then as 4 + 4"
    assert set(asked[2:]) == {2}, "done as 2 + 2 + 2 + 2"
    for one, other in zip(whole, halved, strict=True):
        assert furthest(bench.pixels(one), bench.pixels(other)) <= 1
        assert bench.job(other).attempt == 1, "it costs no attempt"
