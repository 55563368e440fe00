"""ΔW and its factors: truncated SVD of a dense update, SVD of a sum of low-rank updates without ever making it dense,
and the directions that an update reads. Two-dimensional throughout: a 1×1 convolution counts as a linear layer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ziplora.baseline_knobs import EXACT, OVERSAMPLED, POWERS
from ziplora.lora import Layer


def compressed(dense: Tensor, rank: int) -> tuple[Layer, float]:
    """The best approximation of ΔW [out, in] by rank `rank` (Eckart and Young, 1936), and its error ‖ΔW − ΔW_r‖/‖ΔW‖.

    Above EXACT, by a randomised range finder with power iterations (Halko, Martinsson and Tropp, arXiv 0909.4061,
    Algorithms 4.4 and 5.1) from a fixed start, which is a hundred times cheaper at SDXL's sizes and within a percent of
    the best; the error is that of what is returned.
    """
    rank = min(rank, *dense.shape)
    if min(dense.shape) <= max(EXACT, rank + OVERSAMPLED):
        u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    else:
        q = _range(dense, rank + OVERSAMPLED)
        u, s, vh = torch.linalg.svd(q.mT @ dense, full_matrices=False)
        u = q @ u
    layer = _split(u, s, vh, rank)
    norm = dense.double().norm()
    residual = (dense - layer.up @ layer.down).double().norm()
    return layer, float(residual / norm) if norm else 0.0


def summed(layers: Sequence[Layer], rank: int) -> tuple[Layer, float]:
    """The best approximation of Σ ΔW_i by rank `rank`, and its relative error, from the factors alone: with
    [up₁ up₂ …] = Q_u·R_u and [down₁; down₂; …]ᵀ = Q_d·R_d, the singular values of the sum are those of R_u·R_dᵀ."""
    u, s, vh = svd(layers)
    rank = min(rank, len(s))
    total = s.double().square().sum()
    error = (s[rank:].double().square().sum() / total).sqrt() if total else total
    return _split(u, s, vh, rank), float(error)


def svd(layers: Sequence[Layer]) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, k], σ [k] falling, Vᵀ [k, in] of Σ up_i·down_i, k = min(Σ ranks, out, in)."""
    q_up, r_up = torch.linalg.qr(torch.cat([layer.up.flatten(1) for layer in layers], 1))
    q_down, r_down = torch.linalg.qr(torch.cat([layer.down.flatten(1) for layer in layers], 0).mT)
    u, s, vh = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    return q_up @ u, s, vh @ q_down.mT


def row_space(layer: Layer, directions: int | None = None) -> Tensor:
    """V [in, k]: the right singular vectors of ΔW, the first `directions` of those whose singular value is no rounding
    error. What is orthogonal to all of them, ΔW does not see."""
    _, s, vh = svd([layer])
    size = max(layer.up.shape[0], layer.down.flatten(1).shape[1])
    rank = int((s > s.amax() * size * torch.finfo(s.dtype).eps).sum()) if len(s) else 0
    return vh[: min(rank, directions or rank)].mT


def _split(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> Layer:
    root = s[:rank].sqrt()
    return Layer(root[:, None] * vh[:rank], u[:, :rank] * root)


def _range(dense: Tensor, columns: int) -> Tensor:
    """An orthonormal basis [out, columns] of what ΔW mostly maps to."""
    start = torch.randn(dense.shape[1], columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = torch.linalg.qr(dense @ start.to(dense)).Q
    for _ in range(POWERS):
        q = torch.linalg.qr(dense @ torch.linalg.qr(dense.mT @ q).Q).Q
    return q
