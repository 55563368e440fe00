"""How the quality bench makes pictures by StyleDrop, which merges nothing: an adapter for each concept and seed,
trained once, on a masked-token base of its own."""

import time
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ziplora.lora import LoRA
from ziplora.masked import load_masked
from ziplora.merged import Instances
from ziplora.score import Judge
from ziplora.styledrop import AdapterTraining, IterativeTraining, sample_mixture, tuned
from ziplora.styledrop_knobs import Mixture, StyleDropKnobs


class MaskedStand:
    def __init__(self, base: Path, judge: Judge) -> None:
        """`judge` picks the pictures of second rounds."""
        self.base, self.judge = load_masked(base), judge
        self._adapters: dict[Hashable, tuple[LoRA, float]] = {}

    def adapter(self, role: str, name: str, concept: Instances, knobs: StyleDropKnobs, seed: int) -> tuple[LoRA, float]:
        """And the CPU seconds that its training took."""
        settings = knobs.settings(seed)
        second = knobs.second_round(concept.trigger) if role == "style" else None
        key = (role, name, settings, second)
        if key not in self._adapters:
            started = time.process_time()
            what = (self.base, concept.images, concept.captions, settings)
            training = AdapterTraining(*what) if second is None else IterativeTraining(*what, second, self.judge)
            self._adapters[key] = tuned(training), time.process_time() - started
        return self._adapters[key]

    def pictures(
        self,
        subject: LoRA,
        style: LoRA,
        wanted: Mapping[str, Sequence[tuple[str, int]]],
        knobs: StyleDropKnobs,
    ) -> dict[str, list[Image.Image]]:
        """`wanted`: prompts with their seeds, by kind. Of a prompt for one concept alone the mixture is the same: what
        leaks over from the other counts as wrong, as in merges."""
        mixture: Mixture = knobs.mixture()
        made: dict[str, Any] = {}
        for kind, shots in wanted.items():
            prompts, seeds = zip(*shots, strict=True)
            steps = knobs.sample_steps
            made[kind] = list(sample_mixture(self.base, subject, style, prompts, seeds, mixture, steps=steps))
        return made
