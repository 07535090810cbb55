"""The benchmark around the model: prompts, feature space, rows that survive a stop, verdicts. Renders with a stub."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import crack_tiny, features, prompts, verdicts
from benchmarks.crack_tiny import Bench, Judge, Pace, judged
from benchmarks.stock import Way, model_key
from farm.painter import caption, sample_scene
from farm.painter.scene import DIRECTIONS, LIGHTS, WALLS, WIDTHS


class Stub:
    """Renders grey noise and counts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, 0

    def render(self, texts: Sequence[str], seeds: Sequence[int], way: Way) -> tuple[np.ndarray, list[float]]:
        self.made += len(texts)
        pictures = [np.random.default_rng((seed, way.steps)).integers(0, 256, (128, 128, 3)) for seed in seeds]
        return np.array(pictures, np.uint8), [0.5] * len(texts)


@pytest.fixture
def stub(tmp_path: Path) -> Stub:
    return Stub(tmp_path)


def bench(stub: Stub, folder: Path) -> Bench:
    return Bench(stub, folder, folder / "teacher", Pace(0.1, 0.1))  # type: ignore[arg-type]


def test_prompts_name_everything_and_were_never_captions() -> None:
    asked = prompts.prompts(300, 5)
    assert prompts.prompts(40, 5) == asked[:40], "a shorter list is the beginning of a longer one"
    assert prompts.prompts(40, 6) != asked[:40]
    for one in asked:
        text = one.text.lower()
        assert (one.scene.wall if one.scene.wall != "concrete" else "grey") in text
        assert (one.scene.direction in text and one.scene.width in text) == one.scene.cracked
        assert ("old" in text.split()) == one.scene.old
        assert ("water" in text) == one.scene.water
    for name, words in (("wall", WALLS), ("direction", DIRECTIONS), ("width", WIDTHS), ("light", LIGHTS)):
        assert {getattr(one.scene, name) for one in asked} == set(words)
    rng = np.random.default_rng(0)
    captions = {_words(caption(sample_scene(rng), rng)) for _ in range(5_000)}
    assert not captions & {_words(one.text) for one in asked}


def _words(text: str) -> str:
    return re.sub(r"[^a-z ]", "", text.lower())


def test_the_feature_space_is_the_same_twice_and_tells_pictures_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = features.train
    monkeypatch.setattr(features, "train", lambda say: quick(pictures=64, epochs=2, say=say))
    lines: list[str] = []
    eye, name = features.open_eye(tmp_path / "one", lines.append)
    again, same = features.open_eye(tmp_path / "two", lines.append)
    assert len(lines) == 4
    features.open_eye(tmp_path / "two", lines.append)
    assert len(lines) == 4, "what is kept is not trained again"
    assert name == same
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in eye.state_dict().items())
    asked = prompts.prompts(40, 1)
    walls, others = prompts.painted(asked, 0), prompts.painted(asked, 1)
    seen = features.look(eye, walls)
    assert seen.shape == (40, features.WIDTH)
    assert features.distance(seen, seen) == pytest.approx(0, abs=1e-3)
    near, far = (features.distance(features.look(eye, one), seen) for one in (others, 255 - walls))
    assert 0 < near < far
    blurred = (walls.astype(float) + np.roll(walls, 1, 1) + np.roll(walls, 1, 2)) / 3
    assert features.sharpness(blurred.astype(np.uint8)) < features.sharpness(walls)


def test_frechet_is_the_distance_of_two_normal_distributions() -> None:
    rng = np.random.default_rng(0)
    one = rng.standard_normal((200_000, 2))
    other = one * (2.0, 1.0) + (3.0, 0.0)
    # Means 3 apart, deviations 1 and 2 along the first axis.
    assert features.frechet(one, other) == pytest.approx(9 + 1, rel=0.02)


