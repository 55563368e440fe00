"""Eq. 3 of ZipLoRA (arXiv 2311.13600v2) layer by layer, solved instead of iterated.

In teacher run q a target layer reads x with G_q = E[x xᵀ] (`ziplora.moments`), and the merge should give there what
LoRA q alone gives. For one layer that is the quadratic

    J = Σ_q w_q E_q ‖(ΔW_m − ΔW_q) x‖²,    ΔW_a = B_a A_a,    q, a ∈ {c, s}

with w_q = 1, or the weight of the layer's output in run q. Two forms of ΔW_m have a closed minimum: ZipLoRA's own
columns (`column_mergers`) and free matrices (`matrix_downs`). Either is pulled towards the direct merge by a ridge ρt,
where t is the mean diagonal of the system. Both are solved for their distance from the direct merge: the right side is
then what the *other* LoRA does in a run, which is all that is wrong with a direct merge, and nothing cancels.

Nothing of size out×in is formed: ΔW_aᵀΔW_b = A_aᵀ (B_aᵀB_b) A_b.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ziplora.base import Base
from ziplora.calibrate import Calibration
from ziplora.closed_form_knobs import ClosedKnobs, MatrixKnobs
from ziplora.lora import Layer, LoRA, Mergers, zipped
from ziplora.merged import Merged, Pair
from ziplora.module_names import input_of
from ziplora.moments import accumulator, readers

SYSTEM_BYTES = 2**30  # of systems that are solved in one batch
RESIDUAL = {torch.float32: 1e-3, torch.float64: 1e-9}  # largest that a solution may leave, as a share of the right side


def ziplora_closed(base: Base, pairs: Sequence[Pair], knobs: ClosedKnobs) -> list[Merged]:
    """ZipLoRA's mergers by `column_mergers`: Q_ab = Σ_q (ΔW_aᵀ H_q ΔW_b)∘G_q, b_a = Σ_q ((ΔW_aᵀ H_q ΔW_q)∘G_q)·1,
    (Q + ρtI) m = b + ρt·1, with H_q = w_q·I. Raises ArithmeticError for values that are not finite."""
    merged = []
    for pair in pairs:
        solution = column_solution(base, pair, knobs.ridge, knobs.output_weights)
        parts = zipped(pair.subject, pair.style, solution.mergers)
        merged.append(Merged(*parts, solution.mergers, {"solved_in_float64": solution.n_hard}))
    return merged


def ziplora_matrix(base: Base, pairs: Sequence[Pair], knobs: MatrixKnobs) -> list[Merged]:
    """The regression mean of both LoRAs (RegMean, arXiv 2212.09849, Eq. 2, for updates and with a ridge) by
    `matrix_downs`: A'_q = A_q (w_q G_q + ρtI) S⁻¹, S = w_c G_c + w_s G_s + ρtI. Each half keeps its B and so its rank.
    Raises ArithmeticError for values that are not finite."""
    return [_matrix_merge(base, pair, knobs) for pair in pairs]


# The mathematics: matrices in, matrices out. A stack of n layers has `down` [n, 2, rank, in] = A_c, A_s;
# `gram` [n, 2·rank, 2·rank] = [B_c B_s]ᵀ[B_c B_s]; `moments` [n, 2, in, in] = G_c, G_s; `weights` [n, 2] = w_c, w_s.


def column_system(down: Tensor, gram: Tensor, moments: Tensor, weights: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Q + ρtI [n, 2·in, 2·in] and b − Q·1 [n, 2·in], whose solution is (m_c, m_s) − 1.

    E‖M·diag(v)·x‖² = vᵀ((MᵀM)∘G)v makes J a quadratic in the mergers. b − Q·1 is −Σ_q w_q (ΔW_aᵀ ΔW_p)∘G_q · 1
    with p the other one of q.
    """
    n, _, rank, width = down.shape
    # of [A_c 0; 0 A_s] the products ΔW_aᵀΔW_b come out in their places in the system: nothing is moved afterwards
    apart = down.new_zeros(n, 2, rank, 2, width)
    apart[:, 0, :, 0], apart[:, 1, :, 1] = down[:, 0], down[:, 1]
    half = gram @ apart.view(n, 2 * rank, 2 * width)  # [B_c B_s]ᵀ B_a A_a
    system = half.mT @ apart.view(n, 2 * rank, 2 * width)
    weighted = moments * weights[:, :, None, None]
    system.view(n, 2, width, 2, width).mul_(weighted.sum(1)[:, None, :, None])
    # Σ_j (ΔW_aᵀΔW_p ∘ w_q G_q)_ij, p the other of q, needs of ΔW_p G_q only A_p G_q
    seen = (down.flip(1) @ weighted).unflatten(0, (n, 1))  # [n, 1, q, rank, in]
    crossed = half.view(n, 2, rank, 2, width).permute(0, 3, 1, 2, 4).flip(2)  # [n, a, q, rank, in]
    others = (crossed * seen).sum((2, 3))
    return _ridged(system, ridge), -others.flatten(1)


