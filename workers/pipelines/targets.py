"""The weights an adapter may touch, and every name that adapter files give them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import nn

PART_ALIASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unet": (("unet",), ("lora_unet",)),
    "text_encoder": (("text_encoder", "text_encoder_one"), ("lora_te", "lora_te1")),
    "text_encoder_2": (("text_encoder_2", "text_encoder_two"), ("lora_te2",)),
}
"""For each part of a pipeline: its dotted prefixes (diffusers, DiffEngine's folders) and its kohya prefixes."""

RESNET_LDM = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
TEXT_ATTENTION_2023 = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out.0"}
"""How diffusers once spelt the attention layers of text encoders."""
OUTER_LDM = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def target_modules(parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Canonical weight name -> module, for every linear and convolution layer of these parts.

    A canonical name is `<part>.<module path>.weight`; text encoders without the `text_model.` that only some versions
    of transformers have in front.
    """
    return {
        f"{part}.{path.removeprefix('text_model.')}.weight": module
        for part, model in parts.items()
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def aliases(names: Mapping[str, object]) -> dict[str, str]:
    """Every spelling of a layer that adapter files use -> its canonical weight name."""
    found: dict[str, str] = {}
    layers = _layers_per_block(names)
    for name in names:
        part, path = name.removesuffix(".weight").split(".", 1)
        dotted, flat = PART_ALIASES[part]
        for spelling in _spellings(part, path, layers):
            for prefix in dotted:
                found[f"{prefix}.{spelling}"] = name
            for prefix in flat:
                found[f"{prefix}_{spelling.replace('.', '_')}"] = name
    return found


def _spellings(part: str, path: str, layers: int) -> Iterator[str]:
    yield path
    if part == "unet":
        yield from _ldm(path, layers)
    else:
        yield f"text_model.{path}"
        for today, once in TEXT_ATTENTION_2023.items():
            if path.endswith(f".self_attn.{today}"):
                yield f"text_model.{path.removesuffix(today)}{once}"


def _layers_per_block(names: Mapping[str, object]) -> int:
    """ResNet layers of each down block: the original (LDM) numbering of blocks counts in them."""
    found = [re.match(r"unet\.down_blocks\.0\.resnets\.(\d+)\.", name) for name in names]
    return max((int(match.group(1)) + 1 for match in found if match), default=2)


def _ldm(path: str, layers: int) -> Iterator[str]:
    """A UNet layer's names in the original Stable Diffusion code, which kohya's SDXL files use."""
    if path in OUTER_LDM:
        yield OUTER_LDM[path]
    elif middle := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", path):
        kind, number, rest = middle.groups()
        place = 1 if kind == "attentions" else 2 * int(number)
        yield f"middle_block.{place}.{RESNET_LDM.get(rest, rest)}"
    elif sampler := re.match(r"(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0\.conv", path):
        side, block = sampler[1], int(sampler[2])
        if side == "down":
            yield f"input_blocks.{(block + 1) * (layers + 1)}.0.op"
        else:
            # It comes after the block's attention, where there is one.
            place = block * (layers + 1) + layers
            yield f"output_blocks.{place}.1.conv"
            yield f"output_blocks.{place}.2.conv"
    elif match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", path):
        side, kind, rest = match[1], match[3], match[5]
        place = int(match[2]) * (layers + 1) + int(match[4])
        outer = f"input_blocks.{place + 1}" if side == "down" else f"output_blocks.{place}"
        yield f"{outer}.{int(kind == 'attentions')}.{RESNET_LDM.get(rest, rest)}"
