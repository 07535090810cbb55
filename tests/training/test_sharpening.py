"""The reader and what an adapter learns from it, at toy sizes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from torch import Tensor

from workers.training import diffusion, distill, sharpen
from workers.training.errors import TrainingError
from workers.training.loop import Plan, load

SIZE = diffusion.Size(channels=(16, 16, 32), heads=2, text_width=16, text_layers=1, latent=4, grid=4)
ALPHAS = diffusion.scheduler().alphas_cumprod
WORDS = torch.randn(2, 16, generator=torch.Generator().manual_seed(5))
"""What is meant by dark (0) and by bright (1)."""


def hush(_: str) -> None:
    """Say nothing."""


def real(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Latents that are dark or bright with a little noise, and which."""
    rng = np.random.default_rng(seed)
    bright = torch.from_numpy(rng.integers(0, 2, count))
    noise = torch.from_numpy(rng.standard_normal((count, 4, 4, 4)).astype(np.float32))
    return (bright * 2.0 - 1.0).view(-1, 1, 1, 1) + 0.05 * noise, bright


def states(bright: Tensor) -> Tensor:
    return WORDS[bright].unsqueeze(1).expand(-1, 77, -1)


def trial(rng: np.random.Generator) -> sharpen.Asked:
    bright = torch.from_numpy(rng.integers(0, 2, 8))
    return sharpen.Asked(states(bright), {"light": bright})


def free(rng: np.random.Generator) -> sharpen.Asked:
    """Either will do."""
    asked = trial(rng)
    return replace(asked, answers={"light": torch.full_like(asked.answers["light"], sharpen.ANY)})


def student() -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = diffusion.build_unet(SIZE)
    distill.attach(unet, 4)
    return unet


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> sharpen.Reader:
    torch.manual_seed(1)
    made = sharpen.Reader(4, {"light": 2}, (16, 16))
    clean, bright = real(64, 1)
    sharpen.learn_to_read(
        made,
        clean.numpy().astype(np.float16),
        {"light": bright.numpy()},
        ALPHAS,
        blur=250,
        plan=Plan(40, 1e-2, seed=1, warmup=5),
        checkpoint=tmp_path_factory.mktemp("reader") / "reader.pt",
        batch=16,
        bf16=False,
        say=hush,
    )
    return made


def sharpened(
    path: Path,
    plan: Plan,
    *readers: sharpen.Reader,
    told: Callable[[str], None] = hush,
    light: float = 1.0,
    asks: sharpen.Trial = trial,
) -> UNet2DConditionModel:
    unet = student()
    sharpen.fit(
        unet,
        diffusion.scheduler(),
        asks,
        lambda rng: torch.zeros(()),
        readers,
        shape=(4, 4, 4),
        recipe=sharpen.Sharpening(walks=(1, 2), weight=1.0, emphasis={"light": light}),
        plan=plan,
        checkpoint=path,
        bf16=False,
        say=told,
    )
    return unet


def made_by(unet: UNet2DConditionModel, bright: Tensor) -> Tensor:
    torch.manual_seed(3)
    with torch.no_grad():
        return sharpen.Student(unet, diffusion.scheduler(), bf16=False).walk(
            states(bright), torch.empty(len(bright), 4, 4, 4), 2, 1
        )[-1]


def lost_to(reader: sharpen.Reader, clean: Tensor, answers: Tensor) -> float:
    """What answers about the light of clean latents cost."""
    return float(
        sharpen.misread({"light": reader(clean, torch.zeros(len(clean), 1))["light"]}, {"light": answers})["light"]
    )


def test_the_reader_reads_latents_it_has_not_seen(reader: sharpen.Reader) -> None:
    clean, bright = real(32, 2)
    with torch.no_grad():
        logits = reader(clean, torch.zeros(32, 1))["light"]
    assert bool((logits.argmax(1) == bright).all())
    assert not any(weight.requires_grad for weight in reader.parameters())


def test_what_a_caption_leaves_open_costs_nothing(reader: sharpen.Reader) -> None:
    clean, bright = real(4, 3)
    known = torch.tensor([True, True, False, False])
    half = lost_to(reader, clean, bright.masked_fill(~known, sharpen.UNKNOWN))
    assert half == pytest.approx(lost_to(reader, clean[:2], bright[:2]), rel=1e-5)
    assert half < 1.0 < lost_to(reader, clean, 1 - bright)
    assert lost_to(reader, clean, torch.full((4,), sharpen.UNKNOWN)) == 0.0


