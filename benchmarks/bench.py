"""One model on one device, rendered as plain diffusers does or with any of the engine's measures."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import LCMScheduler
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import benchmarks.surroundings  # noqa: F401  # before the engine's modules
from benchmarks.geometry import Model, build
from workers.pipelines import compiling
from workers.pipelines.compiling import Compiler
from workers.pipelines.device import Device
from workers.pipelines.factors import Adapter, Factors
from workers.pipelines.graphs import Graphs
from workers.pipelines.merge import Merger
from workers.pipelines.prompts import Embedding, Text
from workers.pipelines.render import asked, decode, render
from workers.pipelines.slots import Slots
from workers.pipelines.spread import Spread
from workers.pipelines.targets import aliases, target_modules
from workers.pipelines.upsample import merge_upsampling

STEPS = 4
LONGEST_COMPILING = 3600.0
"""Seconds after which a compiler that is not done is given up."""
ROOM = 2**62
"""Bytes: nothing is evicted in a benchmark."""
LCM_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


@dataclass(eq=False)
class Loaded:
    """What rendering and compiling know of a pipeline: as `workers.pipelines.load.Pipeline`, which needs a folder."""

    unet: Any
    family: str
    scheduler_config: dict[str, Any]
    slots: Slots
    programs: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Whole(Device):
    """A device on which a VAE decodes all pictures of a micro-batch in one go."""

    @property
    def decode_pixels(self) -> int:
        return sys.maxsize


def as_it_is(graph: torch.fx.GraphModule, _examples: list[torch.Tensor]) -> Callable[..., Any]:
    """A backend that compiles nothing: it only shows that networks can be traced."""
    run: Callable[..., Any] = graph.forward
    return run


BACKENDS: dict[str, Any] = {"inductor": compiling.inductor, "eager": as_it_is}


class Bench:
    """One model on one device, with the measures taken so far."""

    def __init__(self, options: argparse.Namespace, model: str, dtype: str | None = None) -> None:
        """Without `dtype` the one that the options name."""
        self.options = options
        self.clock = time.process_time if options.processor_time else time.perf_counter
        self.device = torch.device(options.device)
        self.dtype = getattr(torch, dtype or options.dtype)
        self.name = model
        self.model: Model = build(model, self.device, self.dtype)
        self.rank: int = options.rank or (16 if model == "crack-tiny" else 64)
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
        self.loaded = Loaded(self.pipe.unet, self.model.family, self.base_config, self.slots)
        self.at: Device = Whole(self.device, self.dtype, ROOM)
        self.compiler: Compiler | None = None

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
            return self.random_adapter("lcm", min(64, self.rank), LCM_TARGETS, 1)
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
        # As the engine does: the compiling thread runs what it made between two renderings.
        compiler = self.compiler
        ask = asked if compiler is None else partial(compiler.ask, self.loaded)
        with nullcontext() if compiler is None else compiler.turn:
            loaded: Any = self.loaded
            return render(loaded, self.pipe.vae, recipes, told, lambda _done, _steps: (), self.at, chosen, (), ask)

    def decoded(self, latents: torch.Tensor) -> Any:
        return decode(self.pipe.vae, latents, self.at)

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
        elif rung == "upsampling":
            merge_upsampling(self.pipe.vae)
        elif rung == "decode":
            self.at = Device(self.device, self.dtype, ROOM, self.at.spread)
        elif rung == "parts":
            self.at = Device(self.device, self.dtype, ROOM, Spread(torch.get_num_threads()))
        elif rung in {"compiled", "graphs"}:
            # The second serves what the first has compiled already, and captures it.
            self._compiler()

    def possible(self, rung: str) -> bool:
        """Whether this device and these options have such a rung."""
        cpu = self.device.type == "cpu"
        if rung in {"parts", "upsampling"}:
            return cpu
        if rung == "float32":
            return self.dtype != torch.float32
        if rung == "graphs" and (cpu or self.options.backend != "inductor"):
            return False
        return rung not in {"compiled", "graphs", "buckets"} or bool(self.options.compiles)

    def in_full_precision(self) -> Bench:
        """Another one, as plain diffusers has it in float32."""
        other = Bench(self.options, self.name, "float32")
        other.attach()
        return other

    def served(self) -> dict[str, int]:
        """Kinds of call served compiled, these as CUDA graphs, and those that were given up."""
        programs = list(self.loaded.programs.values())
        return {
            "ready": sum(one.tried for one in programs),
            "graphs": sum(one.graph is not None for one in programs),
            "failed": 0 if self.compiler is None else int(self.compiler.told()["failed"]),
        }

    def settle(self, count: int, chosen: Any = None) -> None:
        """Render micro-batches of `count` until all that they ask for is compiled, tried out and weighed, or given up.

        The first call of a kind is enough here. Raises TimeoutError when a compiler takes more than an hour."""
        if self.compiler is None:
            return
        worth, compiling.WORTH_CALLS = compiling.WORTH_CALLS, 1
        before: dict[str, Any] = {}
        try:
            while before != (now := {**self.served(), "seconds": self.compiler.told()["seconds"]}):
                before = now
                self.once(count, chosen)
                if not self.compiler.settled(LONGEST_COMPILING):
                    raise TimeoutError(f"still compiling after {LONGEST_COMPILING:.0f} s: {self.compiler.told()}")
                # The first call tries a program out, the second one captures its graph.
                self.once(count, chosen)
                self.once(count, chosen)
        finally:
            compiling.WORTH_CALLS = worth

    def filled_up(self, count: int) -> tuple[float, float, bool]:
        """Seconds of `count - 1` pictures where only `count` is compiled: as workers render them then, and eager; and
        whether workers did fill them up, so that nothing was eager."""
        self._compiler()
        self.settle(count)
        # From here on nothing is compiled any more; what there is serves on.
        self.close()
        eagerly: list[None] = []
        watch = self.pipe.unet.register_forward_pre_hook(lambda *_: eagerly.append(None))
        filled = self.seconds(lambda: self.once(count - 1), self.options.repeats)
        watch.remove()
        serving, self.compiler = self.compiler, None
        eager = self.seconds(lambda: self.once(count - 1), self.options.repeats)
        self.compiler = serving
        return filled, eager, not eagerly

    def _compiler(self) -> None:
        self.close()
        graphs = Graphs(self.at.finish) if "graphs" in self.taken else None
        self.compiler = Compiler(self.at, BACKENDS[self.options.backend], graphs)

    def close(self) -> None:
        """Compile nothing more."""
        if self.compiler is not None:
            self.compiler.close()
