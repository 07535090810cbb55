"""The benchmark of the engine runs, at toy scale: every rung, the swaps, the slots. Speed is not judged here."""

import json
from pathlib import Path

import grimp

from benchmarks.engine import main

ABSENT = {"structlog", "orjson", "pydantic", "sqlalchemy", "farm.settings", "farm.recipe"}
"""What the machine may lack that the benchmark runs on: it has torch, diffusers, transformers and peft."""


def test_it_needs_nothing_of_the_farms_surroundings() -> None:
    graph = grimp.build_graph(
        "benchmarks",
        "workers",
        "farm",
        include_external_packages=True,
        exclude_type_checking_imports=True,
        cache_dir=None,
    )
    needed = graph.find_upstream_modules("benchmarks.engine")
    assert "workers.pipelines.slots" in needed
    assert not needed & ABSENT


def test_the_ladder_at_toy_scale(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    toy = ["--model", "toy", "--micro-batch", "2", "--repeats", "1", "--rank", "4", "--backend", "eager"]
    main([*toy, "--part", "ladder", "swap", "--out", str(out)])
    found = json.loads(out.read_text())
    rungs = ["plain", "merged", "channels-last", "uint8", "sampler", "prompts", "parts", "compiled"]
    assert [(row["rung"], row["micro_batch"]) for row in found["ladder"]] == [(rung, 2) for rung in rungs]
    assert all(row["share_of_limit"] > 0 and row["images_per_second"] > 0 for row in found["ladder"])
    assert found["swap"]["times"] > 0
    # On a CPU nothing is compiled, as in workers; that slots can be is shown where they are tested.
    found = main([*toy, "--part", "slots"])
    assert found["slots"]["micro_batch"] == 2
    assert found["slots"]["ratio"] > 0
