"""ControlNets: read beside a checkpoint, and asked at each step for what they add to the UNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workers.pipelines.guides import Guide, control_images

if TYPE_CHECKING:
    from farm.recipe import Recipe
    from workers.pipelines.device import Device
    from workers.pipelines.load import Pipeline


@dataclass(frozen=True, eq=False)
class Controls:
    """The ControlNets of one micro-batch, the pictures each follows, (n, 3, height, width), its weight, and at which
    steps it acts."""

    nets: Sequence[Any]
    images: Sequence[Tensor]
    weights: Sequence[float]
    acting: Sequence[Sequence[bool]]

    @classmethod
    def of(cls, pipeline: Pipeline, first: Recipe, guides: Sequence[Guide], steps: int, device: Device) -> Controls:
        """Those of recipes that share their lane with `first`; `steps` is how often the UNet is asked."""
        uses = first.controls or ()
        nets = [pipeline.nets[use.hash] for use in uses]
        images = [control_images(guides, index, next(net.parameters()).dtype, device) for index, net in enumerate(nets)]
        # As diffusers has it: a step counts if all of it lies within the shares.
        acting = [
            [step / steps >= use.start and (step + 1) / steps <= use.end for step in range(steps)] for use in uses
        ]
        return cls(nets, images, [use.weight for use in uses], acting)

    def twice(self) -> Controls:
        """For rows that are computed twice, without the prompt and with it."""
        return replace(self, images=[torch.cat([image, image]) for image in self.images])

    def residuals(self, seen: Tensor, time: Tensor, step: int, part: slice, options: dict[str, Any]) -> dict[str, Any]:
        """What the UNet is told at this step beside its input, for the rows `part`; nothing where no control acts.

        `seen` and `options` (encoder_hidden_states, added_cond_kwargs) are the UNet's own inputs for those rows.
        """
        down: list[Tensor] = []
        middle: Tensor | None = None
        for net, image, weight, acting in zip(self.nets, self.images, self.weights, self.acting, strict=True):
            if not acting[step]:
                continue
            lower, deepest = net(
                seen, time, controlnet_cond=image[part], conditioning_scale=weight, return_dict=False, **options
            )
            down = [one + other for one, other in zip(down, lower, strict=True)] if down else list(lower)
            middle = deepest if middle is None else middle + deepest
        if middle is None:
            return {}
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
