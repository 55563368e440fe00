"""ZipLoRA as published (arXiv 2311.13600v2): Eq. 3 and its short optimisation, for k pairs at once on one resident
UNet.

    L = ‖ε(L_m; x_c, p_c) − ε(L_c; x_c, p_c)‖ + ‖ε(L_m; x_s, p_s) − ε(L_s; x_s, p_s)‖ + λ Σ_layers |m_c·m_s|

The mergers m_c, m_s are the only parameters. Both reconstruction terms of all pairs are rows of one forward pass;
teachers come from `calibrate`. Pairs do not see each other: the loss is a sum over them, and each has a descent of its
own.

With `ComposedKnobs` a third reconstruction term, of the combined prompt (`ziplora.composition`), is weighed by γ.

The UNet's own `enable_gradient_checkpointing()` is honoured: activations are then computed twice instead of kept.
So is `Base.backend`: mergers and LoRAs are plain tensors to a compiled UNet, which another pair of the same ranks does
not compile again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ziplora.base import Base, Conditioning, stack
from ziplora.calibrate import Calibration
from ziplora.composition import combined_calibrations
from ziplora.descent import Descent, adam
from ziplora.lora import Mergers, touches_text_encoder, zipped
from ziplora.merged import Merged, Pair
from ziplora.optimize_knobs import ComposedKnobs, ZipLoRAKnobs


def similarity_penalty(m_subject: Tensor, m_style: Tensor) -> Tensor:
    """|m_subject · m_style|, one layer's term of Eq. 3; [..., in] → [...]. A dot product: the cosine has no
    gradient at 1."""
    return (m_subject * m_style).sum(-1).abs()


def penalty_sum(mergers: Mapping[str, Tensor], form: str) -> Tensor:
    """The third term of Eq. 3 for mergers [merges, 2, in] of each layer, without λ: [merges]. `form` as in
    ZipLoRAKnobs.penalty."""
    terms = []
    for merger in mergers.values():
        term = similarity_penalty(merger[:, 0], merger[:, 1])
        terms.append(term if form == "literal" else term / merger.shape[-1])
    total = torch.stack(terms).sum(0)
    return total / len(terms) if form == "mean" else total


def reconstruction(predicted: Tensor, target: Tensor, form: str) -> Tensor:
    """The first two terms of Eq. 3: [merges, 2, rows, c, h, w] → [merges, 2] (subject, style), averaged over rows; and
    a third like them where there is one."""
    difference = (predicted.double() if predicted.dtype == torch.float64 else predicted.float()) - target
    if form == "norm":
        return difference.flatten(3).norm(dim=-1).mean(-1)
    return difference.square().flatten(2).mean(-1)


Calibrations = Sequence[Sequence[Calibration | None]]  # of each pair: subject's, style's, combined prompt's if any


@dataclass(frozen=True, slots=True)
class Step:
    """One update of every pair; all values [merges]. `similarity` is Σ |m_c·m_s| over the layers that are learned, as a
    share of its start; `combined_loss`, without γ, is None where γ is 0."""

    number: int
    subject_loss: Tensor
    style_loss: Tensor
    similarity: Tensor
    combined_loss: Tensor | None = None


class Optimization:
    """The optimisation of some pairs, as an iterable of `Step` with a length; `merged()` afterwards.

    Leaves the pairs in the base's slots until the iteration ends.
    """

    def __init__(
        self,
        base: Base,
        pairs: Sequence[Pair],
        knobs: ZipLoRAKnobs,
        *,
        initial: Sequence[Mergers] | None = None,
        descent: Descent | None = None,
    ) -> None:
        """Mergers start at `initial`, or at 1 (the direct merge); `descent` moves them, Adam if not given."""
        self.base, self.pairs, self.knobs, self.initial = base, pairs, knobs, initial
        self.descent = descent or adam(knobs.learning_rate)
        self.mergers: list[Mergers] = []
        self.history: list[Step] = []
        self.stopped_at = [knobs.steps] * len(pairs)

    def __len__(self) -> int:
        return self.knobs.steps

    def __iter__(self) -> Iterator[Step]:
        base, knobs = self.base, self.knobs
        if base.dtype == torch.float16:
            raise ValueError("gradients underflow in float16, so nothing would be learned: use bfloat16 or float32")
        gamma = knobs.combined_weight if isinstance(knobs, ComposedKnobs) else 0.0
        calibrations = [[pair.subject_calibration, pair.style_calibration] for pair in self.pairs]
        if isinstance(knobs, ComposedKnobs) and gamma:
            for parts, combined in zip(calibrations, combined_calibrations(base, self.pairs, knobs), strict=True):
                parts.append(combined)
        base.slots.load([[pair.subject, pair.style] for pair in self.pairs])
        try:
            conditioning = _conditioning(base, self.pairs, calibrations)
            mergers = base.slots.attach_mergers()
            if not mergers:
                raise ValueError(
                    "neither LoRA touches an attention layer of the UNet: nothing to merge, use the direct method"
                )
            if self.initial is not None:
                self._start(mergers, self.initial)
            learned = _learned(mergers, knobs.layers)
            update = self.descent(learned)
            start = penalty_sum(learned, "literal").detach().clamp_min(1.0)  # 0 where no layer has both LoRAs
            frozen: list[Mergers | None] = [None] * len(self.pairs)
            for number in range(1, knobs.steps + 1):
                noisy, timesteps, target = batch(calibrations, number - 1, knobs.batch, knobs.draws)
                loss = eq3_losses(base, learned, noisy, timesteps, conditioning.repeat(knobs.batch), target, knobs)
                terms = loss.reconstruction
                total = terms[:, :2].sum(1) + gamma * terms[:, 2:].sum(1) + knobs.penalty_weight * loss.penalty
                # emptied before, not after: a gradient left behind would double the memory of the mergers
                for merger in learned.values():
                    merger.grad = None
                total.sum().backward()
                update(total.detach(), number == knobs.steps)
                step = self._record(number, terms.detach(), penalty_sum(learned, "literal").detach() / start)
                for i in (step.similarity <= knobs.similarity_floor).nonzero().flatten().tolist():
                    if frozen[i] is None:
                        frozen[i], self.stopped_at[i] = self._take(mergers, i), number
                yield step
                if all(frozen):
                    break
            self.mergers = [frozen[i] or self._take(mergers, i) for i in range(len(self.pairs))]
        finally:
            base.slots.close()

    def _record(self, number: int, losses: Tensor, similarity: Tensor) -> Step:
        parts = [part.cpu() for part in losses.unbind(1)]
        step = Step(number, parts[0], parts[1], similarity.cpu(), *parts[2:])
        if not torch.isfinite(losses).all():
            what = f"the loss is not finite at step {number}"
            if number == 1:  # not the optimisation's doing: usually it is the direct merge that overflows
                raise ArithmeticError(f"{what}, before any update: is a LoRA broken, or its weight far too large?")
            raise ArithmeticError(f"{what}: lower the learning rate ({self.knobs.learning_rate})")
        self.history.append(step)
        return step

    @torch.no_grad()
    def _start(self, mergers: Mapping[str, nn.Parameter], initial: Sequence[Mergers]) -> None:
        for i, given in enumerate(initial):
            for part, values in enumerate((given.subject, given.style)):
                for path, value in values.items():
                    mergers[path][i, part] = value.to(mergers[path])

    def _take(self, mergers: Mapping[str, nn.Parameter], index: int) -> Mergers:
        """Merge `index`'s coefficients; a layer that only one LoRA has keeps both (the other's multiply nothing)."""
        values = {path: merger.detach()[index].cpu().clone() for path, merger in mergers.items()}
        pair = self.pairs[index]
        return Mergers(
            {path: value[0] for path, value in values.items() if path in pair.subject.layers},
            {path: value[1] for path, value in values.items() if path in pair.style.layers},
        )

    def merged(self) -> list[Merged]:
        return [
            Merged(*zipped(pair.subject, pair.style, mergers), mergers, self._report(i))
            for i, (pair, mergers) in enumerate(zip(self.pairs, self.mergers, strict=True))
        ]

    def _report(self, index: int) -> dict[str, Any]:
        first, last = self.history[0], self.history[self.stopped_at[index] - 1]
        combined = {}
        if first.combined_loss is not None and last.combined_loss is not None:
            combined = {"combined_loss": [first.combined_loss[index].item(), last.combined_loss[index].item()]}
        return combined | {
            "steps": self.stopped_at[index],
            "stopped_early": self.stopped_at[index] < self.knobs.steps,
            "subject_loss": [first.subject_loss[index].item(), last.subject_loss[index].item()],
            "style_loss": [first.style_loss[index].item(), last.style_loss[index].item()],
            "similarity": last.similarity[index].item(),
        }


def _learned(mergers: Mapping[str, nn.Parameter], layers: str) -> dict[str, nn.Parameter]:
    """Those that the optimisation moves; the others stay where they are, and need no gradient."""
    learned = dict(mergers)
    if layers == "q-out":
        learned = {path: merger for path, merger in mergers.items() if path.endswith((".to_q", ".to_out.0"))}
    if not learned:
        raise ValueError("neither LoRA touches queries or outputs of attention, so layers q-out has nothing to learn")
    for path in mergers.keys() - learned.keys():
        mergers[path].requires_grad_(False)
    return learned


def ziplora(
    base: Base, pairs: Sequence[Pair], knobs: ZipLoRAKnobs, on_step: Callable[[Step], None] | None = None
) -> list[Merged]:
    """Merge `pairs` side by side. Raises ArithmeticError when the optimisation diverges, ValueError when there is
    nothing to optimise."""
    optimization = Optimization(base, pairs, knobs)
    for step in optimization:
        if on_step is not None:
            on_step(step)
    return optimization.merged()


@dataclass(frozen=True, slots=True)
class Losses:
    """The terms of Eq. 3: `reconstruction` [merges, 2] (subject, style), `penalty` [merges], without λ."""

    reconstruction: Tensor
    penalty: Tensor


def eq3_losses(
    base: Base,
    mergers: Mapping[str, Tensor],
    noisy: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    target: Tensor,
    knobs: ZipLoRAKnobs,
) -> Losses:
    """Eq. 3 of each merge in the slots; noisy and target [merges, 2, rows, c, h, w], timesteps [merges, 2, rows],
    conditioning in the same order."""
    predicted = base.predict_noise(noisy.flatten(0, 2), timesteps.flatten(), conditioning, base.backend)
    return Losses(
        reconstruction(predicted.unflatten(0, target.shape[:3]), target, knobs.reconstruction),
        penalty_sum(mergers, knobs.penalty),
    )


def student_conditioning(base: Base, pairs: Sequence[Pair]) -> Conditioning:
    """Both prompts of every pair, [2·pairs] rows: as the merged text encoders see them, which differ from the
    teachers' only if a LoRA trains them."""
    return _conditioning(base, pairs, [[pair.subject_calibration, pair.style_calibration] for pair in pairs])


