"""The feature space in which distances between sets of pictures are measured.

A small classifier learns to name wall, direction, width, form, light, water and age of painted pictures; its last
layer but one, 64 numbers a picture, is the space. It is trained here, the same everywhere up to the rounding of
processors, and kept beside the results.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import farm.painter
from farm.painter import Scene, paint, sample_scene
from farm.painter.scene import DIRECTIONS, FORMS, LIGHTS, WALLS, WIDTHS

WIDTH = 64
PICTURES, EPOCHS, BATCH, RATE, SEED = 3_000, 4, 32, 3e-3, 17
QUESTIONS: dict[str, tuple[Any, ...]] = {
    "wall": WALLS,
    "direction": DIRECTIONS,
    "width": WIDTHS,
    "form": FORMS,
    "light": LIGHTS,
    "water": (False, True),
    "old": (False, True),
}
Pictures = NDArray[np.uint8]
Numbers = NDArray[Any]


class Eye(nn.Module):
    """Pictures (n, 3, h, w) in -1..1 to one row of answers for each question; `features` gives (n, 64)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, 96)
        blocks = []
        for k, (low, high) in enumerate(pairwise(widths)):
            blocks += [nn.Conv2d(low, high, 5 if k == 0 else 3, 2, 2 if k == 0 else 1), nn.GroupNorm(8, high)]
            blocks += [nn.SiLU()]
        self.body = nn.Sequential(*blocks)
        self.neck = nn.Linear(2 * widths[-1], WIDTH)
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, len(answers)) for name, answers in QUESTIONS.items()})

    def features(self, pictures: Tensor) -> Tensor:
        seen = self.body(pictures)
        return functional.silu(self.neck(torch.cat((seen.mean((2, 3)), seen.amax((2, 3))), 1)))

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        seen = self.features(pictures)
        return {name: head(seen) for name, head in self.heads.items()}


@contextmanager
def _alone() -> Iterator[None]:
    """One thread: sums then come out the same on machines with other numbers of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def to_tensor(pictures: Pictures) -> Tensor:
    """uint8 (n, h, w, 3) to float (n, 3, h, w) in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def answers(scenes: list[Scene]) -> dict[str, Tensor]:
    """The number of the right answer to each question (n,)."""
    return {
        name: torch.tensor([words.index(getattr(scene, name)) for scene in scenes]) for name, words in QUESTIONS.items()
    }


def _painted(count: int, seed: int) -> tuple[Tensor, list[Scene]]:
    rng = np.random.default_rng((seed, 2))
    scenes = [sample_scene(rng) for _ in range(count)]
    return to_tensor(np.stack([paint(s, 128, 128, 6_000_000_000 + seed * 1_000_000 + i).picture
                               for i, s in enumerate(scenes)])), scenes  # fmt: skip


def train(pictures: int = PICTURES, epochs: int = EPOCHS, say: Callable[[str], None] = print) -> Eye:
    """A classifier trained on painted pictures; equal arguments give equal weights on one machine."""
    with _alone():
        data, scenes = _painted(pictures, SEED)
        right = answers(scenes)
        torch.manual_seed(SEED)
        eye = Eye()
        steps = epochs * (pictures // BATCH)
        optimizer = torch.optim.AdamW(eye.parameters(), lr=RATE, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=max(steps, 1))
        rng = np.random.default_rng(SEED)
        for epoch in range(epochs):
            total = 0.0
            for chosen in torch.split(torch.from_numpy(rng.permutation(pictures)), BATCH)[: pictures // BATCH]:
                guesses = eye(data[chosen])
                loss = torch.stack([functional.cross_entropy(guesses[k], right[k][chosen]) for k in right]).sum()
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
                total += float(loss.detach())
            say(f"feature space: epoch {epoch + 1}/{epochs}, loss {total / max(pictures // BATCH, 1):.3f}")
        return eye.eval()


@torch.no_grad()
def accuracy(eye: Eye, count: int = 300) -> dict[str, float]:
    """Shares of right answers on painted pictures that were not trained on; of widths and forms, on cracked ones."""
    data, scenes = _painted(count, SEED + 1)
    right = answers(scenes)
    cracked = torch.tensor([scene.cracked for scene in scenes])
    guesses = [eye(part) for part in torch.split(data, 50)]
    shares = {}
    for name, wanted in right.items():
        hits = torch.cat([guess[name].argmax(1) for guess in guesses]) == wanted
        shares[name] = round(float(hits[cracked if name in ("width", "form") else slice(None)].float().mean()), 3)
    return shares


def open_eye(folder: Path, say: Callable[[str], None] = print) -> tuple[Eye, str]:
    """The classifier, trained now if `folder` does not hold it, and the name of its weights.

    The name covers this file and the painter: whoever changes either gets another space.
    """
    sources = [Path(__file__), *sorted(Path(farm.painter.__file__).parent.glob("*.py"))]
    name = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    path = folder / f"features-{name}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(".part")
        save_file(train(say=say).state_dict(), half)
        half.replace(path)
    eye = Eye()
    eye.load_state_dict(load_file(path))
    return eye.eval(), name


@torch.no_grad()
def look(eye: Eye, pictures: Pictures) -> Numbers:
    """Features float64 (n, 64) of pictures uint8 (n, h, w, 3)."""
    with _alone():
        return torch.cat([eye.features(part) for part in torch.split(to_tensor(pictures), 50)]).double().numpy()


def frechet(one: Numbers, other: Numbers) -> float:
    """The Frechet distance between normal distributions fitted to two sets of features (n, k).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), Dowson and Landau 1982; what FID is on Inception's features.
    """
    gap = one.mean(0) - other.mean(0)
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    values, axes = np.linalg.eigh(first)
    root = (axes * np.sqrt(np.clip(values, 0, None))) @ axes.T
    inner = np.linalg.eigvalsh(root @ second @ root)
    return float(gap @ gap + np.trace(first) + np.trace(second) - 2 * np.sqrt(np.clip(inner, 0, None)).sum())


def distance(pictures: Numbers, painted: Numbers) -> float:
    """The Frechet distance of features to those of painted pictures, each feature scaled to their deviation."""
    scale = painted.std(0).clip(1e-6)
    return round(max(frechet(pictures / scale, painted / scale), 0.0), 4)


def sharpness(pictures: Pictures) -> float:
    """Mean size of the Laplacian (four neighbours) of the grey picture, in grey levels of 0..255."""
    grey = pictures.astype(np.float32).mean(axis=3)
    centre = grey[:, 1:-1, 1:-1]
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return float(np.abs(4 * centre - around).mean())
