"""Settings of ZipLoRA's optimisation, as published and with a term for the combined prompt (ziplora/optimize.py). No
torch: manifests are checked with them."""

import string
from dataclasses import dataclass
from typing import Literal

from ziplora.calibration_settings import CalibrationSettings, Passes


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


def _fields_of(template: str) -> set[str | None]:
    """Names of the template's fields; {None} where it is none."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError:
        return {None}
    return {name for _, name, spec, conversion in parts if name is not None and not spec and not conversion}
