"""The base model: a CLIP text encoder and a UNet learn to take the noise out of latents.

The UNet predicts velocity (v = signal * noise - sigma * clean) on a schedule that ends in noise alone,
as in "Common Diffusion Noise Schedules and Sample Steps are Flawed" (Lin et al. 2023). With the
schedule of Stable Diffusion 1.x the last timestep still shows the mean of the picture, so the model
reads a wall's colour from the noise and learns late, or never, to take it from the words.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from workers.training.autoencoder import to_tensor
from workers.training.errors import TrainingError
from workers.training.loop import Average, Plan, Say, train
from workers.training.pool import Pool

Words = Callable[[NDArray[np.int64], np.random.Generator], list[str]]


@dataclass(frozen=True, slots=True)
class Meanings:
    """Captions with what they are about.

    `kinds` says how many answers each question has; `draw(count, rng)` gives captions and, for each
    question, the number of the right answer (count,).
    """

    kinds: dict[str, int]
    draw: Callable[[int, np.random.Generator], tuple[list[str], dict[str, NDArray[np.int64]]]]


@dataclass(frozen=True, slots=True)
class Size:
    """Widths of the two networks."""

    channels: tuple[int, int, int] = (96, 160, 192)
    heads: int = 4
    text_width: int = 160
    text_layers: int = 3
    latent: int = 8
    grid: int = 16


def scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1.x, rescaled to end in noise without any signal."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_unet(size: Size) -> UNet2DConditionModel:
    """An untrained UNet of three resolutions with cross attention at the middle one and the core.

    Attention over all 256 places of the finest grid would take half of the time of a step on a CPU. What the words
    say of the whole picture, such as the direction of a crack, reaches every block beside the timestep instead:
    `addition_embed_type="text"` pools the text states.
    """
    unet = UNet2DConditionModel(
        sample_size=size.grid,
        in_channels=size.latent,
        out_channels=size.latent,
        block_out_channels=size.channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=size.text_width,
        attention_head_dim=size.heads,
        norm_num_groups=16,
        addition_embed_type="text",
        addition_embed_type_num_heads=size.heads,
    )
    # Plain matrix products: the backward pass of torch's fused attention is slow on CPUs.
    unet.set_attn_processor(AttnProcessor())
    return unet


def build_text(size: Size, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text model that fits the tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.text_width,
            intermediate_size=size.text_width * 4,
            projection_dim=size.text_width,
            num_hidden_layers=size.text_layers,
            num_attention_heads=4,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids (n, 77), cut and padded as the pipeline does it."""
    made = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    ids: Tensor = made.input_ids
    return ids


def encode_pool(vae: AutoencoderKL, pool: Pool, path: Path, batch: int = 32) -> NDArray[np.float16]:
    """Latents (n, c, h, w) of the pool, scaled to unit variance and kept in a file."""
    if not path.exists():
        parts = []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for start in range(0, len(pool.pixels), batch):
                pixels = to_tensor(pool.pixels[start : start + batch, :, :, :3])
                mean = vae.encode(pixels).latent_dist.mean.float()
                parts.append((mean * vae.config.scaling_factor).numpy().astype(np.float16))
        half = path.with_suffix(".part.npy")
        np.save(half, np.concatenate(parts))
        half.rename(path)
    latents: NDArray[np.float16] = np.load(path)
    if len(latents) != len(pool.pixels):
        raise TrainingError(f"{path} holds {len(latents)} latents for {len(pool.pixels)} pictures")
    return latents


def batch_of(
    latents: NDArray[np.float16], words: Words, count: int, rng: np.random.Generator
) -> tuple[Tensor, list[str], NDArray[np.int64]]:
    """A random choice of latents, float32, with a fresh caption and the number of each."""
    if not len(latents):
        raise TrainingError("there is nothing to learn from: no latents")
    chosen = rng.integers(0, len(latents), count)
    texts = words(chosen, rng)
    if len(texts) != count or not all(isinstance(t, str) and t.strip() for t in texts):
        raise TrainingError("every picture needs a caption, and none may be empty")
    data = torch.from_numpy(latents[chosen].astype(np.float32))
    return data.contiguous(memory_format=torch.channels_last), texts, chosen


