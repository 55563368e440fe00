"""What goes into a merge and what comes out, the same for every method."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ziplora.calibrate import Calibration
from ziplora.lora import LoRA, Mergers, max_rank, scaled, stacked
from ziplora.styledrop_knobs import Mixture
from ziplora.switched import Switched


@dataclass(frozen=True, slots=True)
class Words:
    """How a concept is asked for: the caption that its LoRA was trained with, and the words that stand for it."""

    prompt: str
    trigger: str


@dataclass(frozen=True, slots=True)
class Instances:
    """Pictures of one concept, with the caption of each; `trigger` are the words of `prompt` that stand for it."""

    images: tuple[Image.Image, ...]
    captions: tuple[str, ...]
    prompt: str
    trigger: str


@dataclass(frozen=True, slots=True)
class Pictures:
    """What a method that trains is given of a pair; the seed decides its start, its draws and their noise."""

    subject: Instances
    style: Instances
    seed: int


@dataclass(frozen=True, slots=True)
class Pair:
    """Both LoRAs, weights folded in, and the calibrations, the combined prompt or the pictures that the method asked
    for. `words`: the subject's and the style's. `seed`: of the merge, for a method that draws by itself; those of
    calibrations and of pictures are in them."""

    subject: LoRA
    style: LoRA
    subject_calibration: Calibration | None = None
    style_calibration: Calibration | None = None
    combined_prompt: str | None = None  # both triggers filled in: see Method.combined_prompt
    words: tuple[Words, Words] | None = None
    pictures: Pictures | None = None  # for a method that trains, whose LoRAs are then empty
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Merged:
    """A merge that is a sum of a subject part and a style part, whose ranks add up; `report` holds figures for the
    entry.

    Keeping the parts apart is what lets style strength change afterwards: only the style part is scaled. Where there
    is `until`, the two take turns during sampling (`ziplora.switched`), and no single LoRA is the merge; nor where
    there is a `mixture`: then they are adapters of a masked-token base, whose logits are combined
    (`ziplora.styledrop`).
    """

    subject: LoRA
    style: LoRA
    mergers: Mergers | None
    report: Mapping[str, Any]
    until: Mapping[str, float] | None = None
    mixture: Mixture | None = None

    def lora(self) -> LoRA:
        """The merged LoRA. In every module the first `subject_rank` rows are the subject's: see `lora.restyled`. Raises
        ValueError where there is none."""
        if self.until is not None:
            raise ValueError("the two LoRAs take turns during sampling, so there is no single LoRA: see Merged.applied")
        if self.mixture is not None:
            raise ValueError("the logits of two adapters are combined in sampling, so there is no single LoRA")
        return stacked([self.subject, self.style])

    def applied(self, style_strength: float = 1.0) -> LoRA | Switched:
        """What is to be sampled with, unrounded, at a style strength. ValueError for adapters."""
        if self.mixture is not None:
            raise ValueError("two adapters with logits of their own: sample them with ziplora.styledrop.sample_mixture")
        style = self.style if style_strength == 1.0 else scaled(self.style, style_strength)
        if self.until is None:
            return stacked([self.subject, style])
        return Switched(self.subject, style, self.until)

    @property
    def subject_rank(self) -> int:
        return max_rank(self.subject)
