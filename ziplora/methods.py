"""METHODS: every way to merge a subject LoRA with a style LoRA, behind one signature. Importing this needs no
torch: manifests are checked with it.

A method is a function `(base, pairs, knobs) -> list[Merged]`; `pairs` may come many at a time because the methods
that run the model merge several side by side.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from ziplora.baseline_knobs import DareKnobs, NullSpaceKnobs, PruneKnobs, SvdKnobs, TiesKnobs
from ziplora.calibration_settings import CalibrationSettings, Moments, Passes
from ziplora.fusion_knobs import CustomDiffusionKnobs, GradientFusionKnobs, KLoRAKnobs
from ziplora.train_settings import JointKnobs

if TYPE_CHECKING:
    from ziplora.base import Base
    from ziplora.merged import Merged, Pair

# What a LoRA without reference images generates of itself to be observed on: as many as a typical subject has images.
SELF_IMAGES = 4
SELF_STEPS = 25
SELF_GUIDANCE = 5.0
ZIPLORA_PAPER = "https://arxiv.org/abs/2311.13600"
REGMEAN_PAPER = "https://arxiv.org/abs/2212.09849"


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
    fallen to this share of its start (the paper: "until the similarity is zero"). layers: which layers' mergers are
    learned, `all` as in the paper, or `q-out`, attention's queries and outputs alone, where keys and values stay at the
    direct merge (as LoRA.rar does, https://arxiv.org/abs/2412.05148).
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
    layers: Literal["all", "q-out"] = "all"

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

    def passes(self) -> Passes:
        return Passes(backward=2 * self.steps * self.batch)


@dataclass(frozen=True, slots=True)
class ComposedKnobs(ZipLoRAKnobs):
    """ZipLoRA with a fourth term, about the picture that is wanted: γ·‖ε(L_m; x, p_cs) − ε*(x, p_cs)‖², where p_cs is
    the combined prompt and x by turns noised pictures of the subject and of the style. It is no part of the paper.

    combined_weight: γ; 0 is the paper. combined_target: ε* is `direct`, the prediction of the direct merge, which in
    the pocket world composes best (tests/bench/results/quality.md), or `sum`, ε_c + ε_s − ε_0, what both LoRAs add to
    the base model's prediction under that prompt. combined_draws: distinct latents of the term, half of either LoRA;
    each costs one pass without gradient (`sum`: three).
    combined_prompt: a template with both trigger words. The penalty is off and the learning rate 0.03 by default: in
    the pocket world that reconstructs better than the paper's settings.
    """

    learning_rate: float = 0.03
    penalty_weight: float = 0.0
    combined_weight: float = 1.0
    combined_target: Literal["direct", "sum"] = "direct"
    combined_draws: int = 32
    combined_prompt: str = "a {subject} in {style}"

    def __post_init__(self) -> None:
        ZipLoRAKnobs.__post_init__(self)
        if not 0 <= self.combined_weight < float("inf"):
            raise ValueError("combined_weight is at least 0 and finite; 0 is the paper's objective")
        if self.combined_draws < 2 or self.combined_draws % 2:
            raise ValueError(f"combined_draws is {self.combined_draws}; an even number from 2, half for either LoRA")
        names = _fields_of(self.combined_prompt)
        if names != {"subject", "style"}:
            raise ValueError(
                f"combined_prompt is {self.combined_prompt!r}; a template with {{subject}} and {{style}},"
                " such as 'a {subject} in {style}'"
            )

    def passes(self) -> Passes:
        if self.combined_weight == 0:
            return ZipLoRAKnobs.passes(self)
        teachers = 3 if self.combined_target == "sum" else 1
        return Passes(3 * self.steps * self.batch, teachers * self.combined_draws)


@dataclass(frozen=True, slots=True)
class ClosedKnobs:
    """Settings of the closed forms. draws, noise and size: of the observations, as for ziplora; half of 32 draws costs
    half and raises the held-out loss by 3 % (matrices: 8 %, tests/bench/results/draws.json). ridge: ρ, how strongly
    the solution is pulled towards the direct merge where the observations say little. output_weights: weigh both
    LoRAs' errors in a layer by how much they change the prediction, at the cost of a few backward passes per LoRA."""

    draws: int = 16
    ridge: float = 1e-3
    output_weights: bool = False
    noise: Literal["separate", "shared"] = "separate"
    size: int | None = None

    def __post_init__(self) -> None:
        for name, low in (("draws", 1), ("size", 8)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} is {value}; at least {low}")
        if not 0 < self.ridge < float("inf"):
            raise ValueError(
                f"ridge is {self.ridge}; above 0 and finite: without it a layer may have no single solution"
            )

    def calibration(self, seed: int) -> CalibrationSettings:
        moments: Moments = "inputs+outputs" if self.output_weights else "inputs"
        return CalibrationSettings(self.draws, seed, self.noise, self.size, moments)