def column_mergers(
    down: Tensor, gram: Tensor, moments: Tensor, weights: Tensor, ridge: float
) -> tuple[Tensor, Tensor, int]:
    """The mergers [n, 2, in] that minimise J + ρt‖m − 1‖², the system's Cholesky factors [n, 2·in, 2·in], and how many
    layers had to be solved in float64."""
    system, right = column_system(down, gram, moments, weights, ridge)
    change, factor, n_hard = solve(system, right[..., None])
    return 1 + change.unflatten(1, (2, -1)).squeeze(-1), factor, n_hard


def matrix_downs(down: Tensor, moments: Tensor, weights: Tensor, ridge: float) -> tuple[Tensor, int]:
    """A'_c, A'_s that minimise J + ρt‖ΔW_m − ΔW_c − ΔW_s‖² over all matrices, like `down`; and the float64 count.

    A'_q = A_q (w_q G_q + ρtI) S⁻¹ = A_q − A_q (w_p G_p) S⁻¹ with p the other one of q. The minimum does not depend on
    B, and needs no more rank than the LoRAs have.
    """
    weighted = moments * weights[:, :, None, None]
    system = _ridged(weighted.sum(1), ridge)
    others = down @ weighted.flip(1)  # A_q w_p G_p
    change, _, n_hard = solve(system, others.flatten(1, 2).mT)
    return down - change.mT.unflatten(1, down.shape[1:3]), n_hard


def _ridged(system: Tensor, ridge: float) -> Tensor:
    """system + ρtI, in place; t is its mean diagonal, or 1 where the system is zero: nothing conflicts there."""
    diagonal = system.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal += ridge * torch.where(mean > 0, mean, torch.ones_like(mean))
    return system


def solve(system: Tensor, right: Tensor) -> tuple[Tensor, Tensor, int]:
    """X [n, k, m] with system [n, k, k] (symmetric positive definite) · X = right, and the Cholesky factors.

    Every solution is put back into its system. Where too much is left, or the factorisation fails, the layer is solved
    once more in float64, and if that fails too by its eigenvalues, those at rounding level left out; the third value
    counts such layers. Raises ArithmeticError for values that are not finite.
    """
    factor, failed = torch.linalg.cholesky_ex(system)
    solution = torch.cholesky_solve(right, factor)
    hard = (failed > 0) | ~(_residual(system, right, solution) <= RESIDUAL[system.dtype])
    numbers = hard.nonzero().flatten().tolist()
    for i in numbers:
        solution[i], factor[i] = _carefully(system[i], right[i])
    return solution, factor, len(numbers)


def _residual(system: Tensor, right: Tensor, solution: Tensor) -> Tensor:
    """‖system·solution − right‖ / ‖right‖ of every layer [n]; 0 where nothing is asked."""
    left = (torch.baddbmm(right, system, solution, beta=-1)).flatten(1).norm(dim=1)
    size = right.flatten(1).norm(dim=1)
    return torch.where(size > 0, left / size.clamp_min(torch.finfo(size.dtype).tiny), left)


