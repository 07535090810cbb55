"""The benchmark of the engine runs, at toy scale: every rung, the swaps, the slots. Speed is not judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.workers.conftest import ROOT

ALONE = """
import sys
from benchmarks.engine import main
main(sys.argv[1:])
sys.exit(", ".join({"structlog", "orjson", "farm.settings", "farm.recipe"} & set(sys.modules)) or 0)
"""
"""The benchmark, which has to run where none of these can be imported."""


def test_the_ladder_at_toy_scale(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    options = "--model toy --micro-batch 1 2 --repeats 1 --rank 4 --backend eager"
    command = [sys.executable, "-c", ALONE, *options.split(), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    rungs = list(dict.fromkeys(row["rung"] for row in found["ladder"]))
    assert rungs == ["plain", "merged", "channels-last", "uint8", "sampler", "prompts", "parts", "compiled"]
    assert [row["micro_batch"] for row in found["ladder"]] == [1, 2] * len(rungs)
    assert all(row["share_of_limit"] > 0 and row["images_per_second"] > 0 for row in found["ladder"])
    assert found["swap"]["times"] > 0
    assert found["slots"]["micro_batch"] == 2
    assert found["slots"]["ratio"] > 0
