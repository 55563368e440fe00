"""Settings of Custom Diffusion's, Mix-of-Show's and K-LoRA's merges. No torch: manifests are checked with them."""

from dataclasses import dataclass
from typing import Literal

from ziplora.calibration_settings import CalibrationSettings
from ziplora.captions import COUNT

HISTORY = 25  # steps that gradient fusion's L-BFGS remembers, as in the published code


@dataclass(frozen=True, slots=True)
class CustomDiffusionKnobs:
    """captions: the plain captions that the merge shall leave alone (the paper's C_reg); `built-in` for those of
    ziplora/captions.py. Together they must have at least as many words in different contexts as the base's text states
    have values: 768 for SD 1.5, 2048 for SDXL. others: what becomes of layers that are no K or V of a cross-attention;
    `direct` adds both LoRAs' updates there, `none` leaves them out, as in a model of which only K and V were trained.
    ridge: ρ; C_regᵀC_reg is taken as C_regᵀC_reg + ρtI, t being its mean diagonal; 0 is the paper."""

    captions: tuple[str, ...] | Literal["built-in"] = "built-in"
    others: Literal["direct", "none"] = "direct"
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        if not self.captions:
            raise ValueError("captions is empty; plain captions to leave alone, or built-in")
        empty = [i for i, text in enumerate(self.captions) if not text.strip()]
        if self.captions != "built-in" and empty:
            raise ValueError(f"captions[{empty[0]}] is empty; a plain caption such as 'a red bicycle in the rain'")
        if not 0 <= self.ridge <= 1:
            raise ValueError(f"ridge is {self.ridge}; from 0 (the paper) to 1")

    def n_captions(self) -> int:
        return COUNT if self.captions == "built-in" else len(self.captions)


@dataclass(frozen=True, slots=True)
class GradientFusionKnobs:
    """steps: iterations of L-BFGS for a layer; context_steps: for the layers that read text, K and V of the
    cross-attentions and the text encoders. 50 and 500 are those of the published code. draws, noise and size: of the
    observations, as for ziplora-closed, which shares them."""

    steps: int = 50
    context_steps: int = 500
    draws: int = 16
    noise: Literal["separate", "shared"] = "separate"
    size: int | None = None

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("context_steps", 1), ("draws", 1), ("size", 8)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} is {value}; at least {low}")

    def calibration(self, seed: int) -> CalibrationSettings:
        return CalibrationSettings(self.draws, seed, self.noise, self.size, "inputs")


@dataclass(frozen=True, slots=True)
class KLoRAKnobs:
    """alpha and beta: of S = α·(steps done)/(all steps) + β, which the style's sum is multiplied by: below 1 for the
    subject, above 1 for the style. k: how many of the largest elements of a layer's ΔW are added up; None for the
    product of both LoRAs' ranks."""

    alpha: float = 1.5
    beta: float = 0.5
    k: int | None = None

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; at least 0 and finite")
        if self.alpha == self.beta == 0:
            raise ValueError("alpha and beta are both 0; S would be 0, and no layer would ever take the style")
        if self.k is not None and self.k < 1:
            raise ValueError(f"k is {self.k}; at least 1, or null for the product of both LoRAs' ranks")
