"""LCM-LoRA and style LoRA on toy checkpoints of both families: they learn, resume exactly, and load everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from farm.safefile import read_header
from farm.training import LcmLora, StyleLora
from tests.pipelines import toys
from tests.training.conftest import FEW, Folders, hush, weights
from workers.pipelines.adapters import read_adapter
from workers.pipelines.load import load as load_pipeline
from workers.pipelines.targets import aliases
from workers.training import loop, objectives, run
from workers.training.base import attach, open_base
from workers.training.formats import export

pytestmark = pytest.mark.usefixtures("one_thread")


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("kind", [LcmLora, StyleLora])
def test_the_loss_falls(
    bases: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, kind: type[Any]
) -> None:
    options = kind(checkpoint=bases[family], data="painter:2", out=tmp_path, steps=20, rate=1e-2, seed=1, **FEW)
    losses: list[float] = []
    maker = "distillation" if kind is LcmLora else "denoising"
    real = getattr(objectives, maker)

    def judged(options: Any, base: Any) -> Callable[..., Any]:
        """The loss; and when training is over, its mean over fixed noise with the adapter and without."""
        loss = real(options, base)
        given: list[Any] = []

        def kept(network: Any, *batch: Any) -> Any:
            given[:] = batch
            return loss(network, *batch)

        def judge(*_: Any, **__: Any) -> list[Path]:
            for scale in (1.0, 0.0):
                for name, weight in base.network.named_parameters():
                    if "lora_B" in name:
                        weight.data *= scale
                with torch.no_grad():
                    torch.manual_seed(2)
                    losses.append(float(np.mean([float(loss(base.network, *given)) for _ in range(12)])))
            return []

        monkeypatch.setattr(run, "export", judge)
        return kept

    monkeypatch.setattr(objectives, maker, judged)
    run.train(options, say=hush)
    lines = [json.loads(line) for line in (tmp_path / "log.ndjson").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    after, before = losses
    assert after < 0.95 * before


RESUMED: dict[str, tuple[str, type[Any], dict[str, Any]]] = {
    "lcm-lora on sd, cached": ("sd", LcmLora, {"cache": True, "flip": True, "solver": 25}),
    "lcm-lora on sdxl": ("sdxl", LcmLora, {"batch": 1, "cache": True}),
    "lora on sdxl, text learns": (
        "sdxl",
        StyleLora,
        {"train_text": True, "accumulate": 2, "crop": "random", "drop_captions": 0.3, "noise_offset": 0.1},
    ),
}
"""A style LoRA on sd is killed in test_processes."""


@pytest.mark.parametrize("name", RESUMED)
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    bases: Folders, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    family, kind, more = RESUMED[name]

    def options(out: str) -> Any:
        given = {**FEW, **more, "steps": 4, "save_every": 2, "rate": 1e-2, "warmup": 3, "decay": 0.5}
        return kind(checkpoint=bases[family], data=str(pictures), out=tmp_path / out, **given)

    run.train(options("straight"), say=hush)

    class Killed(Exception):
        pass

    maker = "distillation" if kind is LcmLora else "denoising"
    real, calls = getattr(objectives, maker), 0

    def dies(*made: Any) -> Callable[..., Any]:
        loss = real(*made)

        def counted(*given: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > 3 * more.get("accumulate", 1):
                raise Killed
            return loss(*given)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(objectives, maker, dies)
        with pytest.raises(Killed):
            run.train(options("resumed"), say=hush)
    assert loop.load(tmp_path / "resumed/checkpoint.pt")["step"] == 2
    said: list[str] = []
    run.train(options("resumed"), say=said.append)
    assert "resuming at step 2 of 4" in said
    assert same(tmp_path / "straight", tmp_path / "resumed")
    logs = [[json.loads(line) for line in (tmp_path / out / "log.ndjson").open()] for out in ("straight", "resumed")]
    first, second = ([(line["step"], line["loss"]) for line in lines] for lines in logs)
    assert first == second
    if more.get("cache"):
        assert not any(line.startswith("cache: ") for line in said), "encoded once"


def outputs(unet: Any, texts: list[Any], xl: bool) -> list[torch.Tensor]:
    """What the parts answer to fixed questions."""
    torch.manual_seed(5)
    width, ids = unet.config.cross_attention_dim, torch.arange(77).remainder(190).view(1, 77)
    added = {"text_embeds": torch.randn(1, 24), "time_ids": torch.tensor([[16, 16, 0, 0, 16, 16]])} if xl else None
    states = torch.randn(1, 77, width)
    with torch.no_grad():
        made = unet(torch.randn(1, 4, 8, 8), torch.tensor([499]), encoder_hidden_states=states, added_cond_kwargs=added)
        return [made.sample, *(text(ids, output_hidden_states=True).hidden_states[-1] for text in texts)]


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("kind", [LcmLora, StyleLora])
def test_three_formats_give_the_trained_answer(
    bases: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, kind: type[Any]
) -> None:
    xl, learns = family == "sdxl", kind is StyleLora
    trained: list[torch.Tensor] = []
    real = export

    def asks_first(out: Path, base: Any, *rest: Any, **more: Any) -> Any:
        base.network.eval()
        trained.extend(outputs(base.network.unet, list(base.network.texts), xl))
        return real(out, base, *rest, **more)

    monkeypatch.setattr(run, "export", asks_first)
    more = {"train_text": True} if learns else {}
    # Every usual target, and a strength that is not 1: alpha has to survive.
    given = {**FEW, "target": (), "alpha": 3.0, "rate": 0.1, "steps": 2, "format": ("kohya", "diffusers", "peft")}
    made = run.train(kind(checkpoint=bases[family], data="painter:2", out=tmp_path, **given, **more), say=hush)
    name = "lora" if learns else "lcm-lora"
    assert [path.name for path in made] == [f"{name}.safetensors", f"{name}-diffusers", f"{name}-peft"]

    stock = StableDiffusionXLPipeline if xl else StableDiffusionPipeline

    def parts(pipeline: Any) -> tuple[Any, list[Any]]:
        return pipeline.unet, [pipeline.text_encoder] + ([pipeline.text_encoder_2] if xl else [])

    plain = outputs(*parts(stock.from_pretrained(bases[family])), xl)
    assert not torch.allclose(plain[0], trained[0], atol=0.05)
    answers = {}
    for path in made[:2]:
        pipeline = stock.from_pretrained(bases[family])
        folder, file = (path.parent, path.name) if path.is_file() else (path, "pytorch_lora_weights.safetensors")
        pipeline.load_lora_weights(folder, weight_name=file)
        answers[path.name] = outputs(*parts(pipeline), xl)
    unet, texts = parts(stock.from_pretrained(bases[family]))
    unet = PeftModel.from_pretrained(unet, made[2] / "unet")
    if learns:
        names = ["text_encoder_one", "text_encoder_two"] if xl else ["text_encoder"]
        texts = [PeftModel.from_pretrained(text, made[2] / name) for text, name in zip(texts, names, strict=True)]
    answers["peft"] = outputs(unet, texts, xl)
    for where, got in answers.items():
        for one, expected, before in zip(got, trained, plain, strict=True):
            off = (one - expected).abs().max()
            # The files are float16.
            assert off < 0.02 * max(1.0, float(expected.abs().max())), where
            assert learns or expected is trained[0] or torch.equal(one, before)
    # The farm reads all three, completely.
    pipeline = load_pipeline(bases[family], "toy", torch.float32, torch.float32)
    shapes = pipeline.merger.shapes
    read = [read_adapter(path, path.name, shapes, aliases(shapes)) for path in made]
    assert {frozenset(each.factors) for each in read} == {frozenset(read[0].factors)}
    assert {factors.scale for each in read for factors in each.factors.values()} == {1.5}
    assert any(not name.startswith("unet.") for name in read[0].factors) == learns
    header = load_file(made[0])
    assert "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight" in header or learns
    assert header[next(key for key in header if key.endswith(".alpha"))].item() == 3.0


@pytest.mark.parametrize(
    ("width", "predicts", "version", "architecture"),
    [
        (768, "epsilon", "sd_v1", "stable-diffusion-v1/lora"),
        (768, "v_prediction", "sd_v1_v", "stable-diffusion-v1/lora"),
        (1024, "epsilon", "sd_v2", "stable-diffusion-v2-512/lora"),
        (1024, "v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
        (None, "epsilon", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_the_file_names_its_base_as_kohya_does(
    tmp_path: Path, width: int | None, predicts: str, version: str, architecture: str
) -> None:
    folder = toys.sdxl(tmp_path) if width is None else toys.sd(tmp_path, cross_attention_dim=width)
    noise = folder / "scheduler/scheduler_config.json"
    noise.write_text(json.dumps(json.loads(noise.read_text()) | {"prediction_type": predicts}))
    base = open_base(folder)
    attach(base, ["to_q"], chosen=True, rank=1, alpha=1.0, text=False)
    (path,) = export(tmp_path, base, StyleLora(checkpoint=folder, data="a", out=tmp_path), {}, text=False)
    said = read_header(path).metadata
    assert (said["ss_base_model_version"], said["modelspec.architecture"]) == (version, architecture)


def test_contact_sheets_come_as_planned(bases: Folders, pictures: Path, tmp_path: Path) -> None:
    options = LcmLora(
        checkpoint=bases["sdxl"],
        data=str(pictures),
        out=tmp_path,
        steps=3,
        rate=0.05,
        sample_every=2,
        sample_prompt=("a wall", "another"),
        sample_steps=2,
        cache=True,
        **FEW,
    )
    run.train(options, say=hush)
    sheets = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in sheets] == ["000000.png", "000002.png", "000003.png"]
    with Image.open(sheets[0]) as first, Image.open(sheets[-1]) as last:
        assert first.size == last.size
        assert first.tobytes() != last.tobytes(), "the adapter is in the pictures"


def test_half_precision_of_bfloat16_trains(bases: Folders, pictures: Path, tmp_path: Path) -> None:
    given = {**FEW, "steps": 2, "precision": "bf16", "gradient_checkpointing": True}
    run.train(LcmLora(checkpoint=bases["sdxl"], data=str(pictures), out=tmp_path, **given), say=hush)
    assert {value.dtype for value in weights(tmp_path).values()} == {torch.float32}
    assert any(value.abs().max() > 0 for name, value in weights(tmp_path).items() if "lora_B" in name)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_diffusers(kind: str) -> None:
    from diffusers.training_utils import compute_snr

    schedule, times = DDIMScheduler(**toys.BETAS), torch.tensor([0, 10, 300, 999])
    snr = compute_snr(schedule, times)
    least = torch.stack([snr, torch.full_like(snr, 5.0)], dim=1).min(dim=1)[0]
    expected = least / (snr if kind == "epsilon" else snr + 1)
    assert torch.allclose(objectives.certainty(schedule.alphas_cumprod[times], kind, 5.0), expected, rtol=1e-4)