@dataclass(frozen=True, slots=True)
class MatrixKnobs(ClosedKnobs):
    """As for ziplora-closed, but the outputs are weighed unless asked otherwise."""

    output_weights: bool = True


@dataclass(frozen=True, slots=True)
class RefinedKnobs(ClosedKnobs):
    """Settings of ziplora-closed, and of the steps behind it. optimizer: `adam` takes the next `batch` draws at each
    step; `lbfgs` minimises Eq. 3 without its penalty on `batch` fixed draws, in the coordinates in which the closed
    form's quadratic is round, for which it holds 19 GB of matrices per pair of SDXL and needs output_weights; few draws
    would be overfitted: take 8 or more. In the pocket world Adam is the better of the two, and 20 steps of 2 draws are
    better than 10 of 8. learning_rate is Adam's alone."""

    draws: int = 32
    output_weights: bool = True
    steps: int = 20
    optimizer: Literal["adam", "lbfgs"] = "adam"
    batch: int = 2
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        ClosedKnobs.__post_init__(self)
        self.engine()
        if self.optimizer == "lbfgs" and not self.output_weights:
            raise ValueError(
                "output_weights is off; optimizer lbfgs measures layers against each other by them: turn them on"
            )
        if self.optimizer == "lbfgs" and self.steps < 2:
            raise ValueError("steps is 1; at least 2 for lbfgs, which takes back what its last one made worse")
        if self.optimizer == "lbfgs" and self.batch > self.draws:
            raise ValueError(f"batch is {self.batch}, draws {self.draws}: lbfgs takes at most all draws at once")

    def engine(self) -> ZipLoRAKnobs:
        """The same as settings of the gradient engine."""
        draws = self.batch if self.optimizer == "lbfgs" else self.draws
        return ZipLoRAKnobs(
            self.steps, self.learning_rate, 0.0, noise=self.noise, draws=draws, batch=self.batch,
            size=self.size, similarity_floor=0.0,
        )  # fmt: skip

    def passes(self) -> Passes:
        return Passes(backward=2 * self.steps * self.batch)


