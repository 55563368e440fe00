"""Merges of sparsified updates: TIES, DARE and magnitude pruning, each on a layer's dense ΔW = up·down, one at a time.

Sparsifying the factors instead, or adding the A's and the B's of two LoRAs, is another operation with another result.
What comes out has no low rank any more, so each LoRA's half is factored again by truncated SVD, and the entry reports
how much that leaves out. The halves stay apart: their sum is the merge, and the style's can be scaled afterwards.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ziplora.base import Base
from ziplora.baseline_knobs import DareKnobs, PruneKnobs, TiesKnobs
from ziplora.calibrate import derived_seed
from ziplora.factor import compressed
from ziplora.lora import Layer, LoRA, delta
from ziplora.merged import Merged, Pair

Deltas = list[Tensor]  # of the LoRAs that have the layer, subject first; each [out, in]
Halves = Callable[[str, Deltas], Deltas]  # (module path, ΔW of each) → what each contributes to the merge


def ties(base: Base, pairs: Sequence[Pair], knobs: TiesKnobs) -> list[Merged]:
    """TIES (arXiv 2306.01708v2, Algorithm 1), per layer: trim each ΔW to its largest elements, elect each element's
    sign, and take the mean of those that agree, times λ: ΔW_m = λ·mean{ΔW_i : sign ΔW_i = sign Σ_i ΔW_i}."""

    def halves(path: str, deltas: Deltas) -> Deltas:
        kept = [trimmed(one, knobs.density) for one in deltas]
        return [knobs.scale * half for half in agreeing(kept, knobs.elect)]

    return [_merge(base, pair, halves, knobs.rank) for pair in pairs]


def dare(base: Base, pairs: Sequence[Pair], knobs: DareKnobs) -> list[Merged]:
    """DARE (arXiv 2311.03099v3), per layer: drop each element of ΔW with chance p = 1 − density, rescale
    the rest by 1/(1 − p), so that the expectation stays; then the sum, or TIES' election of signs. `Pair.seed` decides
    which are dropped."""

    def halves(seed: int, path: str, deltas: Deltas) -> Deltas:
        kept = [
            dropped(one, knobs.density, derived_seed(seed, f"{number} {path}")) for number, one in enumerate(deltas)
        ]
        return agreeing(kept, "total") if knobs.combine == "ties" else kept

    return [_merge(base, pair, partial(halves, pair.seed), knobs.rank) for pair in pairs]


def prune(base: Base, pairs: Sequence[Pair], knobs: PruneKnobs) -> list[Merged]:
    """ΔW_m = trim(ΔW_c) + trim(ΔW_s): the direct merge of what ZipLoRA's first observation calls enough, the largest
    elements of each layer (arXiv 2311.13600v2: without the smallest 80 % or 90 % the samples are the same)."""
    return [
        _merge(base, pair, lambda _, deltas: [trimmed(one, knobs.density) for one in deltas], knobs.rank)
        for pair in pairs
    ]


def trimmed(dense: Tensor, density: float) -> Tensor:
    """The share `density` of the elements that are largest in magnitude, the rest 0."""
    from peft.utils.merge_utils import magnitude_based_pruning  # seconds to import, which only these methods pay

    if int(density * dense.numel()) == 0:
        raise ValueError(f"density {density} keeps nothing of a layer of {dense.numel():,} elements: take a larger one")
    return dense if density == 1 else magnitude_based_pruning(dense, density)


def dropped(dense: Tensor, density: float, seed: int) -> Tensor:
    """Each element kept with chance `density` and then divided by it. Drawn on the CPU from `seed`: peft's own draws
    from the global generator, so its result would depend on the device and on what ran before."""
    chances = torch.rand(dense.shape, generator=torch.Generator().manual_seed(seed))
    return dense * (chances < density).to(dense.device) / density


def agreeing(deltas: Deltas, elect: str) -> Deltas:
    """Each update's share of TIES' disjoint mean; their sum is `peft.utils.merge_utils.disjoint_merge`."""
    from peft.utils.merge_utils import calculate_majority_sign_mask

    stacked = torch.stack(deltas)
    mask = calculate_majority_sign_mask(stacked, method=elect)
    return list(stacked * mask / mask.sum(0).clamp(min=1))


def _merge(base: Base, pair: Pair, halves: Halves, rank: int | None) -> Merged:
    """Layers that are no merge target are carried, as in every method: both LoRAs' updates add up there."""
    parts: list[dict[str, Layer]] = [{}, {}]
    errors: list[float] = []
    loras = (pair.subject, pair.style)
    for path in dict.fromkeys(path for lora in loras for path in lora.layers):
        having = [number for number, lora in enumerate(loras) if path in lora.layers]
        layers = [loras[number].layers[path] for number in having]
        if path not in base.slots.targets:
            made = layers
        else:
            deltas = [_dense(base, layer) for layer in layers]
            made = []
            for layer, half in zip(layers, halves(path, deltas), strict=True):
                factored, error = compressed(half, rank or layer.rank)
                made.append(Layer(factored.down.to(layer.down), factored.up.to(layer.up)))
                errors.append(error)
        for number, layer in zip(having, made, strict=True):
            parts[number][path] = layer
    return Merged(LoRA(parts[0]), LoRA(parts[1]), None, factor_report(errors))


def _dense(base: Base, layer: Layer) -> Tensor:
    """ΔW [out, in] on the base's device, in fp32 at least."""
    wide = torch.promote_types(layer.down.dtype, torch.float32)
    return delta(Layer(layer.down.to(base.device, wide), layer.up.to(base.device, wide))).flatten(1)


def factor_report(errors: Sequence[float]) -> dict[str, Any]:
    """What the factorisation left out, ‖ΔW − ΔW_r‖/‖ΔW‖ per layer."""
    if not errors:
        return {}
    return {"factor_error_mean": sum(errors) / len(errors), "factor_error_max": max(errors)}
