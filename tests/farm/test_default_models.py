"""The models that come with the package: what is registered at the first start, and again at the next."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from farm import catalogue
from farm.storage import Store
from tests.farm.conftest import Queue


def test_the_default_model_brings_its_styles(
    queue: Queue, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assets = tmp_path / "crack-tiny"
    shutil.copytree(catalogue.ASSETS, assets, ignore=shutil.ignore_patterns("style-*"))
    monkeypatch.setattr(catalogue, "ASSETS", assets)
    queue.do(catalogue.install_default, store)
    adapters = {one.name: one for one in queue.do(catalogue.list_adapters)}
    assert set(adapters) == {"crack-tiny-lcm"}
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    for value in (1.0, 2.0):
        tensors = {
            f"{key}.lora_down.weight": np.full((2, 160), value, np.float16),
            f"{key}.lora_up.weight": np.zeros((192, 2), np.float16),
        }
        save_file(tensors, assets / "style-night.safetensors")
        queue.do(catalogue.install_default, store)
        found = {one.name: one for one in queue.do(catalogue.list_adapters)}
        assert found["crack-tiny-lcm"] == adapters["crack-tiny-lcm"], "what is there already stays"
        night = found["crack-tiny-night"]
        assert (night.kind, night.family, night.state) == ("style", "crack-tiny", "available")
        assert night != adapters.get("crack-tiny-night"), "a new file under the same name replaces the old one"
        queue.do(catalogue.install_default, store)
        assert {one.name: one for one in queue.do(catalogue.list_adapters)} == found
        adapters = found


def test_it_brings_its_controlnets_too(
    queue: Queue, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assets = tmp_path / "crack-tiny"
    shutil.copytree(catalogue.ASSETS, assets, ignore=shutil.ignore_patterns("style-*", "control-*"))
    monkeypatch.setattr(catalogue, "ASSETS", assets)
    queue.do(catalogue.install_default, store)
    assert queue.do(catalogue.list_controlnets) == []
    (base,) = queue.do(catalogue.list_checkpoints)
    made = assets / "control-mask"
    made.mkdir()
    (made / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    save_file({"conv_in.weight": np.zeros((96, 8, 3, 3), np.float16)}, made / "diffusion_pytorch_model.safetensors")
    queue.do(catalogue.install_default, store)
    (net,) = queue.do(catalogue.list_controlnets)
    assert (net.name, net.family, net.state) == ("crack-tiny-mask", "crack-tiny", "available")
    stored = queue.do(catalogue.files, net.hash)
    assert {file.path for file in stored} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert all(store.exists(file.key) for file in stored)
    assert queue.do(catalogue.list_checkpoints) == [base], "what lies in its folder is no part of the checkpoint"
