"""The benchmark of the engine runs, at toy scale: every rung, the swaps, the slots. Speed is not judged here.

That it needs nothing of the farm's own surroundings is an import contract.
"""

import json
from pathlib import Path

from benchmarks.engine import main


def test_the_ladder_at_toy_scale(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    toy = ["--model", "toy", "--micro-batch", "2", "--repeats", "1", "--rank", "4", "--backend", "eager"]
    main([*toy, "--part", "ladder", "swap", "--out", str(out)])
    found = json.loads(out.read_text())
    rungs = ["plain", "merged", "channels-last", "uint8", "sampler", "prompts", "parts", "compiled"]
    assert [(row["rung"], row["micro_batch"]) for row in found["ladder"]] == [(rung, 2) for rung in rungs]
    assert all(row["share_of_limit"] > 0 and row["images_per_second"] > 0 for row in found["ladder"])
    assert found["swap"]["times"] > 0
    # Tracing costs more than all else here; that slots can be traced is shown where they are tested.
    found = main([*toy, "--part", "slots", "--no-compile"])
    assert found["slots"]["micro_batch"] == 2
    assert found["slots"]["ratio"] > 0
