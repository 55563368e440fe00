"""Settings of the merges that need nothing but the two LoRAs. No torch: manifests are checked with them."""

from dataclasses import dataclass
from typing import Literal

EXACT = 512  # of ziplora.factor: up to this many rows or columns the whole SVD is taken
OVERSAMPLED = 16  # columns of a randomised one beyond the rank
POWERS = 4  # its power iterations


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}; above 0 (nothing kept) and at most 1 (everything)")


def _check_rank(rank: int | None, most: str) -> None:
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}; at least 1, or null for {most}")


@dataclass(frozen=True, slots=True)
class DirectKnobs:
    """Direct merge has none: the LoRAs' own weights say how much of each."""


@dataclass(frozen=True, slots=True)
class PruneKnobs:
    """density: share of each ΔW's elements that is kept, the largest. rank: what each LoRA's half is factored to, None
    for the rank it had; the entry says how much of it that leaves out."""

    density: float = 0.2
    rank: int | None = None

    def __post_init__(self) -> None:
        _check_density(self.density)
        _check_rank(self.rank, "the LoRA's own")


@dataclass(frozen=True, slots=True)
class TiesKnobs:
    """density and rank: as for prune. elect: how the sign of an element is chosen where the LoRAs differ, `total` by
    the larger magnitude (the paper), `frequency` by count. scale: λ of the merged update."""

    density: float = 0.2
    elect: Literal["total", "frequency"] = "total"
    scale: float = 1.0
    rank: int | None = None

    def __post_init__(self) -> None:
        _check_density(self.density)
        _check_rank(self.rank, "the LoRA's own")
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale is {self.scale}; above 0 and finite (the paper's λ, 1 by default)")


@dataclass(frozen=True, slots=True)
class DareKnobs:
    """density: 1 − p, the chance of each element to be kept; the merge's seed decides which. combine: `sum`, or
    `ties`' election of signs. rank: as for prune; what chance takes away is no low-rank change, so that a factorisation
    to the LoRA's own rank restores most of it: a larger rank is nearer to the method, and a larger file."""

    density: float = 0.5
    combine: Literal["sum", "ties"] = "sum"
    rank: int | None = None

    def __post_init__(self) -> None:
        _check_density(self.density)
        _check_rank(self.rank, "the LoRA's own")


@dataclass(frozen=True, slots=True)
class SvdKnobs:
    """rank: of the merged LoRA; None for the larger of the two."""

    rank: int | None = None

    def __post_init__(self) -> None:
        _check_rank(self.rank, "the larger of the two LoRAs'")


@dataclass(frozen=True, slots=True)
class NullSpaceKnobs:
    """mu: μ, how strongly the subject is kept out of the style's directions; 0 is the direct merge, None the full
    projection. directions: how many of the style's principal directions count; None for all of them."""

    mu: float | None = 0.5
    directions: int | None = None

    def __post_init__(self) -> None:
        if self.mu is not None and not 0 <= self.mu < float("inf"):
            raise ValueError(f"mu is {self.mu}; at least 0 (the direct merge) and finite, or null for full projection")
        if self.directions is not None and self.directions < 1:
            raise ValueError(f"directions is {self.directions}; at least 1, or null for all that the style has")