def sure_of(*surer: float) -> Tensor:
    """Logits (n, 2) that find the second answer likelier by so much."""
    return torch.stack((torch.zeros(len(surer)), torch.tensor(surer)), 1)


def test_what_was_drawn_too_often_counts_against_an_answer() -> None:
    even, anything = sharpen.Even(["lean"], 200), {"lean": torch.full((8,), sharpen.ANY)}
    rng = torch.Generator().manual_seed(6)
    for _ in range(40):
        # Seven in eight are surely the first, by more or by less.
        surer = torch.cat((torch.tensor([4.0]), -4.0 - torch.randn(7, generator=rng)))
        logits = sure_of(*surer.tolist())
        right = even.settle(anything, {"lean": logits}, None)["lean"]
    assert right[0] == 1, "what is the other one stays it"
    # Of the rest those that are the least sure are asked to be it too: so many that there is enough.
    assert 2 <= int(right.sum()) <= 6
    assert surer[right == 1].min() >= surer[right == 0].max()
    assert even.shares()["lean"] == pytest.approx(1 / 8)
    usual = sharpen.Even(["lean"], 200)
    for _ in range(40):
        right = usual.settle(anything, {"lean": -logits}, None)["lean"]
    assert 2 <= int((1 - right).sum()) <= 6, "and the other way round"


def test_where_both_answers_are_drawn_each_picture_is_what_it_is() -> None:
    even, anything = sharpen.Even(["lean"], 200), {"lean": torch.full((9,), sharpen.ANY)}
    logits = sure_of(9.0, 8.0, 0.1, 7.0, 6.0, -0.1, -5.0, -4.0, -3.0)
    for _ in range(30):
        right = even.settle(anything, {"lean": logits}, None)["lean"]
        assert torch.equal(right, logits.argmax(1)), "five rise and four fall: none is asked to turn around"


def test_later_steps_go_on_with_what_is_drawn() -> None:
    even, known = sharpen.Even(["lean", "light"], 4), torch.tensor([0, 1, sharpen.UNKNOWN, 1])
    sure = sure_of(-9.0, -8.0, -7.0, -6.0)
    asked = {"lean": torch.tensor([sharpen.ANY, sharpen.ANY, sharpen.ANY, 0]), "light": known}
    first = {"lean": sure, "light": sure}
    balanced = even.settle(asked, first, None)
    assert balanced["lean"].tolist() == [0, 0, 1, 0], "less surely the first than the others; what is told stays"
    drawn = {"lean": sure_of(1.0, -1.0, 1.0, 1.0), "light": sure}
    assert even.settle(asked, first, drawn)["lean"].tolist() == [1, 0, 1, 0]
    assert balanced["light"].tolist() == known.tolist(), "nothing is left open: what is told stays"
    assert len(even.values["lean"]) == 4, "the first step of every walk is remembered, and no more than that"
    assert len(even.values["light"]) == 0


def test_two_steps_answer_for_what_is_read() -> None:
    """Deeper, the same picture has another gradient: the step before is in it."""
    unet = student()
    torch.manual_seed(2)
    for name, weight in unet.named_parameters():
        if ".lora_B." in name:
            weight.data.normal_(std=0.1)
    walker = sharpen.Student(unet, diffusion.scheduler(), bf16=False)
    found = {}
    for deep in (1, 2, 3):
        torch.manual_seed(4)
        made = walker.walk(states(torch.tensor([0, 1])), torch.zeros(2, 4, 4, 4), 4, 2, deep)[-1]
        unet.zero_grad()
        made.square().sum().backward()
        grads = [weight.grad.flatten() for weight in unet.parameters() if weight.grad is not None]
        found[deep] = made.detach(), torch.cat(grads)
    assert all(torch.equal(made, found[1][0]) for made, _ in found.values())
    assert not torch.allclose(found[1][1], found[2][1], rtol=1e-3)
    assert not torch.allclose(found[2][1], found[3][1], rtol=1e-3)


def test_the_adapter_learns_to_show_what_was_asked_for(tmp_path: Path, reader: sharpen.Reader) -> None:
    bright, lines = torch.arange(32) % 2, list[str]()

    def lost(unet: UNet2DConditionModel) -> float:
        torch.manual_seed(8)
        return lost_to(reader, made_by(unet, bright), bright)

    unet = sharpened(tmp_path / "sharpen.pt", Plan(100, 1e-2, seed=2, warmup=5), reader, told=lines.append)
    fresh = student()
    assert lost(unet) < 0.5 * lost(fresh)
    # Not for the reader alone: what was asked to be bright is brighter than what was not.
    made = made_by(unet, bright).mean((1, 2, 3))
    assert made[bright == 1].mean() > made[bright == 0].mean() + 0.2
    assert any(line.startswith("misread: light ") for line in lines)
    for name, weight in unet.named_parameters():
        if "lora" not in name:
            assert torch.equal(weight, fresh.get_parameter(name)), "only the adapter learns"