def _fields_of(template: str) -> set[str | None]:
    """Names of the template's fields; {None} where it is none."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError:
        return {None}
    return {name for _, name, spec, conversion in parts if name is not None and not spec and not conversion}


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
    solver: Literal["column", "matrix"] | None = None  # the closed form that it solves, in ziplora/closed_form.py
    parts: bool = True  # whether the style has rows of its own in the file, so that its strength can be changed there
    file: bool = True  # whether the result is one LoRA; otherwise images and a recipe are all that there can be
    trains: bool = False  # whether it trains on both concepts' pictures, and looks at neither LoRA

    def load(self) -> Callable[[Base, Sequence[Pair], Any], list[Merged]]:
        module, _, name = self.function.partition(":")
        loaded: Callable[[Base, Sequence[Pair], Any], list[Merged]] = getattr(import_module(module), name)
        return loaded

    def calibration(self, knobs: Any, seed: int) -> CalibrationSettings | None:
        """What the method must know of each LoRA beyond its weights; None if nothing."""
        return knobs.calibration(seed) if hasattr(knobs, "calibration") else None

    def passes(self, knobs: Any) -> Passes:
        return knobs.passes() if hasattr(knobs, "passes") else Passes()

    def combined_prompt(self, knobs: Any, subject_trigger: str, style_trigger: str) -> str | None:
        """What `Pair.combined_prompt` must be for this method; None if it does not look at it."""
        if not hasattr(knobs, "combined_prompt"):
            return None
        return knobs.combined_prompt.format(subject=subject_trigger, style=style_trigger)

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
            name="ziplora-closed",
            summary="ziplora's coefficients, solved layer by layer: each layer shall give what it gave in either LoRA",
            paper=ZIPLORA_PAPER,
            yields="one LoRA, and the coefficients",
            mergers=True,
            cost="one linear system per layer; model passes only once per LoRA",
            knobs=ClosedKnobs,
            function="ziplora.closed_form:ziplora_closed",
            solver="column",
        ),
        Method(
            name="ziplora-matrix",
            summary="the same with a matrix for each LoRA in place of coefficients: the regression mean of both",
            paper=REGMEAN_PAPER,
            yields="one LoRA",
            mergers=False,
            cost="one smaller linear system for layers that share an input; model passes only once per LoRA",
            knobs=MatrixKnobs,
            function="ziplora.closed_form:ziplora_matrix",
            solver="matrix",
        ),
        Method(
            name="ziplora-refined",
            summary="ziplora-closed, then a few steps of ziplora from there",
            paper=ZIPLORA_PAPER,
            yields="one LoRA, and the coefficients",
            mergers=True,
            cost="as ziplora-closed, and a fifth of ziplora's steps with two draws at each",
            knobs=RefinedKnobs,
            function="ziplora.refine:ziplora_refined",
            solver="column",
        ),
        Method(
            name="ziplora-composed",
            summary="ziplora with a term for the combined prompt: there it shall do what the direct merge does",
            paper=ZIPLORA_PAPER,
            yields="one LoRA, and the coefficients",
            mergers=True,
            cost="half as much again as ziplora, and passes without gradient for the combined prompt",
            knobs=ComposedKnobs,
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
        Method(
            name="svd",
            summary="the sum of both updates, cut to a chosen rank",
            paper="https://doi.org/10.1007/BF02288367",
            yields="one LoRA, in which subject and style are not apart",
            mergers=False,
            cost="one small SVD per layer",
            knobs=SvdKnobs,
            function="ziplora.low_rank_merges:svd",
            parts=False,
        ),
        Method(
            name="prune",
            summary="the sum of the largest elements of both updates",
            paper=ZIPLORA_PAPER,
            yields="one LoRA, an approximation whose error the entry states",
            mergers=False,
            cost="two truncated SVDs of a dense layer at a time",
            knobs=PruneKnobs,
            function="ziplora.sparse_merges:prune",
        ),
        Method(
            name="ties",
            summary="the largest elements of both updates, averaged where their signs agree with the stronger one's",
            paper="https://arxiv.org/abs/2306.01708",
            yields="one LoRA, an approximation whose error the entry states",
            mergers=False,
            cost="two truncated SVDs of a dense layer at a time",
            knobs=TiesKnobs,
            function="ziplora.sparse_merges:ties",
        ),
        Method(
            name="dare",
            summary="the sum of both updates with elements dropped by chance and the rest scaled up",
            paper="https://arxiv.org/abs/2311.03099",
            yields="one LoRA, an approximation whose error the entry states",
            mergers=False,
            cost="two truncated SVDs of a dense layer at a time",
            knobs=DareKnobs,
            function="ziplora.sparse_merges:dare",
        ),
        Method(
            name="np-lora",
            summary="the style, and the subject kept out of the directions that the style reads",
            paper="https://arxiv.org/abs/2511.11051",
            yields="one LoRA",
            mergers=False,
            cost="one small SVD per layer",
            knobs=NullSpaceKnobs,
            function="ziplora.low_rank_merges:np_lora",
        ),
        Method(
            name="custom-diffusion",
            summary="K and V of the cross-attentions give what each LoRA gave at its words, and change captions least",
            paper="https://arxiv.org/abs/2212.04488",
            yields="one LoRA",
            mergers=False,
            cost="one linear system for all layers; plain captions through the text encoders",
            knobs=CustomDiffusionKnobs,
            function="ziplora.custom_diffusion:custom_diffusion",
        ),
        Method(
            name="mix-of-show",
            summary="each layer fitted by L-BFGS to what it gave in either LoRA's own run (gradient fusion)",
            paper="https://arxiv.org/abs/2305.18292",
            yields="one LoRA",
            mergers=False,
            cost="an L-BFGS run for each layer; model passes only once per LoRA",
            knobs=GradientFusionKnobs,
            function="ziplora.gradient_fusion:mix_of_show",
        ),
        Method(
            name="k-lora",
            summary="at each step of sampling each layer takes one of the LoRAs: the subject's first, then the style's",
            paper="https://arxiv.org/abs/2502.18461",
            yields="images and a recipe, no merged file",
            mergers=False,
            cost="one dense ΔW of each LoRA at a time",
            knobs=KLoRAKnobs,
            function="ziplora.k_lora:k_lora",
            file=False,
        ),
        Method(
            name="joint",
            summary="no merge: one LoRA trained on the subject's and the style's pictures together, in equal parts",
            paper=ZIPLORA_PAPER,
            yields="one LoRA, in which subject and style are not apart",
            mergers=False,
            cost="a whole training for every pair: a forward and backward pass per step and picture",
            knobs=JointKnobs,
            function="ziplora.joint:joint",
            parts=False,
            trains=True,
        ),
    )
}
