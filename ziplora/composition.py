"""What a merge should predict under the combined prompt, where neither LoRA alone is a teacher.

A term beside Eq. 3 of ZipLoRA (arXiv 2311.13600v2), which only looks at each LoRA's own prompt:

    γ·‖ε(L_m; x, p_cs) − ε*(x, p_cs)‖²

ε* is what the direct merge predicts there; or ε(L_c; x, p_cs) + ε(L_s; x, p_cs) − ε(x, p_cs), which adds up what both
LoRAs do to the base model's prediction, as the conjunction of Composable Diffusion (arXiv 2206.01714) does for several
prompts. No picture is sampled for it: x are the noised pictures that both LoRAs are calibrated on.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ziplora.base import Base, Conditioning
from ziplora.calibrate import Calibration, predictions
from ziplora.lora import LoRA, touches_text_encoder
from ziplora.merged import Pair
from ziplora.optimize_knobs import ComposedKnobs


def combined_calibrations(base: Base, pairs: Sequence[Pair], knobs: ComposedKnobs) -> list[Calibration]:
    """One per pair: its `combined_draws` latents, the subject's and the style's in turn, and the target on them. The
    conditioning is the base's own. Closes what the slots hold. Raises ValueError for a pair without combined prompt."""
    teachers = _Teachers(base)
    return [_combined(base, pair, knobs, teachers) for pair in pairs]


def _combined(base: Base, pair: Pair, knobs: ComposedKnobs, teachers: "_Teachers") -> Calibration:
    subject, style, prompt = pair.subject_calibration, pair.style_calibration, pair.combined_prompt
    if not prompt or subject is None or style is None:
        raise ValueError("a combined term needs both calibrations and Pair.combined_prompt: see Method.combined_prompt")
    half = min(knobs.combined_draws // 2, len(subject.timesteps), len(style.timesteps))
    targets = []
    for seen in (subject, style):
        if knobs.combined_target == "direct":
            targets.append(teachers.predict((pair.subject, pair.style), prompt, seen, half))
        else:
            alone = [teachers.predict((lora,), prompt, seen, half) for lora in (pair.subject, pair.style)]
            targets.append(alone[0] + alone[1] - teachers.predict((), prompt, seen, half))

    def in_turn(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([a, b], 1).flatten(0, 1)

    return Calibration(
        prompt,
        in_turn(subject.noisy[:half], style.noisy[:half]),
        in_turn(subject.timesteps[:half], style.timesteps[:half]),
        in_turn(*targets),
        teachers.conditioning((), prompt),
        subject.source if subject.source == style.source else "self-generated",
    )


class _Teachers:
    """Predictions by (LoRAs, prompt, latents), each computed once: pairs that share a LoRA and a prompt share them."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.predicted: dict[tuple[object, ...], Tensor] = {}
        self.encoded: dict[tuple[object, ...], Conditioning] = {}

    def predict(self, loras: tuple[LoRA, ...], prompt: str, seen: Calibration, n: int) -> Tensor:
        key = (*map(id, loras), prompt, id(seen), n)
        if key not in self.predicted:
            conditioning = self.conditioning(loras, prompt)
            with self._holding(loras):
                self.predicted[key] = predictions(self.base, seen.noisy[:n], seen.timesteps[:n], conditioning)
        return self.predicted[key]

    def conditioning(self, loras: tuple[LoRA, ...], prompt: str) -> Conditioning:
        """The prompt as these LoRAs' text encoders see it."""
        loras = tuple(lora for lora in loras if touches_text_encoder(lora))
        key = (*map(id, loras), prompt)
        if key not in self.encoded:
            with self._holding(loras):
                self.encoded[key] = self.base.encode_prompts([prompt])
        return self.encoded[key]

    def _holding(self, loras: tuple[LoRA, ...]) -> AbstractContextManager[Any]:
        if loras:
            return self.base.slots.loaded([list(loras)])
        self.base.slots.close()
        return nullcontext()
