"""What LoRAs and merges look like inside: how sparse their updates are, along which columns they meet, how many
directions they use, and where mergers ended up.

The first two are the observations that ZipLoRA rests on (arXiv 2311.13600v2): most elements of ΔW are so small that
they can go, and where the columns of two updates are aligned, their sum does harm. Factors are used as they are where
that gives the same numbers; where elements must be looked at one by one, one layer at a time is dense.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ziplora.factor import svd
from ziplora.layouts import is_target
from ziplora.lora import Layer, LoRA, Mergers, delta

THRESHOLDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)  # as shares of a layer's largest element
DROPPED = (0.5, 0.8, 0.9, 0.95)  # shares of the elements, the smallest first
BINS = 40


@dataclass(frozen=True, slots=True)
class Sparsity:
    """Of one LoRA's target layers. `below[t]`: share of all elements with |ΔW_ij| < t·max|ΔW| of their layer;
    `energy_left[p]`: what is left of ‖ΔW‖² without the smallest p of a layer's elements, mean over layers;
    `effective_rank`: exp of the entropy of σ/Σσ (Roy and Vetterli, EUSIPCO 2007), by layer."""

    below: Mapping[float, float]
    energy_left: Mapping[float, float]
    effective_rank: Mapping[str, float]
    rank: Mapping[str, int]


def sparsity(lora: LoRA) -> Sparsity:
    """Layers whose ΔW is 0 are left out. Raises ValueError when no target layer is left."""
    n_elements, n_below = 0, dict.fromkeys(THRESHOLDS, 0)
    left: dict[float, list[float]] = {share: [] for share in DROPPED}
    effective, rank = {}, {}
    for path, layer in targets(lora).items():
        magnitudes = delta(layer).abs().flatten()
        largest = float(magnitudes.max())
        if largest == 0:
            continue
        n_elements += len(magnitudes)
        for threshold in THRESHOLDS:
            n_below[threshold] += int((magnitudes < threshold * largest).sum())
        squares = magnitudes.double().square().sort().values
        kept = squares.sum() - squares.cumsum(0)
        for share in DROPPED:
            n_gone = int(share * len(squares))
            left[share].append(float(kept[n_gone - 1] / squares.sum()) if n_gone else 1.0)
        effective[path], rank[path] = effective_rank(layer), layer.rank
    if not n_elements:
        raise ValueError("no attention layer of the UNet has an update: there is nothing to look at")
    below = {threshold: n / n_elements for threshold, n in n_below.items()}
    return Sparsity(below, {share: _mean(values) for share, values in left.items()}, effective, rank)


def without_smallest(lora: LoRA, share: float) -> LoRA:
    """The LoRA whose ΔW has, in each target layer, the `share` of its elements that are smallest in magnitude set to 0:
    the paper's sparsity study, to be sampled and scored. What is left is of no low rank, so a layer comes back as
    up = ΔW, down = 1, of rank in; what is no target layer is as it was. ValueError for a share outside [0, 1)."""
    if not 0 <= share < 1:
        raise ValueError(f"share is {share}; from 0, below 1")
    layers = dict(lora.layers)
    for path, layer in targets(lora).items() if share else ():
        dense = delta(layer)
        order = dense.abs().flatten().argsort(stable=True)
        kept = dense.flatten().clone()
        kept[order[: int(share * len(order))]] = 0
        layers[path] = Layer(torch.eye(dense.shape[1], dtype=dense.dtype), kept.reshape(dense.shape))
    return LoRA(layers)


def effective_rank(layer: Layer) -> float:
    """exp(−Σ p_i·ln p_i) of p = σ/Σσ, from 1 to the rank; 0 of an update that is 0."""
    s = svd([layer])[1].double()
    if not s.sum():
        return 0.0
    p = s / s.sum()
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def alignment(subject: LoRA, style: LoRA) -> dict[str, float]:
    """Mean over columns of |cos(ΔW_c[:, j], ΔW_s[:, j])| in each target layer that both have, from 0 to 1. Columns that
    are 0 in either count as not aligned.

    A merger scales whole columns, which changes no cosine: after a ZipLoRA merge this is what it was before, but for
    columns that went to 0. What a merge changes is `interference`.
    """
    found = {}
    for path, one, other in _both(subject, style):
        dot, norms = _column_products(one, other), _column_norms(one) * _column_norms(other)
        cosine = torch.where(norms > 0, dot / norms.clamp(min=torch.finfo(norms.dtype).tiny), torch.zeros_like(dot))
        found[path] = float(cosine.abs().clamp(max=1).mean())
    return found


def interference(subject: LoRA, style: LoRA) -> dict[str, float]:
    """Σ_j |ΔW_c[:, j]·ΔW_s[:, j]| / (‖ΔW_c‖·‖ΔW_s‖) in each target layer that both have: 0 where no column of one meets
    the other's, at most 1. `alignment` with every column counted as much as it does in the sum."""
    found = {}
    for path, one, other in _both(subject, style):
        norms = float(_column_norms(one).norm() * _column_norms(other).norm())
        found[path] = float(_column_products(one, other).abs().sum()) / norms if norms else 0.0
    return found


