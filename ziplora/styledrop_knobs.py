"""Settings of StyleDrop + DreamBooth, which styledrop.py does. No torch: manifests are checked with them."""

import math
from dataclasses import dataclass, replace

BASE = "amused/amused-256"
CONTENTS = (
    "a chihuahua walking on the street",
    "a banana on the table",
    "a church on the street",
    "a tabby cat walking in the forest",
    "a fluffy sloth",
    "a house on a hill",
    "a sailing boat",
    "a bunch of flowers in a vase",
)


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """How an adapter is trained. Steps, batch and learning rate are what diffusers' examples/amused advises for
    StyleDrop on amused-256; the rank is a choice of ours."""

    rank: int = 16
    steps: int = 1500
    batch: int = 1
    lr: float = 4e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}; a finite number above 0")


@dataclass(frozen=True, slots=True)
class FeedbackSettings:
    """The second round of a style (see styledrop.feedback): the first round's adapter draws `per_prompt` pictures of
    each of `prompts` in `sample_steps`, of which the `keep` best are learned from as well.

    style_share: of the style in a picture's score, the rest is the text's. The share is ours: 0 scores by the text
    alone, half of each also drops pictures that have lost the style. contrast, text: as in Mixture.
    """

    prompts: tuple[str, ...]
    keep: int = 8
    per_prompt: int = 4
    style_share: float = 0.5
    sample_steps: int = 12
    contrast: float = 0.0
    text: float = 9.0

    def __post_init__(self) -> None:
        self.mixture()  # checks its bounds
        if not 0 <= self.style_share <= 1:
            raise ValueError(f"style_share is {self.style_share}; from 0 (text alone) to 1 (style alone)")
        if not 1 <= self.keep <= self.made:
            raise ValueError(f"{self.keep} pictures to keep of {self.made} that are made: between 1 and that many")

    @property
    def made(self) -> int:
        return len(self.prompts) * self.per_prompt

    def mixture(self) -> "Mixture":
        """What they are drawn from: the style's adapter alone."""
        return Mixture(0.0, 1.0, self.contrast, self.text)


@dataclass(frozen=True, slots=True)
class Mixture:
    """Weights of the logits that a picture is sampled from (see `mixed`).

    subject, style: w_c and w_s, a γ and 1 − γ where they sum to 1. contrast: λ_A, text: λ_B. aMUSEd's guidance scale is
    1 + λ_B, 10 by default.
    """

    subject: float = 0.5
    style: float = 0.5
    contrast: float = 0.0
    text: float = 9.0

    def __post_init__(self) -> None:
        for name in ("subject", "style", "contrast", "text"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"the weight {name} is {getattr(self, name)}; a finite number, at least 0")

    def styled(self, strength: float) -> "Mixture":
        """With this much of the style: 0 leaves the subject's adapter alone."""
        return replace(self, style=strength * self.style)


@dataclass(frozen=True, slots=True)
class StyleDropKnobs:
    """base: the masked-token model, an aMUSEd directory, s3://bucket/prefix or hub id, with its revision. rank, steps,
    batch, lr: of the adapter that each subject and each style is given (see AdapterSettings). subject_weight,
    style_weight, contrast, text: of the logits (see Mixture); a sample's style strength is a factor of style_weight.
    sample_steps: in which a picture is sampled. feedback: of the first round's own pictures of `contents` in the style,
    how many the style's second round learns from; 0 = there is none. style_share: see FeedbackSettings."""

    base: str = BASE
    revision: str | None = None
    rank: int = 16
    steps: int = 1500
    batch: int = 1
    lr: float = 4e-4
    subject_weight: float = 0.5
    style_weight: float = 0.5
    contrast: float = 0.0
    text: float = 9.0
    sample_steps: int = 12
    feedback: int = 0
    contents: tuple[str, ...] = CONTENTS
    style_share: float = 0.5

    def __post_init__(self) -> None:
        self.settings(0)  # these check their bounds
        self.mixture()
        if self.feedback < 0:
            raise ValueError(f"feedback is {self.feedback}; a number of pictures, 0 for no second round")
        self.second_round("")
        if self.sample_steps < 1:
            raise ValueError(f"sample_steps is {self.sample_steps}; at least 1")

    def settings(self, seed: int) -> AdapterSettings:
        return AdapterSettings(self.rank, self.steps, self.batch, self.lr, seed)

    def second_round(self, trigger: str) -> FeedbackSettings | None:
        """Of the style that these words stand for."""
        if not self.feedback:
            return None
        prompts = tuple(f"{content} in {trigger}" for content in self.contents)
        return FeedbackSettings(
            prompts,
            self.feedback,
            style_share=self.style_share,
            sample_steps=self.sample_steps,
            contrast=self.contrast,
            text=self.text,
        )

    def mixture(self) -> Mixture:
        return Mixture(self.subject_weight, self.style_weight, self.contrast, self.text)
