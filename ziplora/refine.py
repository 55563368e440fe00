"""The closed form, then a few steps of the gradient engine from there."""

from collections.abc import Sequence

from torch import Tensor

from ziplora.base import Base
from ziplora.closed_form import ColumnSolution, column_solution
from ziplora.closed_form_knobs import RefinedKnobs
from ziplora.descent import Descent, adam, whitened_lbfgs
from ziplora.merged import Merged, Pair
from ziplora.optimize import Optimization


def ziplora_refined(base: Base, pairs: Sequence[Pair], knobs: RefinedKnobs) -> list[Merged]:
    """The first two terms of Eq. 3 (arXiv 2311.13600v2), descended from the mergers of `column_solution`.

    With `lbfgs` in u, m = m₀ + L⁻ᵀu, where L·Lᵀ = 2·w·(Q + ρtI): J of a layer is the quadratic with Hessian 2Q of the
    mean square of its output, and w of its outputs makes that one of the prediction (see `moments.weigh_outputs`).
    The factors of a pair take 19 GB of fp32 for SDXL; Adam needs none. Raises what `ziplora` raises.
    """
    lbfgs = knobs.optimizer == "lbfgs"
    solutions = [column_solution(base, pair, knobs.ridge, knobs.output_weights, keep_factors=lbfgs) for pair in pairs]
    descent: Descent = adam(knobs.learning_rate)
    if lbfgs:
        descent = whitened_lbfgs([_to_loss(*both) for both in zip(pairs, solutions, strict=True)])
    optimization = Optimization(
        base, pairs, knobs.engine(), initial=[one.mergers for one in solutions], descent=descent
    )
    for _ in optimization:
        pass
    merged = []
    for i, (one, solution) in enumerate(zip(optimization.merged(), solutions, strict=True)):
        report = {**one.report, "solved_in_float64": solution.n_hard}
        if lbfgs:  # whose last evaluation may be of a step that it took back
            best = min(optimization.history, key=lambda step: float(step.subject_loss[i] + step.style_loss[i]))
            report["subject_loss"] = [report["subject_loss"][0], best.subject_loss[i].item()]
            report["style_loss"] = [report["style_loss"][0], best.style_loss[i].item()]
        merged.append(Merged(one.subject, one.style, one.mergers, report))
    return merged


def _to_loss(pair: Pair, solution: ColumnSolution) -> dict[str, Tensor]:
    """The factors times √(2w): of the loss in place of the layer's own output. w is the mean of both runs'; the
    system's own weights are relative to it."""
    subject, style = pair.subject_calibration, pair.style_calibration
    assert subject is not None
    assert subject.output_weights is not None
    assert style is not None
    assert style.output_weights is not None
    weights = {path: subject.output_weights[path] + style.output_weights[path] for path in solution.factors}
    floor = 1e-6 * max(weights.values(), default=1.0) or 1.0  # a layer without any effect has no scale
    for path, factor in solution.factors.items():
        factor *= max(weights[path], floor) ** 0.5
    return solution.factors
