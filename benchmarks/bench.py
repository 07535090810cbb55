"""One model on one device, rendered as plain diffusers does or with any of the engine's measures."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import LCMScheduler
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from benchmarks.geometry import Model, build
from workers.pipelines.factors import Adapter, Factors
from workers.pipelines.merge import Merger
from workers.pipelines.prompts import Embedding, Text
from workers.pipelines.render import decode, render
from workers.pipelines.slots import Slots
from workers.pipelines.spread import Spread
from workers.pipelines.targets import aliases, target_modules

STEPS = 4
LCM_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


class Bench:
    """One model on one device, with the measures taken so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.clock = time.process_time if options.processor_time else time.perf_counter
        self.device = torch.device(options.device)
        self.dtype = getattr(torch, options.dtype)
        self.model: Model = build(options.model, self.device, self.dtype)
        self.pipe = self.model.pipe
        self.pipe.set_progress_bar_config(disable=True)
        self.base_config = dict(self.pipe.scheduler.config)
        self.pipe.scheduler = LCMScheduler.from_config(self.pipe.scheduler.config)
        self.targets = target_modules({"unet": self.pipe.unet})
        self.merger = Merger(self.targets)
        self.slots = Slots(self.targets)
        self.lcm = self._lcm()
        self.taken: set[str] = set()
        self.known: list[Text] = []
        self.unet, self.vae = self.pipe.unet, self.pipe.vae

    def finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], repeats: int) -> float:
        """The median of `repeats` runs after two that do not count."""
        clock = self.clock
        for _ in range(2):
            call()
        found = []
        for _ in range(repeats):
            self.finish()
            start = clock()
            call()
            self.finish()
            found.append(clock() - start)
        return statistics.median(found)

    def random_adapter(self, name: str, rank: int, ends: Sequence[str], seed: int) -> Adapter:
        source = torch.Generator().manual_seed(seed)
        factors = {}
        for layer, module in self.targets.items():
            if layer.removesuffix(".weight").endswith(tuple(f".{end}" for end in ends)):
                out, *rest = module.weight.shape
                down = torch.randn((rank, *rest), generator=source) * 0.01
                up = torch.randn((out, rank, *([1, 1] if len(rest) > 1 else [])), generator=source) * 0.01
                factors[layer] = Factors(down.to(self.dtype), up.to(self.dtype), float(rank))
        return Adapter(name, factors)

    def _lcm(self) -> Adapter:
        """The acceleration adapter: the model's own, or random factors where LCM-LoRA has them."""
        if self.model.acceleration is None:
            return self.random_adapter("lcm", min(64, self.options.rank), LCM_TARGETS, 1)
        tensors = load_file(self.model.acceleration)
        names = aliases(self.merger.shapes)
        found = {}
        for key, down in tensors.items():
            for mark, other in ((".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")):
                if key.endswith(mark):
                    layer = key.removesuffix(mark)
                    alpha = tensors.get(f"{layer}.alpha", torch.tensor(float(len(down))))
                    found[names[layer]] = Factors(down, tensors[layer + other], float(alpha))
        return Adapter("lcm", found)

    def as_file(self, adapter: Adapter, folder: Path) -> str:
        """An adapter as diffusers reads it; answers the file's name."""
        tensors = {}
        for layer, factors in adapter.factors.items():
            path = layer.removesuffix(".weight")
            tensors[f"{path}.lora_A.weight"] = factors.down.contiguous()
            tensors[f"{path}.lora_B.weight"] = (factors.up * factors.scale).contiguous()
        save_file(tensors, folder / f"{adapter.hash}.safetensors")
        return f"{adapter.hash}.safetensors"

    def attach(self) -> None:
        """The LCM-LoRA as plain diffusers applies it: unfused."""
        ranks = {factors.rank for factors in self.lcm.factors.values()}
        layers = [layer.removeprefix("unet.").removesuffix(".weight") for layer in self.lcm.factors]
        self.pipe.unet.add_adapter(LoraConfig(r=max(ranks), lora_alpha=max(ranks), target_modules=layers))

    def encode(self, count: int) -> list[Text]:
        """Prompts through the text encoders, one by one."""
        ids = torch.randint(0, 400, (1, 77), generator=torch.Generator().manual_seed(count)).to(self.device)
        told = []
        for _ in range(count):
            if self.model.family == "sd":
                told.append(Text(Embedding(self.pipe.text_encoder(ids)[0], None), None))
                continue
            first = self.pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
            second = self.pipe.text_encoder_2(ids, output_hidden_states=True)
            tokens = torch.cat([first, second.hidden_states[-2]], dim=-1)
            told.append(Text(Embedding(tokens, second[0]), None))
        return told

    @torch.inference_mode()
    def plain(self, count: int) -> Any:
        """What people write: the diffusers pipeline, asked for PIL pictures."""
        told = self.encode(count)
        options = {"prompt_embeds": torch.cat([one.asked.tokens for one in told])}
        if self.model.family == "sdxl":
            options["pooled_prompt_embeds"] = torch.cat([one.asked.pooled for one in told])
        return self.pipe(
            **options,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            width=self.model.side,
            height=self.model.side,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(count)],
            output_type="latent" if "uint8" in self.taken else "pil",
        ).images

    @torch.inference_mode()
    def once(self, count: int, chosen: Any = None) -> Any:
        """`count` pictures with the measures taken."""
        if "sampler" not in self.taken:
            made = self.plain(count)
            return self.decoded(made) if "uint8" in self.taken else made
        told = self.known[:count] if "prompts" in self.taken and len(self.known) >= count else self.encode(count)
        self.known = told
        pipeline: Any = SimpleNamespace(
            unet=self.unet, family=self.model.family, scheduler_config=self.base_config, slots=self.slots
        )
        recipes: Any = [
            SimpleNamespace(
                width=self.model.side,
                height=self.model.side,
                steps=STEPS,
                first_step=0,
                task="txt2img",
                controls=None,
                motion=None,
                frames=None,
                composite=False,
                scheduler="lcm",
                guidance_scale=1.0,
                seed=seed,
            )
            for seed in range(count)
        ]
        return render(pipeline, self.vae, recipes, told, lambda _done, _steps: (), self.place(), chosen)

    def place(self) -> Any:
        cores = torch.get_num_threads() if self.device.type == "cpu" and "parts" in self.taken else 1
        pixels = 128 * 128 if self.device.type == "cpu" else 4 * 1024 * 1024
        return SimpleNamespace(place=self.device, spread=Spread(cores), decode_pixels=pixels)

    def decoded(self, latents: torch.Tensor) -> Any:
        return decode(self.vae, latents, self.place())

    def take(self, rung: str) -> None:
        """One measure more."""
        self.taken.add(rung)
        if rung == "merged":
            if getattr(self.pipe.unet, "peft_config", None):
                self.pipe.unet.unload_lora()
            self.merger.apply([(self.lcm, 1.0)])
        elif rung == "channels-last":
            self.pipe.unet.to(memory_format=torch.channels_last)
            self.pipe.vae.to(memory_format=torch.channels_last)
        elif rung in {"compiled", "graphs"}:
            options: dict[str, Any] = {"backend": self.options.backend, "dynamic": False}
            if rung == "graphs":
                options["mode"] = "reduce-overhead"
            self.unet = torch.compile(self.pipe.unet, fullgraph=True, **options)
            self.vae = self.pipe.vae
            self.vae.decode = torch.compile(type(self.vae).decode.__get__(self.vae), **options)

    def possible(self, rung: str) -> bool:
        if rung == "graphs":
            return self.device.type == "cuda" and self.options.backend == "inductor"
        if rung == "parts":
            return self.device.type == "cpu"
        return rung != "compiled" or not self.options.no_compile
