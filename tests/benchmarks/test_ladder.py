"""The benchmark of the engine runs, at toy scale: every rung, the swaps, the slots. Speed is not judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.targets import ELSEWHERE, MISSED, REACHED, line, missed, verdicts

ROOT = Path(__file__).parents[2]
BARE = """
import sys
from importlib.machinery import PathFinder

ABSENT = {"structlog", "orjson", "pydantic", "pydantic_settings", "sqlalchemy", "boto3", "celery", "kombu", "fastapi"}

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, path, target)

sys.meta_path[:] = [Bare if one is PathFinder else one for one in sys.meta_path]
from benchmarks.engine import main
main(sys.argv[1:])
assert not ABSENT & sys.modules.keys() - {"structlog"}
"""
"""The machine that the benchmark runs on has torch, diffusers, transformers and peft, and nothing of the farm's."""


def test_the_whole_command_at_toy_scale(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    toy = ["--model", "toy", "--micro-batch", "2", "--slots", "2", "--repeats", "1", "--rank", "4", "--device", "cpu"]
    # On a CPU nothing is compiled unless asked for; that graphs are captured needs a GPU.
    command = [sys.executable, "-c", BARE, *toy, "--compile", "on", "--backend", "eager", "--out", str(out)]
    # On several cores two pictures are computed side by side, each as one row: one picture then needs no filling up.
    one_core = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, cwd=ROOT, text=True, env=one_core)
    found = json.loads(out.read_text())
    toy_report = found["models"]["toy"]
    rungs = [
        "plain", "merged", "channels-last", "upsampling", "uint8", "decode", "sampler", "prompts", "parts", "compiled",
        "buckets",
    ]  # fmt: skip
    rows = {row["rung"]: row for row in toy_report["ladder"]}
    assert [(row["rung"], row["micro_batch"]) for row in toy_report["ladder"]] == [(rung, 2) for rung in rungs]
    assert not [row for row in rows.values() if "failed" in row]
    assert all(row["share_of_limit"] > 0 and row["images_per_second"] > 0 for row in rows.values())
    assert rows["plain"]["times_plain"] == 1
    # Served by the workers' compiler: the UNet, and the VAE's decoding.
    assert rows["compiled"]["programs"]["ready"] >= 2
    assert rows["compiled"]["programs"]["failed"] == 0
    # One picture is a size of its own, so it is not filled up to two.
    assert (rows["buckets"]["pictures"], rows["buckets"]["filled_up"]) == (1, False)
    assert rows["buckets"]["eager_images_per_second"] > 0
    assert toy_report["swap"]["times"] > 0
    assert toy_report["slots"]["micro_batch"] == 2
    assert toy_report["slots"]["ratio"] > 0
    assert {one["state"] for one in found["verdicts"]} == {ELSEWHERE}
    assert all(line(one) in done.stdout for one in found["verdicts"])


def report(plain: dict[int, float], ours: dict[int, float], rung: str, **more: Any) -> dict[str, Any]:
    """A made-up one: images a second by micro-batch."""
    rows = [
        {"rung": name, "micro_batch": count, "images_per_second": rate}
        for name, rates in (("plain", plain), (rung, ours))
        for count, rate in rates.items()
    ]
    return {"ladder": rows, **more}


def on_h200(plain: dict[int, float], ours: dict[int, float], swap: float, slots: float, **more: Any) -> dict[str, Any]:
    found = {"micro_batch": 8, "rank": 16, "slots_seconds": slots, "merged_seconds": 1.0, "ratio": slots}
    where = {"device": "cuda", "device_name": "NVIDIA H200", "dtype": "float16", **more}
    return report(plain, ours, "graphs", swap={"in_place_seconds": swap}, slots=found, **where)


def states(**reports: dict[str, Any]) -> dict[str, str]:
    return {one["promise"]: one["state"] for one in verdicts(reports)}


def test_every_target_is_judged_and_none_that_was_not_measured() -> None:
    assert set(states().values()) == {ELSEWHERE}
    good = on_h200({1: 4.0, 8: 6.0}, {1: 8.0, 8: 9.0, 16: 13.0}, swap=0.1, slots=1.10)
    found = states(sdxl=good)
    assert {state for promise, state in found.items() if promise.startswith("sdxl")} == {REACHED}
    assert {state for promise, state in found.items() if not promise.startswith("sdxl")} == {ELSEWHERE}
    bad = on_h200({1: 4.0, 8: 6.0}, {1: 7.9, 8: 7.95}, swap=0.101, slots=1.11)
    found = states(sdxl=bad)
    assert {state for promise, state in found.items() if promise.startswith("sdxl")} == {MISSED}
    sd15 = on_h200({1: 20.0}, {1: 60.0}, swap=0.03, slots=1.0)
    of_it = [state for promise, state in states(sd15=sd15).items() if promise.startswith("sd15")]
    assert of_it == [REACHED, REACHED, REACHED, MISSED, REACHED, REACHED]
    assert not missed(verdicts({"sd15": sd15})), "an aim is no promise"
    assert missed(verdicts({"sdxl": bad}))


def test_another_device_and_other_sizes_are_told_but_not_judged() -> None:
    other = on_h200({1: 4.0}, {1: 1.0}, swap=9.0, slots=9.0, device_name="another GPU")
    found = [one for one in verdicts({"sdxl": other}) if one["promise"].startswith("sdxl")]
    assert {one["state"] for one in found} == {ELSEWHERE}
    assert all(one["figure"] and line(one).endswith(f"{one['ratio']:.2f}") for one in found)
    few = on_h200({1: 4.0}, {1: 8.0}, swap=0.1, slots=9.0)
    few["slots"]["micro_batch"] = 4
    assert [state for promise, state in states(sdxl=few).items() if "in slots" in promise] == [ELSEWHERE] * 2
    failed = on_h200({}, {1: 8.0}, swap=0.1, slots=1.0)
    failed["ladder"].append({"rung": "plain", "micro_batch": 1, "failed": "OutOfMemoryError: no room"})
    assert [
        state for promise, state in states(sdxl=failed).items() if "sdxl" in promise and "times plain" in promise
    ] == [
        ELSEWHERE,
        ELSEWHERE,
    ]


def test_what_is_promised_of_two_cores() -> None:
    swap = {"in_place_seconds": 0.005, "reload_seconds": 0.1, "times": 20.0}
    where = {"device": "cpu", "dtype": "float32", "swap": swap}

    def judged(ours: dict[int, float], threads: int = 2) -> list[str]:
        found = verdicts({"crack-tiny": report({1: 10.0, 8: 20.0}, ours, "parts", threads=threads, **where)})
        return [one["state"] for one in found if one["promise"].startswith("crack-tiny")]

    assert judged({1: 13.0, 8: 12.0}) == [REACHED] * 3
    assert judged({1: 12.0, 8: 13.0}) == [MISSED, REACHED, REACHED]
    assert judged({8: 12.0}) == [ELSEWHERE, MISSED, REACHED]
    assert judged({1: 13.0}, threads=1) == [ELSEWHERE] * 3
