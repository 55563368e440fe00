"""Settings of the closed forms (ziplora/closed_form.py), and of the steps that may follow one (ziplora/refine.py). No
torch: manifests are checked with them."""

from dataclasses import dataclass
from typing import Literal

from ziplora.calibration_settings import CalibrationSettings, Moments, Passes
from ziplora.optimize_knobs import ZipLoRAKnobs


@dataclass(frozen=True, slots=True)
class ClosedKnobs:
    """Settings of the closed forms. draws, noise and size: of the observations, as for ziplora; half of 32 draws costs
    half and raises the held-out loss by 3 % (matrices: 7 %, tests/bench/results/draws.json). ridge: ρ, how strongly
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
