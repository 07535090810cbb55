"""Models of true geometry with random weights, built in memory: nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers import UNet2DConditionModel as UNet
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

CRACK_TINY = Path(__file__).parent.parent / "farm" / "assets" / "crack-tiny"
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}

SD_UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TOY_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


@dataclass(frozen=True)
class Model:
    """A diffusers pipeline, its pictures' side in pixels, and where its LCM-LoRA lies (None: random factors)."""

    pipe: Any
    side: int
    family: str
    acceleration: Path | None = None


def text_config(width: int, layers: int, heads: int, act: str = "quick_gelu", projection: int = 768) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=act,
        projection_dim=projection,
    )


def build(name: str, device: torch.device, dtype: torch.dtype) -> Model:
    """A model by name, on the device: `sd15`, `sdxl`, `toy` (random weights) or `crack-tiny`."""
    if name == "crack-tiny":
        pipe = StableDiffusionPipeline.from_pretrained(CRACK_TINY, torch_dtype=dtype, safety_checker=None)
        return Model(pipe.to(device), 128, "sd", CRACK_TINY / "lcm-lora.safetensors")
    torch.manual_seed(0)
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    with torch.device(device):
        if name == "sdxl":
            pipe = StableDiffusionXLPipeline(
                vae=AutoencoderKL(**VAE, scaling_factor=0.13025, sample_size=1024),
                text_encoder=CLIPTextModel(text_config(768, 12, 12)),
                text_encoder_2=CLIPTextModelWithProjection(text_config(1280, 32, 20, "gelu", 1280)),
                tokenizer=None,
                tokenizer_2=None,
                unet=UNet(**SDXL_UNET),
                scheduler=scheduler,
                add_watermarker=False,
            )
            side = 1024
        else:
            toy = name == "toy"
            narrow = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
            pipe = StableDiffusionPipeline(
                vae=AutoencoderKL(**{**VAE, **(narrow if toy else {})}),
                text_encoder=CLIPTextModel(text_config(16, 1, 2) if toy else text_config(768, 12, 12)),
                tokenizer=None,
                unet=UNet(**(TOY_UNET if toy else SD_UNET)),
                scheduler=scheduler,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
            side = 64 if toy else 512
    return Model(pipe.to(device, dtype), side, "sdxl" if name == "sdxl" else "sd")