def merger_cosine(mergers: Mergers) -> dict[str, float]:
    """|m_c·m_s|/(‖m_c‖·‖m_s‖) of each layer: 1 for the direct merge, 0 where ZipLoRA's penalty has reached its aim."""
    common = [path for path in mergers.subject if path in mergers.style]
    both = [(path, mergers.subject[path].double(), mergers.style[path].double()) for path in common]
    return {path: float((c @ s).abs() / (c.norm() * s.norm()).clamp(min=1e-300)) for path, c, s in both}


def _both(subject: LoRA, style: LoRA) -> list[tuple[str, Layer, Layer]]:
    return [(path, one, style.layers[path]) for path, one in targets(subject).items() if path in style.layers]


def _column_norms(layer: Layer) -> Tensor:
    return _column_products(layer, layer).clamp(min=0).sqrt()


def _column_products(one: Layer, other: Layer) -> Tensor:
    """ΔW_1[:, j]·ΔW_2[:, j] for every column j: [in], in float64. With ΔW = B·A that is A_1[:, j]ᵀ·(B_1ᵀB_2)·A_2[:, j],
    so nothing is ever dense."""
    up = one.up.flatten(1).double().mT @ other.up.flatten(1).double()
    return (one.down.flatten(1).double() * (up @ other.down.flatten(1).double())).sum(0)


def merger_histograms(mergers: Mergers, low: float = -0.5, high: float = 1.5) -> dict[str, tuple[Tensor, Tensor]]:
    """Counts [BINS] of the subject's and the style's coefficients by block (`down_blocks.1`, `mid_block` …); what lies
    outside [low, high] is counted in the outermost bins."""
    found: dict[str, list[Tensor]] = {}
    for half, values in enumerate((mergers.subject, mergers.style)):
        for path, merger in values.items():
            counts = found.setdefault(block_of(path), [torch.zeros(BINS), torch.zeros(BINS)])
            counts[half] += torch.histc(merger.float().clamp(low, high), BINS, low, high)
    return {block: (counts[0], counts[1]) for block, counts in sorted(found.items())}


def block_of(path: str) -> str:
    """`unet.down_blocks.1.attentions.0…` → `down_blocks.1`."""
    parts = path.split(".")
    return ".".join(parts[1 : 2 if parts[1] == "mid_block" else 3])


def by_block(values: Mapping[str, float]) -> dict[str, float]:
    """The mean over each block's layers, blocks in the order of the UNet."""
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    blocks: dict[str, list[float]] = {}
    for path, value in values.items():
        blocks.setdefault(block_of(path), []).append(value)
    names = sorted(blocks, key=lambda name: (order.get(name.partition(".")[0], 3), name))
    return {name: _mean(blocks[name]) for name in names}


def parts_of(merged: LoRA, subject_rank: int) -> tuple[LoRA, LoRA]:
    """The subject's and the style's half of a published merge: see `lora.stacked`."""

    def rows(start: int, stop: int | None) -> LoRA:
        return LoRA(
            {path: Layer(layer.down[start:stop], layer.up[:, start:stop]) for path, layer in merged.layers.items()}
        )

    return rows(0, subject_rank), rows(subject_rank, None)


def targets(lora: LoRA) -> dict[str, Layer]:
    return {path: layer for path, layer in lora.layers.items() if is_target(path)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
