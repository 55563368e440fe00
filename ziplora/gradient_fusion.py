"""Gradient fusion of Mix-of-Show (arXiv 2305.18292): each layer is fitted to what it gave in either concept's own run.

    W = argmin_W Σ_i ‖(W₀ + ΔW_i) X_i − W X_i‖²_F

X_i are the inputs that the layer read in the run of LoRA i. The objective is Σ_i tr(E_i G_i E_iᵀ) with E_i = W₀ + ΔW_i
− W and G_i = X_i X_iᵀ: it depends on X_i through the second moment alone, which is what is recorded
(`ziplora.moments`), so that L-BFGS on moments is L-BFGS on inputs.

W starts at W₀, and every gradient, −2 Σ_i E_i G_i, has its columns in those of the ΔW_i. So have all iterates:
W − W₀ = B_c·A'_c + B_s·A'_s throughout, a LoRA of rank r_c + r_s, and nothing is left out of the file. It is searched
in an orthonormal basis of [B_c B_s], in which lengths and angles are those of W.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ziplora.base import Base
from ziplora.calibrate import Calibration
from ziplora.fusion_knobs import HISTORY, GradientFusionKnobs
from ziplora.lora import Layer, LoRA, select
from ziplora.merged import Merged, Pair
from ziplora.module_names import CONTEXT, input_of
from ziplora.moments import accumulator, recorded

INDEPENDENT = 1e-6  # singular values of [B_c B_s] below this share of the largest say that columns are the same

Objective = Callable[[Tensor], tuple[Tensor, Tensor]]  # its value and its gradient


def mix_of_show(base: Base, pairs: Sequence[Pair], knobs: GradientFusionKnobs) -> list[Merged]:
    """Gradient fusion (arXiv 2305.18292) of all merge targets and, where a LoRA has them, of the text encoders' linear
    layers, whose inputs are recorded on the LoRA's prompt. Stopped after so many steps as the published code is, which
    leaves alone what the inputs hardly show. Other layers are carried: both LoRAs' updates add up there.

    Raises ValueError where calibrations lack the moments, ArithmeticError for values that are not finite.
    """
    return [_fused_pair(base, pair, knobs) for pair in pairs]


def _fused_pair(base: Base, pair: Pair, knobs: GradientFusionKnobs) -> Merged:
    loras = (pair.subject, pair.style)
    parts: list[dict[str, Layer]] = [dict(lora.layers) for lora in loras]
    seen = [_moments(calibration) for calibration in (pair.subject_calibration, pair.style_calibration)]
    inputs = [{**images, **text} for images, text in zip(seen, _text_moments(base, pair), strict=True)]
    left: list[float] = []
    for path in dict.fromkeys(path for lora in loras for path in lora.layers):
        name = input_of(path)
        if not all(name in known for known in inputs):
            continue
        having = [number for number, lora in enumerate(loras) if path in lora.layers]
        steps = knobs.steps if path in base.slots.targets and name != CONTEXT else knobs.context_steps
        wide = accumulator(base.dtype)
        moments = [known[name].to(base.device, wide) for known in inputs]
        layers = [_matrices(loras[number].layers[path], moments[0]) for number in having]
        targets = [layers[having.index(number)] if number in having else None for number in range(2)]
        made, rest = fused(targets, moments, steps)
        if not math.isfinite(rest):
            raise ArithmeticError(
                f"gradient fusion of {path} is not finite: is a LoRA broken, or its weight too large?"
            )
        left.append(rest)
        for number, layer in zip(having, made, strict=True):
            old = loras[number].layers[path]
            parts[number][path] = Layer(layer.down.to(old.down).reshape(old.down.shape), old.up)
    if not left:
        raise ValueError("neither LoRA touches a layer that can be fused: nothing to fit, use the direct method")
    report = {"fusion_left_mean": sum(left) / len(left), "fusion_left_max": max(left)}
    return Merged(LoRA(parts[0]), LoRA(parts[1]), None, report)


def fused(updates: Sequence[Layer | None], moments: Sequence[Tensor], steps: int) -> tuple[list[Layer], float]:
    """B_i·A'_i of those updates that are there, whose sum minimises Σ_i tr(E_i G_i E_iᵀ) after `steps` of L-BFGS from
    W₀; and the share of the objective that is left. `moments` G_i [in, in]; None is a LoRA that lacks the layer, so
    that E_i = W₀ − W there."""
    there = [layer for layer in updates if layer is not None]
    basis, triangle = torch.linalg.qr(torch.cat([layer.up for layer in there], 1).double())
    columns = iter(triangle.split([layer.rank for layer in there], 1))
    width = moments[0].shape[0]
    targets = [
        moments[0].new_zeros(basis.shape[1], width)
        if layer is None
        else (next(columns) @ layer.down.double()).to(moments[0])
        for layer in updates
    ]

    def objective(change: Tensor) -> tuple[Tensor, Tensor]:
        """And its gradient. By differences: expanded, the small remainder would be lost to rounding."""
        total, gradient = change.new_zeros(()), torch.zeros_like(change)
        for target, moment in zip(targets, moments, strict=True):
            error = change - target
            weighted = error @ moment
            total += (weighted * error).sum()
            gradient += 2 * weighted
        return total, gradient

    change = torch.zeros_like(targets[0])
    start = objective(change)[0]
    if start > 0 and torch.isfinite(start):
        change = _lbfgs(objective, change, start, steps)
    downs = torch.linalg.pinv(triangle, rtol=INDEPENDENT) @ change.double()
    parts = downs.split([layer.rank for layer in there])
    made = [Layer(down.to(moments[0]), layer.up) for down, layer in zip(parts, there, strict=True)]
    return made, float(objective(change)[0] / start) if start != 0 else 0.0


def _lbfgs(objective: Objective, start: Tensor, scale: Tensor, steps: int) -> Tensor:
    """Where L-BFGS with a strong Wolfe line search gets from `start`; objective and gradient are divided by `scale`."""
    at = nn.Parameter(start)
    optimizer = torch.optim.LBFGS(
        [at], max_iter=steps, history_size=HISTORY, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0
    )

    @torch.no_grad()
    def closure() -> Tensor:
        value, gradient = objective(at)
        at.grad = gradient / scale
        return value / scale

    optimizer.step(closure)
    return at.detach()


def _moments(calibration: Calibration | None) -> Mapping[str, Tensor]:
    if calibration is None or calibration.moments is None:
        raise ValueError("gradient fusion needs both LoRAs' calibrations with moments 'inputs': see Method.calibration")
    return calibration.moments


def _text_moments(base: Base, pair: Pair) -> list[Mapping[str, Tensor]]:
    """Of the inputs of all text-encoder layers that a LoRA of the pair has, in either LoRA's run on its prompt."""
    paths = [path for path in (*pair.subject.layers, *pair.style.layers) if path.startswith("text_encoder")]
    paths = [path for path in dict.fromkeys(paths) if isinstance(base.slots.layers[path], nn.Linear)]
    found: list[Mapping[str, Tensor]] = []
    for lora, calibration in ((pair.subject, pair.subject_calibration), (pair.style, pair.style_calibration)):
        assert calibration is not None
        if not paths:
            found.append({})
            continue
        text = select(lora, lambda path: path.startswith("text_encoder"))
        with base.slots.loaded([[text]]), recorded(base.slots, paths) as moments:
            base.encode_prompts([calibration.prompt])
        found.append(moments)
    return found


def _matrices(layer: Layer, like: Tensor) -> Layer:
    return Layer(layer.down.flatten(1).to(like), layer.up.flatten(1).to(like))
