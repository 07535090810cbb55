"""Motion adapters (AnimateDiff): a checkpoint's own UNet, drawing frames that belong together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import MotionAdapter, UNetMotionModel
from torch import Tensor

if TYPE_CHECKING:
    from farm.recipe import Recipe
    from workers.pipelines.load import Pipeline

SCHEDULE = {"beta_schedule": "linear"}
"""What AnimateDiff and AnimateLCM were trained with, whatever their checkpoint was: diffusers' examples set it too."""
SHARED = ("conv_in", "time_proj", "time_embedding", "conv_norm_out", "conv_act", "conv_out")


def is_motion(net: Any) -> bool:
    """Whether a net beside a checkpoint is a motion adapter, and no ControlNet."""
    return isinstance(net, MotionAdapter)


def unet_for(pipeline: Pipeline, recipe: Recipe) -> Any:
    """What draws this recipe: the checkpoint's UNet, or the one that moves it (inside the device lock)."""
    if recipe.motion is None:
        return pipeline.unet
    if recipe.motion not in pipeline.moving:
        pipeline.moving[recipe.motion] = moving(pipeline.unet, pipeline.nets[recipe.motion])
    return pipeline.moving[recipe.motion]


def moving(unet: Any, adapter: Any) -> Any:
    """A UNetMotionModel made of a UNet's own layers and an adapter's: nothing is copied, so adapters that are merged
    into the UNet are in both, and it costs the adapter's memory alone."""
    with torch.device("meta"):
        made = UNetMotionModel.from_unet2d(unet, adapter, load_weights=False)
    for name in SHARED:
        setattr(made, name, getattr(unet, name))
    blocks = [(*one.down_blocks, *one.up_blocks) for one in (made, unet, adapter)]
    for block, base, motion in zip(*blocks, strict=True):
        for name, layers in base.named_children():
            setattr(block, name, layers)
        block.motion_modules = motion.motion_modules
    if adapter.mid_block is None:
        made.mid_block = unet.mid_block
    else:
        for name, layers in unet.mid_block.named_children():
            setattr(made.mid_block, name, layers)
        made.mid_block.motion_modules = adapter.mid_block.motion_modules
    return made.requires_grad_(False).eval()


def as_pictures(latents: Tensor) -> Tensor:
    """Latents of animations (n, channels, frames, height, width) as those of their frames, one after the other."""
    return latents.transpose(1, 2).flatten(0, 1)
