"""What the registrar refuses, from wherever it comes: state, reason, and nothing of it left to use."""

from __future__ import annotations

import json
import pickle
import struct
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from farm import catalogue
from farm.storage import Store
from farm.views import RegistrationView
from tests.pipelines import originals
from tests.registering.conftest import Bench
from tests.registering.hub import COMMIT, Hub

LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def pair(layer: str = LAYER, width: int = 16, rank: int = 4, **more: torch.Tensor) -> bytes:
    """A kohya file of one linear layer, and what is put beside it."""
    down, up = torch.ones(rank, width), torch.ones(16, rank)
    return save({f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up, **more})


def alone(*ends: str, shape: tuple[int, ...] = (4, 4)) -> bytes:
    """A file that has none of a LoRA's own keys."""
    return save({f"{LAYER}.{end}": torch.ones(shape) for end in ends})


def bomb(*, length: int | None = None, shape: tuple[int, ...] = (4,)) -> bytes:
    """A header that claims another length than its own, or more numbers than any memory holds."""
    body = json.dumps({f"{LAYER}.lora_down.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 16]}}).encode()
    return struct.pack("<Q", len(body) if length is None else length) + body + bytes(16)


SDXL = LAYER.replace("down_blocks_0", "down_blocks_1")
OTHER_FAMILY = "made for a cross-attention width of 2048, which is that of no such family (sd15 768)"


FILES: tuple[tuple[str, bytes, str], ...] = (
    ("sdxl", pair(SDXL, width=2048), OTHER_FAMILY),
    ("unknown-key", pair(surprise=torch.ones(1)), "surprise: not a LoRA key in kohya, diffusers or PEFT spelling"),
    ("sd3", pair("lora_te3_encoder"), "lora_te3_encoder.lora_down.weight: this is for another model family"),
    ("dora", pair(**{f"{LAYER}.dora_scale": torch.ones(16)}), "dora_scale: DoRA is not supported"),
    ("loha", alone("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"), "hada_w1_a: LoHa is not supported"),
    ("lokr", alone("lokr_w1", "lokr_w2", "alpha"), "lokr_w1: LoKr is not supported"),
    ("oft", alone("oft_blocks", "alpha"), "oft_blocks: OFT is not supported"),
    ("coft", alone("oft_diag", shape=(2, 4, 4)), "oft_diag: OFT is not supported"),
    ("peft-oft", save({"base_model.model.to_q.oft_R.default.weight": torch.ones(4)}), "weight: OFT is not supported"),
    ("full", alone("diff", shape=(16, 16)), "diff: full-rank differences are not supported"),
    ("pickle", pickle.dumps({"weight": [1.0]}), "this is a pickle or an archive; only safetensors"),
    ("zip", b"PK\x03\x04" + bytes(64), "this is a pickle or an archive; only safetensors"),
    ("long-header", bomb(length=1 << 40), "no sensible header length"),
    ("huge-tensor", bomb(shape=(1 << 20, 1 << 20, 1 << 20)), "16 bytes do not hold shape"),
    ("stub", b"xxxx", "not a safetensors file"),
    ("language-model", save({"model.layers.0.weight": torch.ones(1)}), "neither a checkpoint, a VAE nor an adapter"),
    ("checkpoint", save({"model.diffusion_model.x": torch.ones(1)}), "this is a checkpoint; register it as one"),
)
"""Name, contents, and what is said about it when it is registered as a style LoRA for SD 1.5."""


def test_files_that_are_refused_as_they_are(bench: Bench, store: Store) -> None:
    for name, data, reason in FILES:
        put(store, f"loras/{name}.safetensors", data)
        begun = bench.ask(name, f"s3://{store.bucket}/loras/{name}.safetensors", "style", family="sd15")
        expect(bench, begun, f"{name}.safetensors: ", reason)
    assert len(store.listing("", 100)) == len(FILES), "nothing was stored"
    begun = bench.ask("walls", f"s3://{store.bucket}/loras/sdxl.safetensors", "style", family="walls")
    expect(bench, begun, "there is no family walls; there are sd15, sdxl, ssd-1b")


def test_what_a_source_does_not_give(
    bench: Bench, store: Store, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What leads nowhere, what its owner keeps, a PEFT folder with its weights in a pickle, and what is too large."""
    for name in ("gated", "peft"):
        hub.repositories[f"toys/{name}"] = tmp_path / name
        (tmp_path / name / "unet").mkdir(parents=True)
    (tmp_path / "gated" / "style.safetensors").write_bytes(pair())
    hub.gated.add("toys/gated")
    (tmp_path / "peft" / "unet" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    (tmp_path / "peft" / "unet" / "adapter_model.bin").write_bytes(pickle.dumps({}))
    for source, reason in (
        (f"hf:toys/gated@{COMMIT}/style.safetensors", "this repository is gated; accept its terms, then set HF_TOKEN"),
        (f"hf:toys/gated@{COMMIT}/other.safetensors", "there is no such file"),
        (f"s3://{store.bucket}/loras/style.safetensors", "there is no such file"),
        (f"s3://{store.bucket}/loras", "there is nothing"),
        ("s3://nobodys-bucket/style.safetensors", "there is no bucket nobodys-bucket"),
        (f"hf:toys/peft@{COMMIT}", "unet/adapter_model.bin: this is a pickle, which is never loaded; a PEFT folder"),
    ):
        expect(bench, bench.ask("style", source, "style"), reason)
    limit = len(pair()) - 1
    monkeypatch.setattr(bench.registrar, "_settings", bench.settings.model_copy(update={"max_model_bytes": limit}))
    large = f"{limit + 1} bytes are over the limit of {limit}"
    expect(bench, bench.ask("style", f"hf:toys/gated@{COMMIT}", "style"), large)


def test_files_that_say_too_little_or_something_else(
    bench: Bench, store: Store, sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every known family looks like one toy here: a LoRA fits all of them, and a checkpoint is told by its keys."""
    originals.pretend(monkeypatch, sd_folder)
    source = f"s3://{store.bucket}/shelf.safetensors"
    put(store, "shelf.safetensors", pair())
    fits_all = "shelf.safetensors: fits sd15 and sdxl and ssd-1b alike; name the family it is made for"
    expect(bench, bench.ask("style", source, "style"), fits_all)
    put(store, "shelf.safetensors", originals.original(sd_folder, tmp_path / "toy.safetensors").read_bytes())
    expect(bench, bench.ask("toy", source, family="sdxl"), "shelf.safetensors: this is sd15, not sdxl")


def put(store: Store, key: str, data: bytes) -> None:
    store.put(key, data, "application/octet-stream", sha256(data).hexdigest())


def expect(bench: Bench, begun: RegistrationView, *reasons: str) -> None:
    ended = bench.end(begun)
    assert (ended.state, ended.hash) == ("refused", None), ended.source
    assert all(reason in (ended.reason or "") for reason in reasons), ended.reason
    assert bench.do(catalogue.list_adapters) == bench.do(catalogue.list_checkpoints) == []
