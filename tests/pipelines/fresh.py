"""`python -m tests.pipelines.fresh FILE`: micro-batches in a process that did nothing before; prints their hashes."""

import hashlib
import json
import sys
from pathlib import Path

import torch

from farm.recipe import Recipe
from tests.pipelines.conftest import farm_settings, go_on
from workers.pipelines.engine import Engine


def main() -> None:
    torch.set_num_threads(1)
    asked = json.loads(Path(sys.argv[1]).read_text())
    engine = Engine(farm_settings(**asked["settings"]), lambda name: Path(asked["places"][name]))
    hashes = []
    for part in asked["parts"]:
        recipes = [Recipe.parse(body) for body in part]
        pictures = engine.render(engine.stage(recipes), recipes, go_on)
        hashes += [hashlib.sha256(one.tobytes()).hexdigest() for one in pictures if one is not None]
    sys.stdout.write(json.dumps(hashes) + "\n")


if __name__ == "__main__":
    main()
