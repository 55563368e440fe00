"""What goes into a merge and what comes out, the same for every method."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ziplora.calibrate import Calibration
from ziplora.lora import LoRA, Mergers, max_rank, stacked


@dataclass(frozen=True, slots=True)
class Pair:
    """Both LoRAs, weights folded in, and the calibrations and the combined prompt that the method asked for."""

    subject: LoRA
    style: LoRA
    subject_calibration: Calibration | None = None
    style_calibration: Calibration | None = None
    combined_prompt: str | None = None  # both triggers filled in: see Method.combined_prompt


@dataclass(frozen=True, slots=True)
class Merged:
    """A merge that is a sum of a subject part and a style part, whose ranks add up; `report` holds figures for the
    entry.

    Keeping the parts apart is what lets style strength change afterwards: only the style part is scaled.
    """

    subject: LoRA
    style: LoRA
    mergers: Mergers | None
    report: Mapping[str, Any]

    def lora(self) -> LoRA:
        """The merged LoRA. In every module the first `subject_rank` rows are the subject's: see `lora.restyled`."""
        return stacked([self.subject, self.style])

    @property
    def subject_rank(self) -> int:
        return max_rank(self.subject)
