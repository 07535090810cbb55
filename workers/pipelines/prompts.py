"""Prompts to embeddings, each encoded once and alone."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from workers.pipelines.lru import Lru
from workers.pipelines.spread import Spread

if TYPE_CHECKING:
    from farm.recipe import Recipe
    from workers.pipelines.load import Pipeline

PROMPT_BYTES = 128 * 1024**2
"""Embeddings kept per checkpoint: 400 prompts of SDXL in half precision, 800 of SD 1.5."""


class Embedding(NamedTuple):
    """One encoded prompt on the device: `tokens` (1, 77, width); `pooled` (1, width) for SDXL."""

    tokens: Tensor
    pooled: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + (0 if self.pooled is None else self.pooled.nbytes)


class Text(NamedTuple):
    """What one image is told: its prompt, and its negative prompt where guidance asks for one."""

    asked: Embedding
    refused: Embedding | None


class PromptCache:
    """Embeddings by what they depend on."""

    def __init__(self, limit: int = PROMPT_BYTES) -> None:
        self._kept: Lru[Hashable, Embedding] = Lru(limit)

    def get(self, key: Hashable) -> Embedding | None:
        return self._kept.get(key)

    def put(self, key: Hashable, made: Embedding) -> None:
        self._kept.put(key, made, made.nbytes)

    def clear(self) -> None:
        self._kept.clear()

    @property
    def bytes(self) -> int:
        return self._kept.bytes


def is_guided(pipeline: Pipeline, recipe: Recipe) -> bool:
    """Whether the UNet is run twice, without the prompt and with it.

    UNets distilled with the guidance as an input (full LCM models) are told it instead.
    """
    return recipe.guidance_scale > 1 and pipeline.unet.config.time_cond_proj_dim is None


def all_known(pipeline: Pipeline, recipes: Sequence[Recipe], text_adapters: Hashable) -> bool:
    """Whether every prompt of these was encoded before, with these adapters in the text encoders."""
    wanted = {text for one in recipes for text in _prompts(pipeline, one)}
    return all(pipeline.prompts.get((text_adapters, text)) is not None for text in wanted)


def texts(pipeline: Pipeline, recipes: Sequence[Recipe], text_adapters: Hashable, spread: Spread) -> list[Text]:
    """What each image is told, encoded with the text encoders as they are now (inside the device lock)."""
    asked = embed(pipeline, [recipe.prompt for recipe in recipes], text_adapters, spread)
    if not any(is_guided(pipeline, recipe) for recipe in recipes):
        return [Text(one, None) for one in asked]
    refused = negatives(pipeline, [recipe.negative_prompt for recipe in recipes], text_adapters, spread)
    return [Text(*both) for both in zip(asked, refused, strict=True)]


def _prompts(pipeline: Pipeline, recipe: Recipe) -> tuple[str, ...]:
    return (recipe.prompt, recipe.negative_prompt) if is_guided(pipeline, recipe) else (recipe.prompt,)


def embed(pipeline: Pipeline, prompts: Sequence[str], text_adapters: Hashable, spread: Spread) -> list[Embedding]:
    """The embedding of each prompt, from the cache or made now (inside the device lock).

    `text_adapters` names the adapters merged into the text encoders. Each prompt is encoded alone, never beside its
    neighbours, and by one thread, so that an embedding has the same bits whatever micro-batch first asked for it.
    """
    found = {text: pipeline.prompts.get((text_adapters, text)) for text in prompts}
    missing = [text for text, known in found.items() if known is None]
    made = spread.run([partial(encode, pipeline, read(pipeline, text)) for text in missing], threads=1)
    for text, new in zip(missing, made, strict=True):
        pipeline.prompts.put((text_adapters, text), new)
    found.update(zip(missing, made, strict=True))
    return [one for one in map(found.get, prompts) if one is not None]


def negatives(pipeline: Pipeline, prompts: Sequence[str], text_adapters: Hashable, spread: Spread) -> list[Embedding]:
    """The embeddings of negative prompts. SDXL was trained with zeros for "no negative prompt"."""
    made = embed(pipeline, prompts, text_adapters, spread)
    if not pipeline.zero_empty_negative:
        return made
    return [
        one
        if text
        else Embedding(torch.zeros_like(one.tokens), None if one.pooled is None else torch.zeros_like(one.pooled))
        for text, one in zip(prompts, made, strict=True)
    ]


def read(pipeline: Pipeline, prompt: str) -> list[Any]:
    """Token ids and mask, (1, 77) each, for every encoder; a prompt longer than the encoder reads is cut.

    In the caller's thread: fast tokenizers refuse to be used by two threads at once.
    """
    return [
        tokenizer(
            prompt,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        for tokenizer, _ in pipeline.encoders
    ]


def encode(pipeline: Pipeline, prompt: Sequence[Any]) -> Embedding:
    """Run the text encoders over what was read, as diffusers does."""
    tokens: list[Tensor] = []
    pooled: Tensor | None = None
    for (_, model), tokenized in zip(pipeline.encoders, prompt, strict=True):
        ids = tokenized.input_ids.to(model.device)
        if pipeline.family == "sd":
            masked = getattr(model.config, "use_attention_mask", False)
            mask = tokenized.attention_mask.to(model.device) if masked else None
            tokens.append(model(ids, attention_mask=mask)[0])
        else:
            answer = model(ids, output_hidden_states=True)
            tokens.append(answer.hidden_states[-2])
            # The last encoder's projected output is the one SDXL was trained with.
            pooled = answer[0]
    joined = torch.cat(tokens, dim=-1).to(pipeline.unet.dtype)
    return Embedding(joined, None if pooled is None else pooled.to(pipeline.unet.dtype))
