"""What a method asks to know of a LoRA beyond its weights, and what a pair costs in model passes. No torch: manifests
are checked with it."""

from dataclasses import dataclass
from typing import Literal

# What a LoRA without reference images generates of itself to be observed on: as many as a typical subject has images.
SELF_IMAGES = 4
SELF_STEPS = 25
SELF_GUIDANCE = 5.0

Moments = Literal["none", "inputs", "inputs+outputs"]


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """How one LoRA is observed (ziplora/calibrate.py). `size` in pixels, None for the base's own. `moments`: whether
    second moments of the layers' inputs are recorded too, and weights of their outputs."""

    draws: int
    seed: int
    noise: Literal["separate", "shared"]
    size: int | None
    moments: Moments = "none"


@dataclass(frozen=True, slots=True)
class Passes:
    """UNet calls on one latent that a pair costs beyond its LoRAs' calibrations: merged ones with the backward pass to
    the mergers, and ones without gradient."""

    backward: int = 0
    forward: int = 0