def _carefully(system: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """One system in float64."""
    exact, wanted = system.double(), right.double()
    if not (torch.isfinite(exact).all() and torch.isfinite(wanted).all()):
        raise ArithmeticError("the moments or updates of a layer are not finite: is a LoRA broken?")
    factor, failed = torch.linalg.cholesky_ex(exact)
    if not failed:
        return torch.cholesky_solve(wanted, factor).to(right), factor.to(system)
    values, vectors = torch.linalg.eigh(exact)
    floor = values[-1].abs() * len(values) * torch.finfo(system.dtype).eps
    kept = values > floor
    inverse = torch.where(kept, values, torch.ones_like(values)).reciprocal() * kept
    root = (vectors * values.clamp_min(floor).sqrt()) @ vectors.mT
    return (vectors @ (inverse[:, None] * (vectors.mT @ wanted))).to(right), torch.linalg.qr(root)[1].mT.to(system)


# The walk over a pair's layers


@dataclass(frozen=True, slots=True)
class ColumnSolution:
    """`mergers` on the CPU; `factors` [2·in, 2·in] by path on the base's device, the Cholesky factors of the layers'
    systems, if they were asked for; `n_hard` layers had to be solved in float64."""

    mergers: Mergers
    factors: dict[str, Tensor]
    n_hard: int


def column_solution(
    base: Base, pair: Pair, ridge: float, weighted: bool = False, keep_factors: bool = False
) -> ColumnSolution:
    """`column_mergers` of every target that a LoRA of the pair has. Kept factors take 19 GB of fp32 for SDXL."""
    subject: dict[str, Tensor] = {}
    style: dict[str, Tensor] = {}
    factors: dict[str, Tensor] = {}
    n_hard = 0
    for paths in _batches(base, pair):
        down, gram = _layers(base, pair, paths)
        moments, weights = _observed(base, pair, paths, weighted)
        mergers, factor, hard = column_mergers(down, gram, moments, weights, ridge)
        n_hard += hard
        for i, path in enumerate(paths):
            for part, (lora, found) in enumerate(((pair.subject, subject), (pair.style, style))):
                if path in lora.layers:
                    found[path] = mergers[i, part].cpu()
            if keep_factors:
                factors[path] = factor[i].clone()
    return ColumnSolution(Mergers(subject, style), factors, n_hard)


def _matrix_merge(base: Base, pair: Pair, knobs: MatrixKnobs) -> Merged:
    subject, style, n_hard = dict(pair.subject.layers), dict(pair.style.layers), 0
    for inputs in _input_batches(base, pair):
        paths = [path for layers in inputs for path in layers]
        down, _ = _layers(base, pair, paths)
        # layers that read the same input share their system: their rows are solved for together
        stacked = down.unflatten(0, (len(inputs), -1)).transpose(1, 2).flatten(2, 3)  # [inputs, 2, layers·rank, in]
        moments, weights = _observed(base, pair, [layers[0] for layers in inputs], False)
        if knobs.output_weights:
            weights = _observed_weights(base, pair, paths).unflatten(0, (len(inputs), -1)).mean(1)
        changed, hard = matrix_downs(stacked, moments, weights, knobs.ridge)
        n_hard += hard
        rows = changed.unflatten(2, (-1, down.shape[2])).transpose(1, 2).flatten(0, 1)  # like down
        for i, path in enumerate(paths):
            for part, layers in enumerate((subject, style)):
                if path in layers:
                    old = layers[path]
                    layers[path] = Layer(rows[i, part, : old.rank].to(old.down).reshape(old.down.shape), old.up)
    return Merged(LoRA(subject), LoRA(style), None, {"solved_in_float64": n_hard})


def _touched(base: Base, pair: Pair) -> list[str]:
    return [path for path in base.slots.targets if path in pair.subject.layers or path in pair.style.layers]


def _width(base: Base, path: str) -> int:
    return base.slots.layers[path].weight.shape[1]


def _batches(base: Base, pair: Pair) -> Iterator[list[str]]:
    """Layers of one width, as many as `SYSTEM_BYTES` of column systems hold."""
    by_width: dict[int, list[str]] = {}
    for path in _touched(base, pair):
        by_width.setdefault(_width(base, path), []).append(path)
    for width, paths in by_width.items():
        # four products of both LoRAs, the system, its factor, the moments: 14 squares of the width
        size = max(1, SYSTEM_BYTES // (14 * width**2 * accumulator(base.dtype).itemsize))
        yield from (paths[i : i + size] for i in range(0, len(paths), size))


def _input_batches(base: Base, pair: Pair) -> Iterator[list[list[str]]]:
    """Distinct inputs of one width that equally many layers read."""
    alike: dict[tuple[int, int], list[list[str]]] = {}
    for layers in readers(_touched(base, pair)).values():
        alike.setdefault((_width(base, layers[0]), len(layers)), []).append(layers)
    for (width, _), inputs in alike.items():
        size = max(1, SYSTEM_BYTES // (6 * width**2 * accumulator(base.dtype).itemsize))
        yield from (inputs[i : i + size] for i in range(0, len(inputs), size))


def _layers(base: Base, pair: Pair, paths: Collection[str]) -> tuple[Tensor, Tensor]:
    """`down` [layers, 2, rank, in] and `gram` [layers, 2·rank, 2·rank]; zero rows where a LoRA has less rank."""
    device, dtype = base.device, accumulator(base.dtype)
    found = [[lora.layers.get(path) for lora in (pair.subject, pair.style)] for path in paths]
    rank = max(layer.rank for row in found for layer in row if layer is not None)
    down = torch.zeros(len(found), 2, rank, _width(base, next(iter(paths))), device=device, dtype=dtype)
    gram = torch.zeros(len(found), 2 * rank, 2 * rank, device=device, dtype=dtype)
    for i, row in enumerate(found):
        out = next(layer.up.shape[0] for layer in row if layer is not None)
        up = torch.zeros(out, 2 * rank, device=device, dtype=dtype)
        for part, layer in enumerate(row):
            if layer is not None:
                down[i, part, : layer.rank] = layer.down.flatten(1).to(down)
                up[:, part * rank : part * rank + layer.rank] = layer.up.flatten(1).to(up)
        gram[i] = up.mT @ up
    return down, gram


def _observed(base: Base, pair: Pair, paths: Collection[str], weighted: bool) -> tuple[Tensor, Tensor]:
    """`moments` [layers, 2, in, in] and `weights` [layers, 2]."""
    device, dtype = base.device, accumulator(base.dtype)
    recorded = [_moments(calibration) for calibration in _calibrations(pair)]
    moments = torch.stack([torch.stack([one[input_of(path)].to(device, dtype) for one in recorded]) for path in paths])
    weights = _observed_weights(base, pair, paths) if weighted else moments.new_ones(len(moments), 2)
    return moments, weights


def _observed_weights(base: Base, pair: Pair, paths: Collection[str]) -> Tensor:
    """[layers, 2], each layer's mean 1: only their ratio is of interest, and fp32 holds no weight of 1e-40."""
    known = [calibration.output_weights for calibration in _calibrations(pair)]
    if any(one is None for one in known):
        raise ValueError("output weights were not recorded: calibrate with moments 'inputs+outputs'")
    values = torch.tensor([[one[path] for one in known if one is not None] for path in paths], dtype=torch.float64)
    total = values.sum(1, keepdim=True)
    values = torch.where(total > 0, 2 * values / total, torch.ones_like(values))
    return values.to(base.device, accumulator(base.dtype))


def _calibrations(pair: Pair) -> tuple[Calibration, Calibration]:
    if pair.subject_calibration is None or pair.style_calibration is None:
        raise ValueError("a closed form needs calibrations of both LoRAs: see Method.calibration")
    return pair.subject_calibration, pair.style_calibration


def _moments(calibration: Calibration) -> dict[str, Tensor]:
    if calibration.moments is None:
        raise ValueError("second moments were not recorded: calibrate with moments 'inputs'")
    return dict(calibration.moments)
