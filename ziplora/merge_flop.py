"""Floating-point operations of merging one pair, beside the model passes. No torch: plans are made with it.

Each function counts as if both LoRAs changed every merge target, each at its own rank, and no other layer:
`(targets, ranks, knobs)` with targets module path → (out, in) and ranks (the subject's, the style's). A product of
matrices m×k and k×n costs 2·m·k·n; factorisations what Golub and Van Loan give for them (Matrix Computations, 4th
edition, sections 4.2, 5.2 and 8.6), leading terms alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ziplora.baseline_knobs import EXACT, OVERSAMPLED, POWERS
from ziplora.fusion_knobs import HISTORY, CustomDiffusionKnobs, GradientFusionKnobs
from ziplora.module_names import CONTEXT, input_of

Targets = Mapping[str, tuple[int, int]]
Ranks = tuple[int, int]
Flop = Callable[[Targets, Ranks, Any], float]

EVALUATIONS = 1.1  # of objective and gradient for each step of L-BFGS, line search included: 1.04 to 1.16 as counted
WORDS = 12  # of either concept: its trigger and what follows, alone and in a short prompt
SELECTING = 8  # operations per element: its magnitude, two sums, and a selection of the largest in a few passes


def columns(targets: Targets, ranks: Ranks, knobs: Any) -> float:
    """ziplora's closed form: nearly all in a Cholesky factor of both LoRAs' columns together for each target."""
    return sum(cholesky(2 * width) for _, width in targets.values())


def matrices(targets: Targets, ranks: Ranks, knobs: Any) -> float:
    """The regression mean: a Cholesky factor for each distinct input."""
    return sum(cholesky(width) for width in {input_of(path): width for path, (_, width) in targets.items()}.values())


def sparsified(targets: Targets, ranks: Ranks, knobs: Any) -> float:
    """TIES, DARE, pruning: both dense ΔW, and each factored again."""
    return sum(
        dense(*shape, rank) + SELECTING * shape[0] * shape[1] + compressed(*shape, knobs.rank or rank)
        for shape in targets.values()
        for rank in ranks
    )


def summed(targets: Targets, ranks: Ranks, knobs: Any) -> float:
    """SVD of the sum, from its factors."""
    return sum(factored_svd(*shape, sum(ranks)) for shape in targets.values())


def projected(targets: Targets, ranks: Ranks, knobs: Any) -> float:
    """NP-LoRA: the style's row space, the subject's `down` projected, and two dense norms for the report."""
    subject, style = ranks
    return sum(
        factored_svd(out, width, style) + 4.0 * subject * width * style + 2 * dense(out, width, subject)
        for out, width in targets.values()
    )


def chosen(targets: Targets, ranks: Ranks, knobs: Any) -> float:
    """K-LoRA: both dense ΔW, and their largest elements."""
    return sum(dense(out, width, rank) + SELECTING * out * width for out, width in targets.values() for rank in ranks)


def fused(targets: Targets, ranks: Ranks, knobs: GradientFusionKnobs) -> float:
    """Gradient fusion: each evaluation multiplies two errors [k, in] by moments [in, in], where k is the rank of both
    LoRAs' outputs together, and each iteration goes twice through L-BFGS' memory."""
    total = 0.0
    for path, (out, width) in targets.items():
        steps = knobs.context_steps if input_of(path) == CONTEXT else knobs.steps
        size = float(min(out, sum(ranks)) * width)
        total += steps * (EVALUATIONS * 4 * size * width + 8 * min(HISTORY, steps) * size)
        total += qr(out, sum(ranks))
    return total


def constrained(targets: Targets, ranks: Ranks, knobs: CustomDiffusionKnobs) -> float:
    """Custom Diffusion: the captions' Cholesky factor and the words through it, once; then K and V of each
    cross-attention at the words. The captions themselves are encoded once for all pairs: `Method.captions`."""
    layers = [shape for path, shape in targets.items() if input_of(path) == CONTEXT]
    width = max((width for _, width in layers), default=0)
    words = 2 * WORDS
    total = cholesky(width) + 4.0 * words * width**2 if layers else 0.0
    for out, n_in in layers:
        total += sum(2.0 * WORDS * rank * (n_in + out) + factored_svd(out, n_in, WORDS) for rank in ranks)
        total += 4.0 * words * n_in * out
    return total


# What they are made of


def dense(out: int, width: int, rank: int) -> float:
    """up·down."""
    return 2.0 * out * width * rank


def cholesky(n: int) -> float:
    return n**3 / 3


def qr(rows: int, columns: int) -> float:
    """Both factors, thin."""
    return 4.0 * max(rows, columns) * min(rows, columns) ** 2


def svd(rows: int, columns: int) -> float:
    """Singular values and both thin factors."""
    return 14.0 * max(rows, columns) * min(rows, columns) ** 2 + 8.0 * min(rows, columns) ** 3


def compressed(out: int, width: int, rank: int) -> float:
    """`factor.compressed`: a whole SVD of a small matrix, a randomised one of a large, and the error that is left."""
    rank = min(rank, out, width)
    if min(out, width) <= max(EXACT, rank + OVERSAMPLED):
        return svd(out, width) + dense(out, width, rank)
    columns, products = rank + OVERSAMPLED, 2 + 2 * POWERS
    orthogonal = (1 + POWERS) * qr(out, columns) + POWERS * qr(width, columns)
    return products * dense(out, width, columns) + orthogonal + svd(columns, width) + dense(out, width, rank)


def factored_svd(out: int, width: int, rank: int) -> float:
    """`factor.svd`: of a sum of updates whose ranks add up to `rank`, from the factors."""
    inner = min(rank, out, width)
    through = 2.0 * inner**2 * (out + width)
    return qr(out, rank) + qr(width, rank) + 2.0 * inner**2 * rank + svd(inner, inner) + through
