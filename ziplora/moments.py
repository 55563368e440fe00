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
from ziplora.slots import Slots

CONTEXT = "unet.context"  # the encoded prompt: what k and v of every cross-attention read


def input_of(path: str) -> str:
    """Names what the merge target at `path` reads; layers with the same name read the very same tensor.

    q, k and v of a self-attention share one, k and v of all cross-attentions another: SDXL's 560 targets have 281.
    """
    if path.endswith((".attn2.to_k", ".attn2.to_v")):
        return CONTEXT
    if path.endswith((".attn1.to_q", ".attn1.to_k", ".attn1.to_v")):
        return path.rpartition(".")[0]
    return path


def readers(targets: Collection[str]) -> dict[str, list[str]]:
    """The distinct inputs of the targets, each with the layers that read it."""
    layers: dict[str, list[str]] = {}
    for path in targets:
        layers.setdefault(input_of(path), []).append(path)
    return layers


@contextmanager
def recorded(slots: Slots) -> Iterator[dict[str, Tensor]]:
    """Within the block every forward pass is observed; after it the mapping holds E[x xᵀ], [in, in], by name of the
    input. Means over batch rows and positions, summed in fp32 (fp64 if the layers are fp64)."""
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
        slots.layers[paths[0]].register_forward_pre_hook(watch(name)) for name, paths in readers(slots.targets).items()
    ]
    try:
        yield moments
    finally:
        for hook in hooks:
            hook.remove()
        for name, moment in moments.items():
            moment /= counts[name]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums of values of `dtype` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def output_weights(
    base: Base, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, seed: int
) -> dict[str, float]:
    """w of every target: a change δy of its output, independent over positions, changes the mean square of the
    prediction by about w·E‖δy‖².

    With g = ∂(zᵀε/√numel)/∂y of one backward pass and Gaussian z, E[g gᵀ] is the Gauss-Newton matrix H of the mean
    square at that position; w = Σ_positions tr(H)/out, averaged over the rows. One row at a time, to keep one row's
    activations.
    """
    sums: dict[str, float] = dict.fromkeys(base.slots.targets, 0.0)

    def watch(path: str) -> Callable[[Any, Any, Tensor], None]:
        def add(gradient: Tensor) -> None:
            sums[path] += (gradient.double().square().sum() / gradient.shape[-1]).item()

        def follow(_: Any, __: Any, output: Tensor) -> None:
            output.register_hook(add)

        return follow

    generator = torch.Generator().manual_seed(seed)
    hooks = [base.slots.layers[path].register_forward_hook(watch(path)) for path in base.slots.targets]
    try:
        with torch.enable_grad():
            for i in range(len(noisy)):
                # no parameter is trained: the graph hangs on both of the UNet's inputs
                row = noisy[i : i + 1].detach().requires_grad_()
                prompt = Conditioning(conditioning.embeds.detach().requires_grad_(), conditioning.pooled)
                predicted = base.predict_noise(row, timesteps[i : i + 1], prompt)
                z = torch.randn(predicted.shape, generator=generator).to(predicted)
                ((z * predicted).sum() / predicted.numel() ** 0.5).backward()
    finally:
        for hook in hooks:
            hook.remove()
    return {path: total / len(noisy) for path, total in sums.items()}


# Compact storage

Compact = tuple[Tensor, Tensor, Tensor]  # factor [in, k] fp16, rest [in] fp32, scale [] fp32

STORED_SHARE = 0.28  # of all eigenvectors of all moments
LARGEST_SHARE = 0.45  # of the eigenvectors of one: at 0.5 a triangle would take no more
POWER_STEPS = 2
OVERSAMPLING = 8
NEGLIGIBLE = 1e-6  # of a moment's mean diagonal: far below any ridge


def compact(moments: Mapping[str, Tensor]) -> dict[str, Compact]:
    """Every G as scale·F·Fᵀ + diag(rest): its leading eigenvectors, and of all others the diagonal.

    The eigenvectors that are kept are those with the largest eigenvalues in shares of their moment's mean diagonal,
    which is what ridges are measured in, over all moments together, up to `STORED_SHARE` of the bytes of all: for the
    281 moments of an SDXL LoRA 232 MB, where fp32 takes 1655 MB and fp16 triangles 414 MB. The result is positive
    semidefinite and has G's own diagonal. Over six pairs of the pocket world it changed the held-out loss of Eq. 3 by
    less than 2 % of itself for either closed form; the same share of every moment by itself cost the matrix form 19 %,
    int8 in place of fp16 triangles 42 %.
    """
    if not moments:
        return {}
    leading = {name: _leading(moment) for name, moment in moments.items()}
    shares = {name: values / _mean_diagonal(moments[name]) for name, (_, values) in leading.items()}
    least = max(NEGLIGIBLE, _threshold(shares, {name: len(moment) for name, moment in moments.items()}))
    stored = {}
    for name, (vectors, values) in leading.items():
        keep = shares[name] > least
        factor = vectors[:, keep] * values[keep].sqrt()
        scale = factor.abs().amax() if keep.any() else factor.new_ones(())
        half = (factor / scale).half()
        rest = moments[name].diagonal() - (half.to(factor) * scale).square().sum(1)
        stored[name] = half, rest.clamp_min(0).float(), scale.square().float()
    return stored


def _leading(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The `LARGEST_SHARE` leading eigenvectors [in, k] and eigenvalues [k], by subspace iteration from seeded noise
    (arXiv 0909.4061, Alg. 4.4)."""
    width = len(moment)
    most = max(1, int(LARGEST_SHARE * width))
    noise = torch.randn(width, min(width, most + OVERSAMPLING), generator=torch.Generator().manual_seed(0))
    basis = noise.to(moment)
    for _ in range(1 + POWER_STEPS):
        basis = torch.linalg.qr(moment @ basis)[0]
    values, vectors = torch.linalg.eigh(basis.mT @ moment @ basis)
    return (basis @ vectors.flip(1)[:, :most]), values.flip(0)[:most].clamp_min(0)


def _mean_diagonal(moment: Tensor) -> Tensor:
    return moment.diagonal().mean().clamp_min(torch.finfo(moment.dtype).tiny)


def _threshold(shares: Mapping[str, Tensor], widths: Mapping[str, int]) -> float:
    """The largest eigenvalue that the bytes no longer hold; an eigenvector takes as many values as its moment is
    wide."""
    values = torch.cat(list(shares.values())).cpu()
    costs = torch.cat([torch.full((len(some),), widths[name]) for name, some in shares.items()])
    order = values.argsort(descending=True, stable=True)
    spent = costs[order].cumsum(0)
    over = (spent > STORED_SHARE * sum(width**2 for width in widths.values())).nonzero()
    return float(values[order[over[0, 0]]]) if len(over) else 0.0


def restored(factor: Tensor, rest: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The [in, in] that `compact` stands for."""
    wide = factor.to(dtype)
    return (wide @ wide.mT) * scale.to(dtype) + torch.diag(rest.to(dtype))


def total_bytes(moments: Mapping[str, Tensor] | None) -> int:
    return sum(moment.nbytes for moment in (moments or {}).values())
