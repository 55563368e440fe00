"""K-LoRA: which of the two LoRAs a layer takes, at each step of sampling. Its result is a choice, not a LoRA."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ziplora.base import Base
from ziplora.fusion_knobs import KLoRAKnobs
from ziplora.lora import Layer, delta
from ziplora.merged import Merged, Pair

NEVER, ALWAYS = -1.0, 1.0  # as `until`: of n steps the last one begins when the share (n − 1)/n is done


def k_lora(base: Base, pairs: Sequence[Pair], knobs: KLoRAKnobs) -> list[Merged]:
    """K-LoRA (arXiv 2502.18461, CVPR 2025): in each layer and at each step of sampling, the LoRA whose K largest
    |ΔW_ij| add up to more, the style's sum times γ·S:

        ΔW = ΔW_c if S_c ≥ γ·S·S_s else ΔW_s,    S_q = Σ_topK |ΔW_q|,    K = r_c·r_s,
        γ = Σ_layers Σ_ij |ΔW_c| / Σ_layers Σ_ij |ΔW_s|,    S = α·t_now/t_all + β

    t_now counts the steps that are done. S grows, so a layer that takes the subject does so up to a step and the style
    from there on: `Merged.until` is that share of the steps, (S_c/(γ·S_s) − β)/α. A layer that only one LoRA changes
    always takes that one. Layers that are no merge targets have both throughout.
    """
    return [_chosen(base, pair, knobs) for pair in pairs]


def _chosen(base: Base, pair: Pair, knobs: KLoRAKnobs) -> Merged:
    sums: dict[str, tuple[float, float]] = {}
    totals = [0.0, 0.0]
    for path in base.slots.targets:
        layers = [lora.layers.get(path) for lora in (pair.subject, pair.style)]
        if layers == [None, None]:
            continue
        ranks = [layer.rank for layer in layers if layer is not None]
        k = knobs.k or (ranks[0] * ranks[1] if len(ranks) == 2 else ranks[0])
        sizes = [_sizes(base, layer) for layer in layers]
        sums[path] = (top_sum(sizes[0], k), top_sum(sizes[1], k))
        totals = [total + float(size.sum()) for total, size in zip(totals, sizes, strict=True)]
    if not sums:
        raise ValueError(
            "neither LoRA touches an attention layer of the UNet: nothing to choose, use the direct method"
        )
    gamma = totals[0] / totals[1] if totals[1] else 1.0
    until = {path: switch(*both, gamma, knobs) for path, both in sums.items()}
    report = {
        "gamma": gamma,
        "always_subject": sum(share == ALWAYS for share in until.values()) / len(until),
        "always_style": sum(share < 0 for share in until.values()) / len(until),
    }
    return Merged(pair.subject, pair.style, None, report, until)


def switch(subject: float, style: float, gamma: float, knobs: KLoRAKnobs) -> float:
    """The share of the steps up to which S_c ≥ γ·S·S_s, given both sums: from NEVER to ALWAYS."""
    if subject == 0 or style == 0:
        return ALWAYS if style == 0 and subject > 0 else NEVER
    ratio = subject / (gamma * style)
    if knobs.alpha == 0:
        return ALWAYS if ratio >= knobs.beta else NEVER
    return min(max((ratio - knobs.beta) / knobs.alpha, NEVER), ALWAYS)


def top_sum(sizes: Tensor, k: int) -> float:
    """The sum of the k largest."""
    return float(sizes.flatten().topk(min(k, sizes.numel())).values.sum(dtype=torch.float64))


def _sizes(base: Base, layer: Layer | None) -> Tensor:
    """|ΔW| on the base's device, in fp32 at least; a single 0 for a LoRA that lacks the layer."""
    if layer is None:
        return torch.zeros(1)
    wide = torch.promote_types(layer.down.dtype, torch.float32)
    return delta(Layer(layer.down.to(base.device, wide), layer.up.to(base.device, wide))).abs()
