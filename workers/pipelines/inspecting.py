"""What registration finds out with torch: that every weight is there, which family an adapter is made for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from farm import families
from farm.errors import InvalidModel
from farm.modelfiles import FoundModel, Kind, kind_of, read_adapter, read_checkpoint, read_vae
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
    kind: Kind,
    wanted: Mapping[str, Any],
    scratch: Path,
    checkpoints: Sequence[CheckpointView],
    fetch: Fetch,
) -> FoundModel:
    """Look at fetched files and answer the model they make; a one-file checkpoint is converted below `scratch`.

    `checkpoints` are those registered, `fetch` answers one's folder. Raises InvalidModel with file, key and reason.
    """
    found = kind_of(path)
    expected = {"checkpoint": ("checkpoint", "original"), "vae": ("vae", "original")}.get(kind, ("adapter",))
    if found not in expected:
        said = {"checkpoint": "a checkpoint", "original": "a checkpoint", "vae": "a VAE", "adapter": "an adapter"}
        raise InvalidModel(f"{path.name}: this is {said[found]}; register it as one")
    if kind == "checkpoint":
        return _checkpoint(path, wanted, scratch)
    if kind == "vae":
        return _vae(path, wanted, scratch)
    return _adapter(path, wanted, checkpoints, fetch)


def _checkpoint(path: Path, wanted: Mapping[str, Any], scratch: Path) -> FoundModel:
    folder, family = path, wanted.get("family")
    if path.is_file():
        folder = scratch / "diffusers"
        told = original.convert(path, folder)
        if family is not None and family != told:
            raise InvalidModel(f"{path.name}: this is {told}, not {family}")
    check_folder(folder)
    structure.check_weights(folder)
    return read_checkpoint(folder, family=family, changes=wanted.get("profile"))


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


def _adapter(path: Path, wanted: Mapping[str, Any], checkpoints: Sequence[CheckpointView], fetch: Fetch) -> FoundModel:
    found = read_adapter(path)
    candidates = _candidates(wanted.get("family"), checkpoints, fetch)
    fits, reasons = [], {}
    for family, shapes in candidates.items():
        try:
            adapters.read_adapter(path, found.hash, shapes(), aliases(shapes()))
            fits.append(family)
        except InvalidModel as error:
            reasons[family] = error.message
    if not fits:
        raise InvalidModel(_told(reasons, found.profile.get("cross_attention_dim"), checkpoints))
    if len(fits) > 1:
        fits = [family for family in fits if family in _named(path)] or fits
    if len(fits) > 1:
        raise InvalidModel(f"{path.name}: fits {' and '.join(fits)} alike; name the family it is made for")
    return found.of_family(fits[0])


def _candidates(
    family: str | None, checkpoints: Sequence[CheckpointView], fetch: Fetch
) -> dict[str, Callable[[], Shapes]]:
    """Families an adapter may be made for -> their weights' shapes, found out when asked."""

    def known(name: str) -> Callable[[], Shapes]:
        return lambda: structure.known_shapes(name)

    def registered(view: CheckpointView) -> Callable[[], Shapes]:
        return lambda: structure.folder_shapes(fetch(view.hash))

    every = {name: known(name) for name in families.KNOWN}
    every |= {view.family: registered(view) for view in checkpoints if view.family not in families.KNOWN}
    if family is None:
        return every
    if family not in every:
        raise InvalidModel(f"there is no family {family}; there are {', '.join(every)}")
    return {family: every[family]}


def _told(reasons: Mapping[str, str], width: int | None, checkpoints: Sequence[CheckpointView]) -> str:
    """Why no family takes it: the reason of the one its width belongs to, or everybody's."""
    if len(reasons) == 1 or len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    widths = {view.family: view.profile.get("cross_attention_dim") for view in checkpoints}
    widths |= {name: families.template(name)["unet"]["cross_attention_dim"] for name in families.KNOWN}
    likely = [family for family in reasons if width is not None and widths.get(family) == width]
    shown = likely or list(reasons)
    return "; ".join(f"as {family}: {reasons[family]}" for family in shown)


def _named(path: Path) -> set[str]:
    """The families that an adapter file's metadata names."""
    if path.is_dir():
        return set()
    metadata = read_header(path).metadata
    said = [metadata.get(key, "").lower() for key in BASE_KEYS]
    return {family for word, family in BASE_NAMES.items() for text in said if text.startswith(word)}
