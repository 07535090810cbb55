"""SDXL and SSD-1B on their way into the farm: in their true layout at toy width, with their LCM-LoRA, to a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from farm import catalogue
from farm.families import PROFILES
from tests.pipelines import originals, toys
from tests.registering.conftest import PROFILE, Bench, render
from workers.pipelines import structure
from workers.pipelines.device import Device

pytestmark = pytest.mark.timeout(300)

LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.mark.parametrize(("family", "make"), [("sdxl", toys.sdxl), ("ssd-1b", toys.ssd1b)])
def test_a_checkpoint_and_its_lcm_lora_render_by_the_profile_of_their_family(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, make: Callable[[Path], Path]
) -> None:
    folder = make(tmp_path)
    unnamed = bench.add("unnamed", folder, profile=PROFILE)
    assert (unnamed.family[:5], unnamed.notes) == ("sdxl-", []), "a geometry of its own, and a test picture"
    # From here on the toy is what the farm knows this family to be.
    originals.pretend(monkeypatch, folder)
    ended = bench.add("toy", folder, family=family, profile={**PROFILE, "dtype": "bfloat16"})
    assert (ended.family, ended.notes) == (family, [])
    (view,) = (one for one in bench.do(catalogue.list_checkpoints) if one.name == "toy")
    assert {**PROFILES[family], **PROFILE, "dtype": "bfloat16"}.items() <= view.profile.items()
    stored = bench.registrar._models.fetch(view.hash)
    assert Device(torch.device("cuda"), torch.float16, 1, open=True).dtype_of(stored) == torch.bfloat16
    lora = toys.changes({LAYER: structure.folder_shapes(folder)[f"{LAYER}.weight"]}, strength=2.0)
    named = PROFILES[family]["acceleration"]
    fast = bench.add(named, toys.kohya(tmp_path / "fast.safetensors", lora), "acceleration", family=family)
    assert (fast.family, fast.notes) == (family, [])
    job, told = render(bench, checkpoint="toy", steps=None)
    assert [one["name"] for one in told["models"]] == ["toy", named]
    drawn = told["recipe"]
    assert (drawn["width"], drawn["steps"], drawn["guidance_scale"], drawn["scheduler"]) == (64, 4, 1.0, "lcm")
    plain, _ = render(bench, checkpoint="toy", acceleration="none")
    assert plain.image.sha256 != job.image.sha256
