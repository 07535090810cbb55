"""What registration finds out with torch: that every weight is there, which family an adapter is made for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from farm import families
from farm.errors import InvalidModel
from farm.modelfiles import (
    FoundModel,
    kind_of,
    read_adapter,
    read_checkpoint,
    read_controlnet,
    read_json,
    read_motion,
    read_vae,
)
from farm.modelkinds import ModelKind
from farm.safefile import read_header
from farm.views import CheckpointView
from workers.pipelines import adapters, original, structure
from workers.pipelines.load import check_folder
from workers.pipelines.structure import Shapes
from workers.pipelines.targets import aliases

Fetch = Callable[[str], Path]

BASE_NAMES = {
    "sdxl": "sdxl",
    "stable-diffusion-xl": "sdxl",
    "sd_v1": "sd15",
    "stable-diffusion-v1": "sd15",
    "ssd": "ssd-1b",
}
"""What trainers write about the base model, by the beginning of the word."""
BASE_KEYS = ("ss_base_model_version", "modelspec.architecture")


def inspect(
    path: Path,
    kind: ModelKind,
    wanted: Mapping[str, Any],
    scratch: Path,
    checkpoints: Sequence[CheckpointView],
    fetch: Fetch,
) -> FoundModel:
    """Look at fetched files and answer the model they make; a one-file checkpoint is converted below `scratch`.

    `checkpoints` are those registered, `fetch` answers one's folder. Raises InvalidModel with file, key and reason.
    """
    found = kind_of(path)
    expected = {
        "checkpoint": ("checkpoint", "original"),
        "vae": ("vae", "original"),
        "controlnet": ("controlnet",),
        "motion": ("motion",),
    }.get(kind, ("adapter",))
    if found not in expected:
        said = {"checkpoint": "a checkpoint", "original": "a checkpoint", "vae": "a VAE", "adapter": "an adapter"}
        said |= {"controlnet": "a ControlNet", "motion": "a motion adapter"}
        raise InvalidModel(f"{path.name}: this is {said[found]}; register it as one")
    if kind == "checkpoint":
        return _checkpoint(path, wanted, scratch)
    if kind == "vae":
        return _vae(path, wanted, scratch)
    if kind == "controlnet":
        return _beside(path, read_controlnet(path), "controlnet", structure.controls, wanted, checkpoints, fetch)
    if kind == "motion":
        found_motion = read_motion(path, acceleration=wanted.get("profile", {}).get("acceleration"))
        return _beside(path, found_motion, "motion", structure.moves, wanted, checkpoints, fetch)
    return _adapter(path, wanted, checkpoints, fetch)


def _checkpoint(path: Path, wanted: Mapping[str, Any], scratch: Path) -> FoundModel:
    folder, family = path, wanted.get("family")
    if path.is_file():
        folder = scratch / "diffusers"
        told = original.family_of(path)
        if family is not None and family != told:
            raise InvalidModel(f"{path.name}: this is {told}, not {family}")
        original.convert(path, folder)
    check_folder(folder)
    structure.check_weights(folder)
    return read_checkpoint(folder, family=family, changes=wanted.get("profile"), scratch=scratch)


def _vae(path: Path, wanted: Mapping[str, Any], scratch: Path) -> FoundModel:
    folder, family = path, wanted.get("family")
    if path.is_file():
        if family not in families.KNOWN:
            known = ", ".join(families.KNOWN)
            raise InvalidModel(
                f"{path.name}: a VAE file does not say whose latents it decodes; name the family: {known}"
            )
        folder = scratch / "diffusers"
        original.convert_vae(path, folder, family)
    else:
        structure.check_part(folder, "vae")
    found = read_vae(folder, family=family)
    return found.of_family(families.latents_of(found.family))


def _beside(
    path: Path,
    found: FoundModel,
    part: str,
    reason_of: Callable[[Mapping[str, Any], Mapping[str, Any]], str | None],
    wanted: Mapping[str, Any],
    checkpoints: Sequence[CheckpointView],
    fetch: Fetch,
) -> FoundModel:
    """What goes beside a UNet, of the first family whose UNet `reason_of` finds no fault with."""
    structure.check_part(path, part)
    config = read_json(path / "config.json")
    reasons = {
        family: reason_of(config, one.unet())
        for family, one in _candidates(wanted.get("family"), checkpoints, fetch).items()
    }
    fits = [family for family, reason in reasons.items() if reason is None]
    if not fits:
        raise InvalidModel(f"{path.name}: {_told({family: str(reason) for family, reason in reasons.items()})}")
    if len(fits) > 1:
        # Of known families the first one: SSD-1B is a pruned SDXL, and what controls one controls both.
        named = [family for family in fits if family in families.KNOWN]
        if len(named) < len(fits):
            raise InvalidModel(f"{path.name}: fits {' and '.join(fits)} alike; name the family it is made for")
    return found.of_family(fits[0])


def _adapter(path: Path, wanted: Mapping[str, Any], checkpoints: Sequence[CheckpointView], fetch: Fetch) -> FoundModel:
    found = read_adapter(path)
    # Before any family's layers are made: what no checkpoint could take is refused for that alone.
    adapters.check_keys(path)
    candidates = _candidates(wanted.get("family"), checkpoints, fetch)
    width = found.profile.get("cross_attention_dim")
    likely = {family: one for family, one in candidates.items() if width is None or one.width == width}
    if not likely:
        told = ", ".join(f"{family} {one.width}" for family, one in candidates.items())
        raise InvalidModel(
            f"{path.name}: made for a cross-attention width of {width}, which is that of no such family ({told})"
        )
    fits, reasons = [], {}
    for family, one in likely.items():
        try:
            shapes = one.shapes()
            adapters.read_adapter(path, found.hash, shapes, aliases(shapes))
            fits.append(family)
        except InvalidModel as error:
            reasons[family] = error.message
    if not fits:
        raise InvalidModel(_told(reasons))
    if len(fits) > 1:
        fits = [family for family in fits if family in _named(path)] or fits
    if len(fits) > 1:
        raise InvalidModel(f"{path.name}: fits {' and '.join(fits)} alike; name the family it is made for")
    return found.of_family(fits[0])


class _Family(NamedTuple):
    """A family an adapter may be made for: its cross-attention width; its weights' shapes and its UNet's configuration,
    found out when asked."""

    width: int | None
    shapes: Callable[[], Shapes]
    unet: Callable[[], Mapping[str, Any]]


def _candidates(family: str | None, checkpoints: Sequence[CheckpointView], fetch: Fetch) -> dict[str, _Family]:
    """The families there are: those the farm knows by heart, and those of registered checkpoints."""
    every = {
        name: _Family(
            families.template(name)["unet"]["cross_attention_dim"],
            partial(structure.known_shapes, name),
            partial(_known_unet, name),
        )
        for name in families.KNOWN
    }
    for view in checkpoints:
        if view.family not in families.KNOWN:
            every[view.family] = _Family(
                view.profile.get("cross_attention_dim"),
                partial(_registered, fetch, view.hash),
                partial(_unet_of, fetch, view.hash),
            )
    if family is None:
        return every
    if family not in every:
        raise InvalidModel(f"there is no family {family}; there are {', '.join(every)}")
    return {family: every[family]}


def _registered(fetch: Fetch, checkpoint: str) -> Shapes:
    return structure.folder_shapes(fetch(checkpoint))


def _known_unet(family: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = families.template(family)["unet"]
    return found


def _unet_of(fetch: Fetch, checkpoint: str) -> Mapping[str, Any]:
    return read_json(fetch(checkpoint) / "unet" / "config.json")


def _told(reasons: Mapping[str, str]) -> str:
    """Why no family takes it."""
    if len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"as {family}: {reason}" for family, reason in reasons.items())


def _named(path: Path) -> set[str]:
    """The families that an adapter file's metadata names."""
    if path.is_dir():
        return set()
    metadata = read_header(path).metadata
    said = [metadata.get(key, "").lower() for key in BASE_KEYS]
    return {family for word, family in BASE_NAMES.items() for text in said if text.startswith(word)}
