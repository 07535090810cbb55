"""The test picture of a model: which recipe tries it out."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from farm.families import latents_of
from farm.modelfiles import FoundModel
from farm.recipe import AdapterUse, ControlUse, Recipe
from farm.registrations import Claim
from farm.views import CheckpointView, VaeView
from workers.pictures import Pixels

PROMPT = "A single split crack on a concrete wall"
STEPS = 2
DRAWN = "0" * 64
PICTURES: Mapping[str, Pixels] = MappingProxyType(
    {DRAWN: np.repeat(np.where(np.eye(64, dtype=bool), 255, 0).astype(np.uint8)[:, :, None], 3, axis=2)}
)
"""What a ControlNet is tried out with, by a hash that no upload has: one bright line across."""


def trial(
    claim: Claim, found: FoundModel, checkpoints: Sequence[CheckpointView], vaes: Sequence[VaeView]
) -> tuple[Recipe | None, list[str]]:
    """The recipe that tries a model out, small and short, and what a person should know.

    None for an adapter or VAE of a family without a checkpoint: its files are checked, but there is nothing to render
    it with yet.
    """
    if claim.kind == "checkpoint":
        vae, notes = _vae(found, vaes)
        return _recipe(found.hash, found.profile, vae=vae), notes
    base = next((one for one in checkpoints if _fits(claim.kind, found.family, one.family)), None)
    if base is None:
        return None, [f"no picture was rendered with it: there is no checkpoint of family {found.family} yet"]
    if claim.kind == "vae":
        return _recipe(base.hash, base.profile, vae=found.hash), []
    if claim.kind == "controlnet":
        return _recipe(base.hash, base.profile, controls=(ControlUse(hash=found.hash, image=DRAWN),)), []
    if claim.kind == "motion":
        return _recipe(base.hash, base.profile, motion=found.hash, frames=2, fps=1), []
    use = AdapterUse(hash=found.hash, weight=1.0)
    if claim.kind == "acceleration":
        return _recipe(base.hash, base.profile, scheduler="lcm", acceleration=use), []
    return _recipe(base.hash, base.profile, adapters=(use,)), []


def _fits(kind: str, family: str, checkpoint: str) -> bool:
    return latents_of(checkpoint) == family if kind == "vae" else checkpoint == family


def _vae(found: FoundModel, vaes: Sequence[VaeView]) -> tuple[str | None, list[str]]:
    """The VAE that the profile names, if it is here already."""
    named = found.profile.get("vae")
    if named in {None, "own"}:
        return None, []
    mine = [one for one in vaes if one.family == latents_of(found.family)]
    chosen = next((one for one in mine if one.name == named or (named == "tiny" and one.tiny)), None)
    if chosen is None:
        return None, [f"its profile names the VAE {named}, which is not registered for this family"]
    return chosen.hash, []


def _recipe(checkpoint: str, profile: dict[str, Any], **more: Any) -> Recipe:
    multiple = int(profile.get("size_multiple") or 8)
    size = -(-int(profile.get("min_size") or 64) // multiple) * multiple
    return Recipe(
        prompt=PROMPT, seed=4, width=size, height=size, steps=STEPS, guidance_scale=1.0, checkpoint=checkpoint,
        **{"scheduler": "ddim", **more},
    )  # fmt: skip
