"""The trainers at toy sizes: the loss falls, a resumed run equals one that never stopped."""

import copy
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTokenizer

from farm.painter import caption, sample_scene
from tests.training.test_adapter_trouble import small_disk
from workers.training import autoencoder, diffusion, distill, tokens
from workers.training.crack_tiny_settings import QUICK, Settings
from workers.training.errors import TrainingError
from workers.training.export import export_lora, export_pipeline
from workers.training.loop import Plan, load, train
from workers.training.pool import open_pool
from workers.training.questions import MEANINGS

SIZE = diffusion.Size(channels=(16, 16, 32), heads=2, text_width=16, text_layers=1, latent=4, grid=4)


def hush(_: str) -> None:
    """Say nothing."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    rng = np.random.default_rng(0)
    texts = [caption(sample_scene(rng), rng) for _ in range(300)]
    return tokens.build(texts, tmp_path_factory.mktemp("tokenizer"), merges=60)


def words(chosen: np.ndarray, rng: np.random.Generator) -> list[str]:
    return [caption(sample_scene(np.random.default_rng(int(i))), rng) for i in chosen]


def latents(count: int = 32) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 4, 4, 4)).astype(np.float16)


def fit_base(path: Path, tokenizer: CLIPTokenizer, steps: int, **more: Any) -> Any:
    settings: dict[str, Any] = {"steps": 8, "rate": 1e-3, "seed": 4, "warmup": 2, **more}
    plan = Plan(**settings)
    if steps < plan.steps:
        plan.minutes = 0 if steps == 0 else plan.minutes
    torch.manual_seed(9)
    text = diffusion.build_text(SIZE, tokenizer)
    return diffusion.fit(latents(), words, tokenizer, text, size=SIZE, plan=plan, checkpoint=path, batch=4, say=hush)


def test_the_autoencoder_learns(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, 8, 64, seed=1)
    lines: list[str] = []
    plan = Plan(40, 2e-3, seed=1, warmup=5, say_every=10)
    path = tmp_path / "autoencoder.pt"
    model = autoencoder.fit(pool, plan, path, channels=(8, 8, 8, 16), latent=4, batch=4, side=32, say=lines.append)
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines]
    assert losses[-1] < losses[0]
    made = model.encode(autoencoder.to_tensor(pool.pixels[:, :, :, :3])).latent_dist.mean.detach()
    assert made.shape == (8, 4, 8, 8)
    assert model.config.scaling_factor == 1.0
    # Measured on mirrored pictures of the same pool, so not exactly 0 and 1.
    assert made.mean((0, 2, 3)).abs().max() < 0.5
    assert 0.5 < made.std((0, 2, 3)).min() <= made.std((0, 2, 3)).max() < 2.0


def test_refining_brings_cracks_back_and_leaves_white_latents(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, 8, 64, seed=1)
    torch.manual_seed(2)
    model = autoencoder.build((8, 8, 8, 16), latent=4)
    real = autoencoder.to_tensor(pool.pixels)
    pixels, mask = real[:, :3], (real[:, 3:] + 1.0) / 2.0

    def off() -> float:
        with torch.no_grad():
            made = model.decode(model.encode(pixels).latent_dist.mean).sample
        return float(autoencoder.sharp_loss(made, pixels, mask))

    before = off()
    plan = Plan(40, 2e-3, seed=1, warmup=5)
    autoencoder.refine(model, pool, plan, tmp_path / "refine.pt", bf16=False, say=hush)
    assert off() < 0.8 * before
    with torch.no_grad():
        made = model.encode(pixels).latent_dist.mean
    # Measured on mirrored pictures of the same pool, so not exactly 0 and 1.
    assert made.mean((0, 2, 3)).abs().max() < 0.5
    assert 0.5 < made.std((0, 2, 3)).min() <= made.std((0, 2, 3)).max() < 2.0


def test_the_decoder_learns_what_it_is_handed_and_the_encoder_stays(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, 8, 64, seed=1)
    torch.manual_seed(2)
    model = autoencoder.build((8, 8, 8, 16), latent=4)
    real = autoencoder.to_tensor(pool.pixels)
    pixels, mask = real[:, :3], (real[:, 3:] + 1.0) / 2.0
    with torch.no_grad():
        latents = model.encode(pixels).latent_dist.mean

    def off() -> float:
        with torch.no_grad():
            return float(autoencoder.sharp_loss(model.decode(0.5 * latents).sample, pixels, mask, too_light=2.0))

    def learn(model: Any, share: float) -> dict[str, torch.Tensor]:
        autoencoder.learn_to_decode(
            model,
            latents.numpy().astype(np.float16),
            pool,
            lambda clean, chosen, rng: 0.5 * clean,
            Plan(40, 2e-3, seed=1, warmup=5),
            tmp_path / "decode.pt",
            share=share,
            bf16=False,
            say=hush,
        )
        return model.state_dict()

    other, before, start = copy.deepcopy(model), off(), copy.deepcopy(model.state_dict())
    end = learn(model, 1.0)
    assert off() < 0.8 * before
    assert all(torch.equal(each, end[name]) for name, each in start.items() if name.startswith("encoder."))
    # What was learnt is read from the checkpoint; a quarter of it goes in.
    mixed = learn(other, 0.25)
    assert all(torch.allclose(each, 0.75 * start[name] + 0.25 * end[name], atol=1e-6) for name, each in mixed.items())


def test_a_crack_that_is_too_light_costs_more_than_one_that_is_too_dark() -> None:
    real, mask = torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    mask[..., 16, :] = 1.0
    light, dark = (float(autoencoder.sharp_loss(real + way * mask, real, mask, too_light=2.0)) for way in (0.5, -0.5))
    assert light > 1.3 * dark
    assert float(autoencoder.sharp_loss(real + 0.5 * mask, real, mask)) == pytest.approx(dark)


def test_the_quick_recipe_is_short_in_every_stage() -> None:
    whole, quick = asdict(Settings()), asdict(QUICK)
    assert all(quick[name] <= 0.1 * whole[name] for name in whole if name.endswith("_steps") or name == "pool")
    assert all(quick[name] > 0 for name in whole if name.endswith("_steps")), "and runs each"


def test_whitening_changes_latents_and_no_picture() -> None:
    torch.manual_seed(3)
    model = autoencoder.build((8, 8, 8, 16), latent=4).eval()
    pixels = torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        before = model.encode(pixels).latent_dist
        picture = model.decode(before.mean).sample
        autoencoder.whiten(model, before.mean)
        after = model.encode(pixels).latent_dist
        again = model.decode(after.mean).sample
    assert not torch.allclose(before.mean, after.mean)
    assert torch.allclose(after.mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(after.mean.std((0, 2, 3)), torch.ones(4), atol=1e-4)
    assert torch.allclose(again, picture, atol=1e-4)
    scale = before.mean.std((0, 2, 3)).view(1, -1, 1, 1)
    assert torch.allclose(after.std * scale, before.std, rtol=1e-3)


def test_a_resumed_run_equals_one_that_never_stopped(
    tmp_path: Path, tokenizer: CLIPTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = fit_base(tmp_path / "straight.pt", tokenizer, 8)

    class Killed(Exception):
        pass

    real, calls = diffusion.batch_of, 0

    def dies_at_the_sixth(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Killed
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(diffusion, "batch_of", dies_at_the_sixth)
        with pytest.raises(Killed):
            fit_base(tmp_path / "resumed.pt", tokenizer, 8, save_every=3)
    assert load(tmp_path / "resumed.pt")["step"] == 3
    resumed = fit_base(tmp_path / "resumed.pt", tokenizer, 8)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_nan_is_refused_and_the_last_checkpoint_kept(tmp_path: Path) -> None:
    model, path = nn.Linear(2, 1), tmp_path / "linear.pt"
    before: dict[int, dict[str, Tensor]] = {}

    def step(number: int, rng: np.random.Generator) -> Tensor:
        before[number] = copy.deepcopy(model.state_dict())
        poison = float("nan") if number == 5 else 1.0
        return model(torch.ones(1, 2)).square().mean() * poison

    with pytest.raises(TrainingError, match="loss is nan at step 5"):
        train(step, {"model": model}, Plan(10, 1e-2, save_every=2), path, say=hush)
    kept = load(path)
    assert kept["step"] == 4
    assert all(v.isfinite().all() and v.equal(before[4][name]) for name, v in kept["modules"]["model"].items())


def test_a_full_disk_keeps_the_adapter_that_is_there(tmp_path: Path) -> None:
    unet = diffusion.build_unet(SIZE)
    distill.attach(unet, 4)
    path = tmp_path / "lcm-lora.safetensors"
    export_lora(path, unet, {})
    before = path.read_bytes()
    with small_disk(len(before) // 2), pytest.raises(TrainingError, match="cannot write the adapter"):
        export_lora(path, unet, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_bad_input_ends_in_a_clear_error(tmp_path: Path, tokenizer: CLIPTokenizer) -> None:
    with pytest.raises(TrainingError, match="at least one picture"):
        open_pool(tmp_path, 0, 64, seed=1)
    rng = np.random.default_rng(0)
    with pytest.raises(TrainingError, match="no latents"):
        diffusion.batch_of(latents(0), words, 2, rng)
    with pytest.raises(TrainingError, match="needs a caption"):
        diffusion.batch_of(latents(4), lambda chosen, _: [""] * len(chosen), 2, rng)
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"half a checkpoint")
    with pytest.raises(TrainingError, match="cannot read checkpoint"):
        fit_base(broken, tokenizer, 8)


def test_the_tokenizer_never_fails_and_comes_in_two_equal_forms(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    rng = np.random.default_rng(0)
    made = tokens.build((caption(sample_scene(rng), rng) for _ in range(200)), tmp_path, merges=50)
    fast = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("A cracked wall", "Zürich 東京 🧱 !?", "", "x" * 500):
        ids = made(text).input_ids
        assert ids == fast.encode(text).ids
        assert ids[0] == made.bos_token_id
        assert ids[-1] == made.eos_token_id
        assert made.eos_token_id not in ids[1:-1]


def test_places_with_cracks_count_more(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, 12, 64, seed=1)
    importance = pool.importance(8, 4.0)
    mask = np.asarray(pool.pixels[..., 3])
    assert importance.shape == (12, 8, 8)
    for picture, row, column in np.ndindex(12, 8, 8):
        cracked = mask[picture, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8].any()
        assert importance[picture, row, column] == (5.0 if cracked else 1.0)
    assert 0 < np.mean(importance > 1) < 0.5

    class Blank(nn.Module):
        def forward(self, noisy: Tensor, times: Tensor, encoder_hidden_states: Tensor) -> SimpleNamespace:
            return SimpleNamespace(sample=torch.zeros_like(noisy))

    unet: Any = Blank()
    clean = torch.zeros(4, 2, 8, 8)

    def loss(alpha: float, importance: Tensor | None, *, placed: bool = False) -> float:
        torch.manual_seed(0)
        alphas = torch.full((1000,), alpha)
        return float(diffusion.denoising_loss(unet, clean, clean, alphas, importance=importance, placed=placed))

    heavy = torch.full((4, 1, 8, 8), 3.0)
    assert loss(0.5, torch.ones(4, 1, 8, 8)) == pytest.approx(loss(0.5, None))
    # Where there is more noise than picture a crack is still to be placed, and counts like everything else.
    assert loss(1e-4, heavy) == pytest.approx(loss(1e-4, None), rel=1e-5)
    assert loss(1e-4, heavy, placed=True) == pytest.approx(3 * loss(1e-4, None), rel=1e-5), "unless places are told"
    assert loss(0.9, heavy) == pytest.approx((1 + 2 * 0.9**2) * loss(0.9, None), rel=1e-5)


def test_the_text_encoder_learns_what_captions_mean(tmp_path: Path, tokenizer: CLIPTokenizer) -> None:
    torch.manual_seed(0)
    text, lines = diffusion.build_text(SIZE, tokenizer), list[str]()
    plan = Plan(60, 1e-2, seed=2, warmup=5, say_every=10)
    path = tmp_path / "words.pt"
    diffusion.learn_words(text, MEANINGS, tokenizer, plan=plan, checkpoint=path, batch=16, say=lines.append)
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines]
    assert losses[-1] < 0.9 * losses[0]
    again = diffusion.build_text(SIZE, tokenizer)
    diffusion.learn_words(again, MEANINGS, tokenizer, plan=plan, checkpoint=path, batch=16, say=hush)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in text.state_dict().items())


def test_places_count_in_the_loss_of_distillation() -> None:
    made, target = torch.zeros(1, 2, 2, 2), torch.full((1, 2, 2, 2), 0.5)
    weight = torch.tensor([[[[1.0, 1.0], [1.0, 5.0]]]])
    assert float(distill.huber(made, target, 0.001, weight)) == pytest.approx(
        2 * float(distill.huber(made, target, 0.001))
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_clean_and_noise_come_back_from_a_prediction(kind: str) -> None:
    clean, noise = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    signal, sigma = torch.tensor(0.6), torch.tensor(0.8)
    guess = noise if kind == "epsilon" else signal * noise - sigma * clean
    got = distill.parts(kind, signal * clean + sigma * noise, guess, signal, sigma)
    assert torch.allclose(got[0], clean, atol=1e-5)
    assert torch.allclose(got[1], noise, atol=1e-5)
    with pytest.raises(TrainingError, match="'sample' cannot be distilled"):
        distill.parts("sample", clean, guess, signal, sigma)


def test_the_last_timestep_shows_nothing_of_the_picture() -> None:
    """Or a model takes the colour of a wall from the noise and not from the words."""
    assert float(diffusion.scheduler().alphas_cumprod[-1]) == 0.0
    assert LCMScheduler.from_config(diffusion.scheduler().config).alphas_cumprod[-1] == 0.0


def test_distilled_adapter_loads_with_stock_diffusers(tmp_path: Path, tokenizer: CLIPTokenizer) -> None:
    torch.manual_seed(0)
    unet, text = diffusion.build_unet(SIZE), diffusion.build_text(SIZE, tokenizer)
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    clean = torch.from_numpy(latents(4).astype(np.float32))
    states = text(diffusion.token_ids(tokenizer, ["a cracked wall"] * 4)).last_hidden_state.detach()
    empty = text(diffusion.token_ids(tokenizer, [""])).last_hidden_state.detach().expand(4, -1, -1)
    lines: list[str] = []
    distill.fit(
        unet,
        diffusion.scheduler(),
        lambda rng: distill.Lesson(clean, states, empty),
        recipe=distill.Recipe(rank=4),
        plan=Plan(12, 5e-3, seed=1, warmup=2, say_every=3),
        checkpoint=tmp_path / "distil.pt",
        say=lines.append,
    )
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines]
    assert losses[-1] < losses[0]
    export_lora(tmp_path / "lora.safetensors", unet, {"modelspec.title": "toy"})
    noisy, times = torch.randn(2, 4, 4, 4), torch.tensor([999, 259])
    with torch.no_grad():
        expected = unet(noisy, times, encoder_hidden_states=states[:2]).sample
    unet.unload_lora()
    assert all(torch.equal(before[k], v) for k, v in unet.state_dict().items())
    vae = autoencoder.build((8, 8, 8, 16), latent=4)
    folder = tmp_path / "toy"
    export_pipeline(folder, vae=vae, text=text, tokenizer=tokenizer, unet=unet, schedule=diffusion.scheduler())
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        got = pipe.unet(noisy, times, encoder_hidden_states=states[:2]).sample
    assert torch.allclose(got, expected, atol=2e-2, rtol=2e-2)
    picture = pipe("a cracked wall", num_inference_steps=2, guidance_scale=1.0, height=64, width=64)
    assert picture.images[0].size == (64, 64)
