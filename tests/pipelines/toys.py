"""Checkpoints and adapters of toy width in the real file formats: milliseconds to render, random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WIDTH = 16
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer that knows letters only."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def text_config(reader: CLIPTokenizer, width: int = WIDTH) -> CLIPTextConfig:
    size = len(reader)
    return CLIPTextConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )


def vae(**changes: Any) -> AutoencoderKL:
    options: dict[str, Any] = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 64,
    }
    return AutoencoderKL(**{**options, **changes})


def unet(**changes: Any) -> UNet2DConditionModel:
    options: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**options, **changes})


def sd(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A StableDiffusionPipeline folder in the layout of SD 1.5; `changes` of its UNet."""
    torch.manual_seed(seed)
    reader = tokenizer(folder / "letters")
    pipeline = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(reader)),
        tokenizer=reader,
        unet=unet(**changes),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "checkpoint", safe_serialization=True)
    return folder / "checkpoint"


def sdxl(folder: Path, **changes: Any) -> Path:
    """A StableDiffusionXLPipeline folder: two text encoders, linear projections, time ids."""
    torch.manual_seed(1)
    reader = tokenizer(folder / "letters")
    second = text_config(reader, 24)
    options: dict[str, Any] = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": WIDTH + 24,
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 24,
    }
    wide = unet(**{**options, **changes})
    pipeline = StableDiffusionXLPipeline(
        vae=vae(force_upcast=True),
        text_encoder=CLIPTextModel(text_config(reader)),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=reader,
        tokenizer_2=reader,
        unet=wide,
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder / "checkpoint", safe_serialization=True)
    return folder / "checkpoint"


def controlnet(folder: Path, checkpoint: Path, seed: int = 5, **changes: Any) -> Path:
    """A ControlNet for a checkpoint's UNet, with what training would have made of its zero convolutions."""
    torch.manual_seed(seed)
    of = UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet", local_files_only=True)
    made = ControlNetModel.from_unet(of, conditioning_embedding_out_channels=(4, 8, 8, 8), **changes)
    for layer in (*made.controlnet_down_blocks, made.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=0.2)
    for layer in made.controlnet_cond_embedding.modules():
        if isinstance(layer, torch.nn.Conv2d):
            # As torch begins, each layer leaves a third of a picture, and whatever is followed looks the same.
            torch.nn.init.kaiming_normal_(layer.weight)
    torch.nn.init.normal_(made.controlnet_cond_embedding.conv_out.weight)
    made.save_pretrained(folder, safe_serialization=True)
    return folder


def motion(folder: Path, seed: int = 8, **changes: Any) -> Path:
    """A motion adapter for the UNets above, in the layout of AnimateDiff's and AnimateLCM's diffusers folders."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "motion_layers_per_block": 2,
        "motion_num_attention_heads": 2,
        "motion_norm_num_groups": 4,
        "motion_max_seq_length": 8,
        "use_motion_mid_block": True,
    }
    MotionAdapter(**{**options, **changes}).save_pretrained(folder, safe_serialization=True)
    return folder


def ssd1b(folder: Path) -> Path:
    """The same with SSD-1B's pruning: fewer transformers, not the same number everywhere, none in the middle."""
    return sdxl(
        folder,
        mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=[1, [1, 2]],
        reverse_transformer_layers_per_block=[[1, 2, 3], 1],
    )


Changes = Mapping[str, tuple[Tensor, Tensor, float]]
"""Layer (`unet.<path>`, `text_encoder.<path>`) -> (down, up, alpha)."""


def changes(layers: Mapping[str, tuple[int, ...]], rank: int = 4, seed: int = 0, strength: float = 0.3) -> Changes:
    """Random factors for layers whose weight shapes are given."""
    source = torch.Generator().manual_seed(seed)
    made = {}
    for layer, shape in layers.items():
        down = torch.randn((rank, *shape[1:]), generator=source) * strength
        up = torch.randn((shape[0], rank, *((1, 1) if len(shape) == 4 else ())), generator=source) * strength
        made[layer] = (down, up, float(rank // 2))
    return made


KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te"}
KOHYA_XL = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def kohya(path: Path, of: Changes, prefixes: Mapping[str, str] | None = None) -> Path:
    tensors = {}
    for layer, (down, up, alpha) in of.items():
        part, rest = layer.split(".", 1)
        inner = f"text_model.{rest}" if part != "unet" else rest
        name = f"{(prefixes or KOHYA)[part]}_{inner.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = up
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, {"ss_network_module": "networks.lora"})
    return path


def diffusers_file(path: Path, of: Changes) -> Path:
    """As diffusers saves it today: alpha in the header, prefixed with the part."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for layer, (down, up, alpha) in of.items():
        tensors[f"{layer}.lora_A.weight"] = down
        tensors[f"{layer}.lora_B.weight"] = up
        part, rest = layer.split(".", 1)
        metadata |= {f"{part}.r": down.shape[0], f"{part}.lora_alpha": alpha}
        metadata.setdefault(f"{part}.target_modules", []).append(rest)
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)})
    return path


def peft_folder(path: Path, of: Changes, folders: Mapping[str, str]) -> Path:
    """As DiffEngine writes it: a folder for each part, alpha in adapter_config.json."""
    for part, folder in folders.items():
        mine = {layer.split(".", 1)[1]: factors for layer, factors in of.items() if layer.startswith(f"{part}.")}
        (path / folder).mkdir(parents=True)
        tensors = {}
        for layer, (down, up, _) in mine.items():
            tensors[f"base_model.model.{layer}.lora_A.weight"] = down
            tensors[f"base_model.model.{layer}.lora_B.weight"] = up
        first, _, alpha = next(iter(mine.values()))
        save_file(tensors, path / folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": first.shape[0], "lora_alpha": alpha, "use_rslora": False, "use_dora": False}
        (path / folder / "adapter_config.json").write_text(json.dumps(config))
    return path