@pytest.mark.parametrize("asks", [trial, free])
def test_a_resumed_run_equals_one_that_never_stopped(
    tmp_path: Path, reader: sharpen.Reader, asks: sharpen.Trial
) -> None:
    straight = sharpened(tmp_path / "straight.pt", Plan(12, 1e-3, seed=2, warmup=2), reader, asks=asks)
    plan = Plan(12, 1e-3, seed=2, warmup=2, save_every=4, say_every=3)

    class Killed(Exception):
        pass

    def dies(line: str) -> None:
        if " 6/12 " in line:
            raise Killed

    with pytest.raises(Killed):
        sharpened(tmp_path / "resumed.pt", plan, reader, told=dies, asks=asks)
    assert load(tmp_path / "resumed.pt")["step"] == 4
    resumed = sharpened(tmp_path / "resumed.pt", plan, reader, asks=asks)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    # What first steps drew is remembered over the stop too.
    one, other = (load(tmp_path / f"{name}.pt")["averages"]["even"] for name in ("straight", "resumed"))
    assert len(one["light"]) == (64 if asks is free else 0)
    assert torch.equal(one["light"], other["light"])


def test_a_question_counts_as_often_as_it_is_given_weight(tmp_path: Path, reader: sharpen.Reader) -> None:
    """A loss of nothing leaves the adapter's last layers, which begin at nothing, where they were."""
    for light, learns in ((0.0, False), (3.0, True)):
        unet = sharpened(tmp_path / f"{light}.pt", Plan(2, 1e-3, seed=2, warmup=1), reader, light=light)
        ups = [weight for name, weight in unet.named_parameters() if ".lora_B." in name]
        assert any(bool(weight.any()) for weight in ups) is learns


def test_several_readers_count_alike(tmp_path: Path, reader: sharpen.Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    def quietly(reader: sharpen.Reader, latents: Tensor, *_: object) -> sharpen.Logits:
        found: sharpen.Logits = reader(latents, torch.zeros(len(latents), 1))
        return found

    monkeypatch.setattr(sharpen, "read", quietly)
    torch.manual_seed(1)
    other = sharpen.Reader(4, {"light": 2}).requires_grad_(False).eval()

    def lost(*readers: sharpen.Reader) -> float:
        lines: list[str] = []
        sharpened(tmp_path / "once.pt", Plan(1, 1e-3, seed=2), *readers, told=lines.append)
        (tmp_path / "once.pt").unlink()
        return float(lines[-1].split()[3])

    one, two = lost(reader), lost(other)
    assert abs(one - two) > 0.05
    assert lost(reader, other) == pytest.approx((one + two) / 2, abs=2e-4)


def test_answers_must_fit_the_latents(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="3 latents need as many answers"):
        sharpen.learn_to_read(
            sharpen.Reader(4, {"light": 2}, (16, 16)),
            np.zeros((3, 4, 4, 4), np.float16),
            {"light": np.zeros(2, np.int64)},
            ALPHAS,
            blur=250,
            plan=Plan(1, 1e-3),
            checkpoint=tmp_path / "reader.pt",
            say=hush,
        )


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_student_walks_as_the_scheduler_of_diffusers_does(steps: int) -> None:
    unet = student()
    walker = sharpen.Student(unet, diffusion.scheduler(), bf16=False)
    told = states(torch.tensor([0, 1]))
    torch.manual_seed(4)
    with torch.no_grad():
        made = walker.walk(told, torch.zeros(2, 4, 4, 4), steps, steps - 1)[-1]
        scheduler = LCMScheduler.from_config(diffusion.scheduler().config)
        scheduler.set_timesteps(steps)
        torch.manual_seed(4)
        latents = torch.randn(2, 4, 4, 4)
        for time in scheduler.timesteps:
            guess = unet(latents, time, encoder_hidden_states=told).sample
            # Its own noise is drawn from the same stream, in the same order.
            latents, clean = scheduler.step(guess, time, latents, return_dict=False)
    assert torch.allclose(made, clean, atol=1e-5)