def _conditioning(base: Base, pairs: Sequence[Pair], calibrations: Calibrations) -> Conditioning:
    known = [calibration for parts in calibrations for calibration in parts if calibration is not None]
    if not any(touches_text_encoder(lora) for pair in pairs for lora in (pair.subject, pair.style)):
        return stack([calibration.conditioning for calibration in known])
    return base.encode_prompts([calibration.prompt for calibration in known])


def batch(calibrations: Calibrations, step: int, rows: int, draws: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Step `step`'s draws of every pair: noisy [merges, 2, rows, c, h, w] (3 with a combined term), timesteps
    [merges, 2, rows], target like noisy. Only the first `draws` of both LoRAs' calibrations are used, if given."""

    def pick(part: int, calibration: Calibration | None) -> tuple[Tensor, Tensor, Tensor]:
        assert calibration is not None
        known = len(calibration.timesteps)
        used = known if draws is None or part == 2 else min(draws, known)
        index = torch.arange(step * rows, (step + 1) * rows) % used
        return calibration.noisy[index], calibration.timesteps[index], calibration.target[index]

    picked = [[pick(*numbered) for numbered in enumerate(parts)] for parts in calibrations]
    noisy, timesteps, target = (
        torch.stack([torch.stack([one[i] for one in parts]) for parts in picked]) for i in range(3)
    )
    return noisy, timesteps, target
