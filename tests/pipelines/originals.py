"""Toy checkpoints in the original one-file layout, written by rules of their own, not by the converter's tables."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor

from farm import families
from workers.pipelines import structure

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTER = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}  # fmt: skip


def template(folder: Path) -> dict[str, Any]:
    """A toy folder's configurations as the farm keeps those of its known families."""
    parts = [path.parent.name for path in folder.glob("*/config.json")]
    found = {part: json.loads((folder / part / "config.json").read_text()) for part in parts}
    found["model_index"] = json.loads((folder / "model_index.json").read_text())
    found["scheduler"] = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return found | {"tokenizer": {"pad_token": "<|endoftext|>"}, "tokenizer_2": {"pad_token": "!"}}


def pretend(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Until the test ends every known family looks like the toy of this folder.

    Nothing of it is remembered: whatever test comes next would take toys for the real ones.
    """
    families._known()
    monkeypatch.setattr(structure, "known_shapes", structure.known_shapes.__wrapped__)
    monkeypatch.setattr(families, "template", lambda _family: template(folder))


def original(folder: Path, path: Path, **more: Tensor) -> Path:
    """A toy pipeline's folder as one file, in half precision where a web UI would save that."""
    xl = (folder / "text_encoder_2").exists()
    pipeline = (StableDiffusionXLPipeline if xl else StableDiffusionPipeline).from_pretrained(str(folder))
    tensors = {f"model.diffusion_model.{key}": value for key, value in unet(pipeline.unet.state_dict()).items()}
    tensors |= {f"first_stage_model.{key}": value for key, value in vae(pipeline.vae.state_dict()).items()}
    front = "conditioner.embedders.0" if xl else "cond_stage_model"
    for key, value in pipeline.text_encoder.state_dict().items():
        tensors[f"{front}.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    if xl:
        second = open_clip(pipeline.text_encoder_2.state_dict())
        tensors |= {f"conditioner.embedders.1.model.{key}": value for key, value in second.items()}
    save_file({key: value.contiguous().clone() for key, value in {**tensors, **more}.items()}, path)
    return path


def unet(state: Mapping[str, Tensor], layers: int = 2) -> dict[str, Tensor]:
    crossing = {match[0] for key in state if (match := re.match(r"up_blocks\.\d+\.attentions", key))}

    def name(key: str) -> str:
        head, _, tail = key.rpartition(".")
        if head in OUTER:
            return f"{OUTER[head]}.{tail}"
        part, _, rest = re.sub(r"^(down|up)_blocks\.(\d+)", r"\1 \2", key).partition(".")
        kind, _, rest = rest.partition(".")
        number, _, rest = rest.partition(".")
        if part == "mid_block":
            place = "middle_block.1" if kind == "attentions" else f"middle_block.{2 * int(number)}"
        else:
            side, block = part.split()
            start = int(block) * (layers + 1)
            if kind == "downsamplers":
                return f"input_blocks.{start + layers + 1}.0.op.{tail}"
            if kind == "upsamplers":
                slot = 2 if f"up_blocks.{block}.attentions" in crossing else 1
                return f"output_blocks.{start + layers}.{slot}.conv.{tail}"
            outer = (
                f"input_blocks.{start + int(number) + 1}" if side == "down" else f"output_blocks.{start + int(number)}"
            )
            place = f"{outer}.{int(kind == 'attentions')}"
        if kind == "resnets":
            layer, _, tail = rest.rpartition(".")
            rest = f"{RESNET[layer]}.{tail}"
        return f"{place}.{rest}"

    return {name(key): value for key, value in state.items()}


def vae(state: Mapping[str, Tensor], blocks: int = 4) -> dict[str, Tensor]:
    made = {}
    for key, value in state.items():
        name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets", lambda match: f"up.{blocks - 1 - int(match[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
        if "mid_block.attentions.0." in name:
            layer = name.partition("mid_block.attentions.0.")[2].rpartition(".")[0]
            name = name.replace(f"mid_block.attentions.0.{layer}", f"mid.attn_1.{VAE_ATTENTION[layer]}")
            # The original has 1x1 convolutions here.
            made[name] = value[:, :, None, None] if value.ndim == 2 else value
        else:
            made[name] = value
    return made


def open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain = {key.removeprefix("text_model."): value for key, value in state.items()}
    made = {
        "token_embedding.weight": plain["embeddings.token_embedding.weight"],
        "positional_embedding": plain["embeddings.position_embedding.weight"],
        "ln_final.weight": plain["final_layer_norm.weight"],
        "ln_final.bias": plain["final_layer_norm.bias"],
        "text_projection": plain["text_projection.weight"].T,
        "logit_scale": torch.tensor(4.6),
    }
    for key, value in plain.items():
        if match := re.match(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key):
            number, layer, tail = match.groups()
            if layer in OPEN_CLIP:
                made[f"transformer.resblocks.{number}.{OPEN_CLIP[layer]}.{tail}"] = value
            elif layer == "self_attn.q_proj":
                each = [plain[f"encoder.layers.{number}.self_attn.{one}_proj.{tail}"] for one in "qkv"]
                made[f"transformer.resblocks.{number}.attn.in_proj_{tail}"] = torch.cat(each)
    return made
