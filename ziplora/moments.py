"""What the closed forms need to know of a LoRA's runs: second moments of the inputs of the merge-target layers, and how
much a change of their outputs changes the prediction.

For a linear layer with inputs x, any change D of its weights changes its output by E‖D·x‖² = tr(D G Dᵀ) on average,
with G = E[x xᵀ]: G is all that a layer-wise reconstruction (RegMean, arXiv 2212.09849, Eq. 1) depends on.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ziplora.base import Base, Conditioning
from ziplora.module_names import input_of
from ziplora.slots import Slots


def readers(targets: Collection[str]) -> dict[str, list[str]]:
    """The distinct inputs of the targets, each with the layers that read it."""
    layers: dict[str, list[str]] = {}
    for path in targets:
        layers.setdefault(input_of(path), []).append(path)
    return layers


@contextmanager
def recorded(slots: Slots, paths: Collection[str] | None = None) -> Iterator[dict[str, Tensor]]:
    """Within the block every forward pass is observed; after it the mapping holds E[x xᵀ], [in, in], by name of the
    input, of these layers (linear ones; the merge targets if not given). Means over batch rows and positions, summed in
    fp32 (fp64 if the layers are fp64). A GPU multiplies inputs of half precision as TF32, which has room for all of
    their digits."""
    moments: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        @torch.no_grad()
        def add(_: Any, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2).to(accumulator(inputs[0].dtype))
            if name not in moments:
                moments[name], counts[name] = rows.new_zeros(rows.shape[1], rows.shape[1]), 0
            moments[name].addmm_(rows.mT, rows)
            counts[name] += len(rows)

        return add

    hooks = [
        slots.layers[layers[0]].register_forward_pre_hook(watch(name))
        for name, layers in readers(slots.targets if paths is None else paths).items()
    ]
    multiplication = torch.backends.cuda.matmul
    before = multiplication.allow_tf32
    halves = next(iter(slots.layers.values())).weight.dtype in (torch.bfloat16, torch.float16)
    multiplication.allow_tf32 = before or halves
    try:
        yield moments
    finally:
        multiplication.allow_tf32 = before
        for hook in hooks:
            hook.remove()
        for name, moment in moments.items():
            moment /= counts[name]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums of values of `dtype` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def weigh_outputs(
    base: Base, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, seed: int
) -> tuple[dict[str, float], Tensor]:
    """w of every target: a change δy of its output, independent over positions, changes the mean square of the
    prediction by about w·E‖δy‖². And the predictions, like noisy: a draw that is weighed needs no other pass.

    With g = ∂(zᵀε/√numel)/∂y of one backward pass and Gaussian z, E[g gᵀ] is the Gauss-Newton matrix H of the mean
    square at that position; w = Σ_positions tr(H)/out, averaged over the rows. One row at a time, to keep one row's
    activations.
    """
    sums: dict[str, Tensor | float] = dict.fromkeys(base.slots.targets, 0.0)

    def watch(path: str) -> Callable[[Any, Any, Tensor], None]:
        def add(gradient: Tensor) -> None:
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
            sums[path] = sums[path] + norm.square() / gradient.shape[-1]

        def follow(_: Any, __: Any, output: Tensor) -> None:
            if not output.requires_grad:  # no parameter is trained: the graph begins at the first targets
                output.requires_grad_()
            output.register_hook(add)

        return follow

    generator = torch.Generator().manual_seed(seed)
    hooks = [base.slots.layers[path].register_forward_hook(watch(path)) for path in base.slots.targets]
    predictions = []
    try:
        with torch.enable_grad():
            for row, at in zip(noisy.split(1), timesteps.split(1), strict=True):
                predicted = base.predict_noise(row, at, conditioning)
                predictions.append(predicted.detach())
                z = torch.randn(predicted.shape, generator=generator).to(predicted)
                ((z * predicted).sum() / predicted.numel() ** 0.5).backward()
    finally:
        for hook in hooks:
            hook.remove()
    return {path: float(total) / len(noisy) for path, total in sums.items()}, torch.cat(predictions)


# Compact storage

Compact = tuple[Tensor, Tensor, Tensor]  # factor [in, k] fp16, rest [in] fp32, scale [] fp32

STORED_SHARE = 0.28  # of all columns of all moments
LARGEST_SHARE = 0.6  # of the columns of one
NEGLIGIBLE = 1e-6  # of a moment's mean diagonal: far below any ridge
STACK_BYTES = 2**29  # of moments that are factored in one batch


def compact(moments: Mapping[str, Tensor]) -> dict[str, Compact]:
    """Every G as scale·F·Fᵀ + diag(rest): its pivoted Cholesky factor (Harbrecht et al. 2012, Alg. 1), broken off, and
    of what is left the diagonal.

    The columns that are kept are those with the largest pivots in shares of their moment's mean diagonal, which is what
    ridges are measured in, over all moments together, up to `STORED_SHARE` of the bytes of all: for the 281 moments of
    an SDXL LoRA 232 MB, where fp32 takes 1655 MB and fp16 triangles 414 MB. The result is positive semidefinite and has
    G's own diagonal. Over six pairs of the pocket world it raised the held-out loss of Eq. 3 by 0.8 % of itself for
    columns and 2.6 % for matrices; an equal share for every moment cost matrices 19 %, int8 triangles 42 %. Leading
    eigenvectors lost nothing measurable, but decompositions run far below a GPU's rate. That this costs less there than
    recording the moments again is the aim; it has not been measured on a GPU.
    """
    by_width: dict[int, list[str]] = {}
    for name, moment in moments.items():
        by_width.setdefault(len(moment), []).append(name)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for width, names in by_width.items():
        size = max(1, STACK_BYTES // (width**2 * moments[names[0]].itemsize))
        for i in range(0, len(names), size):
            some = names[i : i + size]
            found = _pivoted_cholesky(torch.stack([moments[name] for name in some]), int(LARGEST_SHARE * width) or 1)
            factors |= dict(zip(some, zip(*found, strict=True), strict=True))
    shares = {name: pivots / _mean_diagonal(moments[name]) for name, (_, pivots) in factors.items()}
    least = max(NEGLIGIBLE, _threshold(shares, {name: len(moment) for name, moment in moments.items()}))
    stored = {}
    for name, (whole, _) in factors.items():
        factor = whole[:, shares[name] > least]
        scale = factor.abs().amax() if factor.numel() else factor.new_ones(())
        half = (factor / scale).half()
        rest = moments[name].diagonal() - (half.to(factor) * scale).square().sum(1)
        stored[name] = half, rest.clamp_min(0).float(), scale.square().float()
    return stored


def _pivoted_cholesky(stack: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """F [n, in, most] and the pivots [n, most], falling: stack ≈ F·Fᵀ, exact in the pivots' rows and columns."""
    n, width, _ = stack.shape
    factor, pivots = stack.new_zeros(n, width, most), stack.new_zeros(n, most)
    left, rows = stack.diagonal(dim1=1, dim2=2).clone(), torch.arange(n, device=stack.device)
    negligible = NEGLIGIBLE * left.mean(1)
    for j in range(most):
        if j % 64 == 0 and not (left.amax(1) > negligible).any():  # now and then: a GPU must be waited for
            break
        pivots[:, j], at = left.max(1)
        column = stack[rows, at] - (factor[:, :, :j] @ factor[rows, at, :j, None]).squeeze(-1)
        root = pivots[:, j : j + 1].sqrt()
        column = torch.where(root > 0, column / root.clamp_min(torch.finfo(root.dtype).tiny), 0.0)
        factor[:, :, j] = column
        left = (left - column.square()).clamp_min_(0)
        left[rows, at] = 0.0  # and not what rounding left of it
    return factor, pivots


def _mean_diagonal(moment: Tensor) -> Tensor:
    return moment.diagonal().mean().clamp_min(torch.finfo(moment.dtype).tiny)


def _threshold(shares: Mapping[str, Tensor], widths: Mapping[str, int]) -> float:
    """The largest pivot that the bytes no longer hold; a column takes as many values as its moment is wide."""
    if not shares:
        return 0.0
    values = torch.cat(list(shares.values())).cpu()
    costs = torch.cat([torch.full((len(some),), widths[name]) for name, some in shares.items()])
    order = values.argsort(descending=True, stable=True)
    spent = costs[order].cumsum(0)
    over = (spent > STORED_SHARE * sum(width**2 for width in widths.values())).nonzero()
    return float(values[order[over[0, 0]]]) if len(over) else 0.0


def restored(stored: Compact, dtype: torch.dtype = torch.float32) -> Tensor:
    """The [in, in] that one value of `compact` stands for."""
    factor, rest, scale = stored
    wide = factor.to(dtype)
    return (wide @ wide.mT) * scale.to(dtype) + torch.diag(rest.to(dtype))


def total_bytes(moments: Mapping[str, Tensor] | None) -> int:
    return sum(moment.nbytes for moment in (moments or {}).values())
