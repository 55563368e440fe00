"""METHODS: every way to merge a subject LoRA with a style LoRA, behind one signature. Importing this needs no
torch: manifests are checked with it.

A method is a function `(base, pairs, knobs) -> list[Merged]`; `pairs` may come many at a time because the methods
that run the model merge several side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ziplora.base import Base
    from ziplora.merged import Merged, Pair

# What a LoRA without reference images generates of itself to be observed on: as many as a typical subject has images.
SELF_IMAGES = 4
SELF_STEPS = 25
SELF_GUIDANCE = 5.0
ZIPLORA_PAPER = "https://arxiv.org/abs/2311.13600"


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """How one LoRA is observed (ziplora/calibrate.py). `size` in pixels, None for the base's own."""

    draws: int
    seed: int
    noise: Literal["separate", "shared"]
    size: int | None


@dataclass(frozen=True, slots=True)
class DirectKnobs:
    """Direct merge has none: the LoRAs' own weights say how much of each."""


@dataclass(frozen=True, slots=True)
class ZipLoRAKnobs:
    """Settings of ZipLoRA's optimisation. The paper states the first three; the rest are choices it leaves open,
    made here by name. Adam, with β 0.9 and 0.999, is one that has no name: no other optimiser was tried.

    penalty: what multiplies λ. `literal` is Eq. 3 as printed, Σ_layers |m_c·m_s|, which at SDXL's size starts at
    785,920 and drives every merger to zero; `columns` divides each layer's dot product by its number of columns
    (starts at the number of layers); `mean` averages that over layers (starts at 1) and so keeps the penalty on the
    scale of a mean squared error. reconstruction: `mean-square` is the mean over latent values of (ε_merged −
    ε_teacher)², `norm` the plain 2-norm as printed. noise: `separate` draws noise and timesteps for each LoRA by
    itself; `shared` uses the same for subject and style. draws: distinct (image, noise, timestep) draws per LoRA;
    None means a fresh one at every step, as in ordinary training. batch: draws per step and branch. size: pixels of
    the reference images; None for what the base was trained at. similarity_floor: stop when Σ_layers |m_c·m_s| has
    fallen to this share of its start (the paper: "until the similarity is zero").
    """

    steps: int = 100
    learning_rate: float = 0.01
    penalty_weight: float = 0.01
    penalty: Literal["mean", "columns", "literal"] = "mean"
    reconstruction: Literal["mean-square", "norm"] = "mean-square"
    noise: Literal["separate", "shared"] = "separate"
    draws: int | None = None
    batch: int = 1
    size: int | None = None
    similarity_floor: float = 1e-4

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch", 1), ("draws", 1), ("size", 8)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} is {value}; at least {low}")
        if not 0 < self.learning_rate <= 1:
            raise ValueError(f"learning_rate is {self.learning_rate}; above 0, at most 1 (the paper's is 0.01)")
        if not 0 <= self.penalty_weight < float("inf") or not 0 <= self.similarity_floor <= 1:
            raise ValueError("penalty_weight is at least 0 and finite, similarity_floor from 0 to 1")

    def calibration(self, seed: int) -> CalibrationSettings:
        draws = self.draws if self.draws is not None else self.steps * self.batch
        return CalibrationSettings(draws, seed, self.noise, self.size)


@dataclass(frozen=True, slots=True)
class Method:
    """A row of METHODS. `function` is imported when asked for, `knobs` says and checks what a manifest may set."""

    name: str
    summary: str
    paper: str
    yields: str
    mergers: bool  # whether it has one coefficient per column, which are kept beside the merged file
    cost: str
    knobs: type
    function: str

    def load(self) -> Callable[[Base, Sequence[Pair], Any], list[Merged]]:
        module, _, name = self.function.partition(":")
        loaded: Callable[[Base, Sequence[Pair], Any], list[Merged]] = getattr(import_module(module), name)
        return loaded

    def calibration(self, knobs: Any, seed: int) -> CalibrationSettings | None:
        """What the method must know of each LoRA beyond its weights; None if nothing."""
        return knobs.calibration(seed) if hasattr(knobs, "calibration") else None

    @property
    def knob_names(self) -> tuple[str, ...]:
        return tuple(field.name for field in fields(self.knobs))


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="ziplora",
            summary="learns one coefficient per column of each LoRA so that the merge still does what each did alone",
            paper=ZIPLORA_PAPER,
            yields="one LoRA, and the coefficients",
            mergers=True,
            cost="one merged forward and backward pass per step; teacher passes once per LoRA",
            knobs=ZipLoRAKnobs,
            function="ziplora.optimize:ziplora",
        ),
        Method(
            name="direct",
            summary="the sum of both updates (the paper's baseline)",
            paper=ZIPLORA_PAPER,
            yields="one LoRA",
            mergers=False,
            cost="none",
            knobs=DirectKnobs,
            function="ziplora.baselines:direct",
        ),
    )
}
