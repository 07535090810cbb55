"""What a model may be registered as: the one list of them. A leaf."""

from typing import Literal, get_args

ModelKind = Literal["checkpoint", "vae", "controlnet", "motion", "acceleration", "style"]

EVERY: tuple[ModelKind, ...] = get_args(ModelKind)
ADAPTERS: tuple[ModelKind, ...] = ("acceleration", "style")
"""LoRAs. The API takes both as adapters; the others have an address each."""
NOUNS: dict[ModelKind, str] = {
    "checkpoint": "checkpoint", "vae": "VAE", "controlnet": "ControlNet", "motion": "motion adapter",
    "acceleration": "LCM-LoRA", "style": "style LoRA",
}  # fmt: skip


def collection(kind: ModelKind | Literal["adapter"]) -> str:
    """The part of the API's address under which models of a kind are listed and added.

    >>> collection("motion"), collection("style"), collection("adapter")
    ('motions', 'adapters', 'adapters')
    """
    return "adapters" if kind == "adapter" or kind in ADAPTERS else f"{kind}s"