def test_a_stopped_row_goes_on_where_it_stopped(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prompts.prompts(80, 3)
    way = Way(True, 4)
    with monkeypatch.context() as patch:
        real, calls = Stub.render, 0

        def dies_at_the_second(*given: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise KeyboardInterrupt
            return real(*given)

        patch.setattr(Stub, "render", dies_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            bench(stub, tmp_path).pictures(way, asked, "table")
    assert stub.made == crack_tiny.PIECE
    pictures = bench(stub, tmp_path).pictures(way, asked, "table")
    assert stub.made == len(pictures) == 80
    longer = prompts.prompts(96, 3)
    again = bench(stub, tmp_path).pictures(way, longer, "table")
    assert np.array_equal(again[:80], pictures)
    assert stub.made == 80 + 32, "only the last, short piece is made again"
    bench(stub, tmp_path).pictures(way, prompts.prompts(32, 4), "table")
    assert stub.made == 80 + 32 + 32, "other prompts, other pictures"


def test_a_row_is_kept_until_its_judge_changes(stub: Stub, tmp_path: Path) -> None:
    asked = prompts.prompts(16, 3)
    torch.manual_seed(0)
    judge = Judge(features.Eye().eval(), asked, prompts.painted(asked, 0), "judge one")
    row = judged(bench(stub, tmp_path), Way(False, 2, 3.0), judge)
    assert (row["passes"], row["steps"], row["lcm"]) == (4, 2, False)
    assert row["wall"] < 1
    assert row["sharpness"] > 1, "noise is sharper than walls"
    (kept,) = (tmp_path / "teacher" / "rows").glob("*.json")
    kept.write_text(kept.read_text().replace('"passes": 4', '"passes": 5'))
    assert judged(bench(stub, tmp_path), Way(False, 2, 3.0), judge)["passes"] == 5
    judge.name = "judge two"
    assert judged(bench(stub, tmp_path), Way(False, 2, 3.0), judge)["passes"] == 4
    assert stub.made == 16, "pictures are kept, judged or not"
    another = replace(bench(stub, tmp_path), folder=tmp_path / "another LCM-LoRA")
    judged(another, Way(False, 2, 3.0), judge)
    assert stub.made == 16, "the teacher's stay"
    for _ in range(2):
        judged(another, Way(True, 2), judge)
    assert stub.made == 32


def test_seconds_are_of_one_run_and_its_rows_side_by_side(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    ways, order, took = [Way(True, 4), Way(False, 2)], list[str](), iter((0.5, 0.9, 0.7, 0.8))

    def renders(texts: Sequence[str], seeds: Sequence[int], way: Way) -> tuple[None, list[float]]:
        assert len(texts) == len(seeds) == 8
        order.append(way.name)
        return None, [next(took)]

    monkeypatch.setattr(stub, "render", renders)
    found = crack_tiny.paces(stub, prompts.prompts(12, 3), ways)  # type: ignore[arg-type]
    assert found == {"lcm-4": 0.5, "ddim-2": 0.8}, "the quicker of two rounds"
    assert order == ["lcm-4", "ddim-2"] * 2


def test_what_another_device_drew_is_kept_apart(tmp_path: Path) -> None:
    (tmp_path / "lcm-lora.safetensors").write_bytes(b"1")
    here, there = (crack_tiny.shelves(tmp_path, tmp_path, 7, device) for device in ("cpu", "cuda"))
    assert len({*here, *there}) == 4
    assert here == crack_tiny.shelves(tmp_path, tmp_path, 7, "cpu")


def test_the_table_has_every_row_and_its_passes() -> None:
    ways = {way.name: way.passes for way in crack_tiny.table(3.0)}
    assert len(ways) == 14
    assert (ways["lcm-4"], ways["ddim-2-guided"], ways["ddim-4"], ways["ddim-50-guided"]) == (4, 4, 4, 100)


def test_nights_are_as_dark_as_they_are() -> None:
    def grey(*levels: int) -> np.ndarray:
        return np.stack([np.full((8, 8, 3), level, np.uint8) for level in levels])

    painted = prompts.painted_nights(prompts.prompts(4, 3))
    assert painted.mean() < 0.6 * prompts.painted(prompts.prompts(4, 3), 0).mean()
    styled = {0.0: grey(204, 204, 204, 204), 1.0: grey(51, 51, 51, 153)}
    found = crack_tiny.nights(styled, grey(*[51] * 18, 51, 102))
    assert found == {"count": 20, "painted": 0.21, "weights": {"0": 0.8, "1": 0.3}, "bright": 0.25}


def test_what_is_left_is_estimated() -> None:
    pace = Pace(0.1, 0.1)
    pace.expect(Way(True, 4), 240)
    assert pace.eta == "2 min left"
    pace.done(Way(True, 4), 10, 50.0)
    assert pace.eta == "7 min left"
    pace.left.clear()
    assert pace.eta == "less than a minute left"


def test_the_model_is_known_by_its_weights(tmp_path: Path) -> None:
    for part in ("unet", "scheduler"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
    (tmp_path / "lcm-lora.safetensors").write_bytes(b"1")
    key = model_key(tmp_path)
    (tmp_path / "README.md").write_text("# a card")
    (tmp_path / "style-night.safetensors").write_bytes(b"1")
    assert model_key(tmp_path) == key
    teacher = model_key(tmp_path, lcm=False)
    (tmp_path / "lcm-lora.safetensors").write_bytes(b"2")
    assert model_key(tmp_path) != key
    assert model_key(tmp_path, lcm=False) == teacher
    (tmp_path / "scheduler" / "config.json").write_text("[]")
    assert model_key(tmp_path, lcm=False) != teacher


def test_verdicts_name_what_is_not_reached() -> None:
    good = {"wall": 0.97, "crack": 0.96, "direction": 0.95, "hairlines": 0.92, "rising": 0.5, "distance": 1.0}
    rows = {
        "lcm-4": good,
        "lcm-8": {**good, "direction": 0.945},
        "ddim-4": {**good, "wall": 0.5, "crack": 0.5, "direction": 0.5, "distance": 9.0},
        "ddim-2-guided": {**good, "wall": 0.5, "crack": 0.97, "direction": 0.5, "distance": 9.0},
        "ddim-50-guided": {**good, "wall": 1.0, "crack": 1.0, "direction": 1.0},
    }
    found = verdicts.verdicts({"rows": rows, "seconds": {"alone": 0.8, "together": 0.3}})
    assert len(found) == 13
    assert [line["promise"] for line in found if not line["reached"]] == [
        "4 UNet passes: LCM-LoRA ahead of the teacher's 2 guided steps in everything"
    ]
    assert json.loads(json.dumps(found)) == found
    bad = {**good, "wall": 0.8, "rising": 0.1}
    worse = verdicts.verdicts({"rows": {"lcm-4": bad}, "seconds": {"alone": 1.2, "together": 1.3}})
    assert [line["reached"] for line in worse] == [False, False, False, True, True, True, False]
    none = verdicts.verdicts({"rows": {"lcm-4": {**good, "rising": None}}, "seconds": {"alone": 0.8, "together": 0.3}})
    assert len(none) == 6, "nothing is said of no diagonals"


GOOD = {"wall": 0.97, "crack": 0.96, "direction": 0.94, "hairlines": 0.92, "rising": 0.5, "distance": 1.0}
FAR = {**dict.fromkeys(verdicts.RATES, 0.5), "distance": 9.0}


@pytest.mark.parametrize(
    ("row", "changes", "promise"),
    [
        ("lcm-4", {"wall": 0.949}, "LCM-LoRA, 4 steps: wall at least 0.95"),
        ("lcm-4", {"direction": 0.895}, "LCM-LoRA, 4 steps: direction at least 0.90"),
        ("lcm-4", {"hairlines": 0.89}, "LCM-LoRA, 4 steps: hairlines at least 0.90"),
        ("lcm-4", {"rising": 0.76}, "LCM-LoRA, 4 steps: 0.25 to 0.75 of diagonal cracks rise to the right"),
        ("lcm-8", {"wall": 0.955}, "LCM-LoRA: 8 steps not worse than 4"),
        ("lcm-8", {"distance": 1.4}, "LCM-LoRA: 8 steps not worse than 4"),
        ("ddim-50-guided", {"direction": 1.001}, "LCM-LoRA, 4 steps: direction at least 0.95 of the guided teacher's"),
        ("ddim-4", {"crack": 0.96}, "4 UNet passes: LCM-LoRA ahead of the teacher's 4 unguided steps in everything"),
        ("ddim-4", {"distance": 0.9}, "4 UNet passes: LCM-LoRA ahead of the teacher's 4 unguided steps in everything"),
        ("ddim-2-guided", {"distance": 0.9}, "4 UNet passes: LCM-LoRA ahead of the teacher's 2 guided steps"),
    ],
)
def test_each_promise_is_missed_by_what_it_is_about(row: str, changes: dict[str, float], promise: str) -> None:
    rows: dict[str, dict[str, float]] = {
        "lcm-4": GOOD,
        "lcm-8": GOOD,
        "ddim-4": FAR,
        "ddim-2-guided": FAR,
        "ddim-50-guided": GOOD,
    }
    seconds = {"alone": 0.8, "together": 0.3}
    assert all(line["reached"] for line in verdicts.verdicts({"rows": rows, "seconds": seconds}))
    found = verdicts.verdicts({"rows": {**rows, row: {**rows[row], **changes}}, "seconds": seconds})
    (missed,) = [line["promise"] for line in found if not line["reached"]]
    assert missed.startswith(promise)