def denoising_loss(
    unet: UNet2DConditionModel,
    clean: Tensor,
    states: Tensor,
    alphas: Tensor,
    *,
    kind: str = "v_prediction",
    importance: Tensor | None = None,
    placed: bool = False,
    bf16: bool = True,
) -> Tensor:
    """How badly a UNet takes new noise out of `clean` (n, c, h, w), told the words `states` (n, 77, width).

    `alphas` (1000,) is the schedule's cumulative product, `kind` what the UNet predicts: v_prediction or epsilon.
    `importance` (n, 1, h, w) says how much each place counts; without it all count alike. It counts by how little
    noise there is (alpha squared): where a crack is still to be placed, places that count more would be drawn
    more often than they are true, and every wall got a net of cracks. `placed` says that the UNet is told the places:
    then they count in full at every noise, most of all where the layout is decided.
    """
    noise = torch.randn_like(clean)
    # One timestep from each slice of the range: the loss jumps less from step to step.
    slices = (torch.arange(len(clean)) + torch.rand(len(clean))) / len(clean)
    times = (slices * 1000).long().clamp(0, 999)
    alpha = alphas[times].view(-1, 1, 1, 1)
    signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
    noisy = signal * clean + sigma * noise
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        guess = unet(noisy, times, encoder_hidden_states=states).sample
    # Min-SNR (Hang et al. 2023): nearly clean latents teach little and would drown the rest.
    certainty = 1 / (1 - alpha).clamp(min=1e-4)
    if kind == "v_prediction":
        off = guess.float() - (signal * noise - sigma * clean)
    elif kind == "epsilon":
        off = guess.float() - noise
        certainty = (alpha * certainty).clamp(min=1e-4)
    else:
        raise TrainingError(f"prediction_type {kind!r} cannot be trained; epsilon and v_prediction can")
    weight = (certainty.clamp(max=5.0) / certainty).view(-1)
    error = off.square()
    if importance is not None:
        error = error * (1 + (importance - 1) * (1.0 if placed else alpha.square()))
    total: Tensor = (error.mean((1, 2, 3)) * weight).mean()
    return total


def meaning(states: Tensor, after: Tensor) -> Tensor:
    """What captions say (n, width): the mean of their states (n, 77, width) where `after` (n, 77) is true."""
    places = after.unsqueeze(-1).to(states.dtype)
    return (states * places).sum(1) / places.sum(1)


def learn_words(
    text: CLIPTextModel,
    meanings: Meanings,
    tokenizer: CLIPTokenizer,
    *,
    plan: Plan,
    checkpoint: Path,
    batch: int = 64,
    bf16: bool = True,
    say: Say = print,
) -> nn.ModuleDict:
    """Teach the text encoder, in place, to tell what a caption means before any picture is drawn.

    Returns what names the answers: for each question a layer over the mean state after the last word (n, width).

    The places after the last word, which attention finds first because there are many of them, must
    name every part of the scene. A UNet then finds ready answers in the text instead of a moving target.
    """
    heads = nn.ModuleDict({name: nn.Linear(text.config.hidden_size, n) for name, n in meanings.kinds.items()})

    def step(_: int, rng: np.random.Generator) -> Tensor:
        texts, labels = meanings.draw(batch, rng)
        ids = token_ids(tokenizer, texts)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            states = text(ids).last_hidden_state
        mean = meaning(states.float(), ids == tokenizer.eos_token_id)
        losses = [functional.cross_entropy(head(mean), torch.from_numpy(labels[name])) for name, head in heads.items()]
        return torch.stack(losses).sum()

    text.train()
    train(step, {"text": text, "heads": heads}, plan, checkpoint, say=say)
    return heads


def fit(
    latents: NDArray[np.float16],
    words: Words,
    tokenizer: CLIPTokenizer,
    text: CLIPTextModel,
    *,
    size: Size,
    plan: Plan,
    checkpoint: Path,
    batch: int = 32,
    drop: float = 0.1,
    bf16: bool = True,
    importance: NDArray[np.float16] | None = None,
    compiled: bool = False,
    say: Say = print,
) -> UNet2DConditionModel:
    """Train a UNet on what `text` makes of captions; returns its averaged weights.

    The text encoder stays as it is. Trained along, it forgot what it had learned: after 8,500 steps the direction of
    a crack could be read from its states in 49 % of captions, before in 85 %. `drop` is the share of captions replaced
    by nothing, which makes guidance possible. `importance` (n, h, w) says how much each place of each picture counts.
    `compiled` needs a C++ compiler and takes a fifth off a step on CPUs.
    """
    torch.manual_seed(plan.seed)
    random.seed(plan.seed)
    unet = build_unet(size).to(memory_format=torch.channels_last)
    text.eval()
    alphas = scheduler().alphas_cumprod
    averages = {"unet": Average(unet)}
    # A wrapper, which leaves the UNet itself as it is: an adapter put on it later would compile it again and again.
    run = torch.compile(unet) if compiled else unet

    def step(_: int, rng: np.random.Generator) -> Tensor:
        clean, texts, chosen = batch_of(latents, words, batch, rng)
        texts = ["" if rng.random() < drop else t for t in texts]
        with torch.no_grad():
            states = text(token_ids(tokenizer, texts)).last_hidden_state
        counts = None if importance is None else torch.from_numpy(importance[chosen].astype(np.float32)).unsqueeze(1)
        return denoising_loss(run, clean, states, alphas, importance=counts, bf16=bf16)

    unet.train()
    train(step, {"unet": unet}, plan, checkpoint, averages=averages, say=say)
    averages["unet"].settle()
    unet.eval()
    return unet
