"""An adapter in canonical form: for each weight it changes, low-rank factors. Needs nothing but torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

UNET = "unet."
"""How the canonical names of a UNet's weights begin; every other weight belongs to a text encoder."""


@dataclass(frozen=True)
class Factors:
    """One weight's low-rank change: `up @ down * alpha / rank`.

    `down` is (rank, in) or (rank, in, kh, kw), `up` is (out, rank) or (out, rank, 1, 1); host memory, as stored.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in canonical form: canonical weight name -> factors."""

    hash: str
    factors: Mapping[str, Factors]

    @property
    def bytes(self) -> int:
        return sum(one.down.nbytes + one.up.nbytes for one in self.factors.values())

    @property
    def changes_text(self) -> bool:
        """Whether any text encoder weight changes, so that prompts have to be encoded anew."""
        return any(not name.startswith(UNET) for name in self.factors)

    @property
    def text_part(self) -> Adapter:
        """What of it changes text encoders, under the same hash."""
        return Adapter(self.hash, {name: one for name, one in self.factors.items() if not name.startswith(UNET)})

    @property
    def unet_part(self) -> Mapping[str, Factors]:
        """What of it changes the UNet."""
        return {name: one for name, one in self.factors.items() if name.startswith(UNET)}


Use = tuple[Adapter, float]
"""An adapter at a weight."""
