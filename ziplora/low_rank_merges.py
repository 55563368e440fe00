"""Merges that stay low-rank: SVD to a chosen rank, and NP-LoRA. Nothing is ever dense."""

from collections.abc import Sequence

import torch

from ziplora.base import Base
from ziplora.baseline_knobs import NullSpaceKnobs, SvdKnobs
from ziplora.factor import row_space, summed
from ziplora.lora import Layer, LoRA, max_rank
from ziplora.merged import Merged, Pair
from ziplora.sparse_merges import factor_report


def svd(base: Base, pairs: Sequence[Pair], knobs: SvdKnobs) -> list[Merged]:
    """The best rank-r approximation of the direct merge (Eckart and Young, https://doi.org/10.1007/BF02288367) in every
    module: ΔW_m = Σ_{i≤r} σ_i·u_i·v_iᵀ of ΔW_c + ΔW_s, whose own rank is r_c + r_s. Half the file at equal ranks.

    Subject and style are not apart in it: a style strength has to be given before the merge, as the style's weight.
    """
    return [_svd(base, pair, knobs) for pair in pairs]


def _svd(base: Base, pair: Pair, knobs: SvdKnobs) -> Merged:
    rank = knobs.rank or max(max_rank(pair.subject), max_rank(pair.style))
    layers, errors = {}, []
    loras = (pair.subject, pair.style)
    for path in dict.fromkeys(path for lora in loras for path in lora.layers):
        having = [lora.layers[path] for lora in loras if path in lora.layers]
        layer, error = summed([_wide(base, layer) for layer in having], rank)
        layers[path] = _shaped(layer, having[0])
        errors.append(error)
    return Merged(LoRA(layers), LoRA({}), None, factor_report(errors))


def np_lora(base: Base, pairs: Sequence[Pair], knobs: NullSpaceKnobs) -> list[Merged]:
    """NP-LoRA (arXiv 2511.11051v3, Eq. 12), per layer: ΔW_m = ΔW_s + ΔW_c·(I − μ/(1+μ)·V·Vᵀ), where V [in, k] are the
    style's principal directions, the right singular vectors of ΔW_s. It is what minimises ‖X − ΔW_c‖² + μ‖X·V‖² over X;
    without μ, V·Vᵀ is taken away whole. Exact at the LoRAs' own ranks, as the projection acts on `down` alone."""
    share = 1.0 if knobs.mu is None else knobs.mu / (1 + knobs.mu)
    return [_projected(base, pair, share, knobs.directions) for pair in pairs]


def _projected(base: Base, pair: Pair, share: float, directions: int | None) -> Merged:
    layers = dict(pair.subject.layers)
    kept = []
    for path in base.slots.targets:
        if path not in layers or path not in pair.style.layers:
            continue
        subject, style = _wide(base, layers[path]), _wide(base, pair.style.layers[path])
        v = row_space(style, directions)
        down = subject.down - share * (subject.down @ v) @ v.mT
        before = torch.linalg.norm(subject.up @ subject.down)
        kept.append(float(torch.linalg.norm(subject.up @ down) / before) if before else 1.0)
        layers[path] = _shaped(Layer(down, subject.up), layers[path])
    report = {"subject_kept_mean": sum(kept) / len(kept), "subject_kept_min": min(kept)} if kept else {}
    return Merged(LoRA(layers), pair.style, None, report)


def _wide(base: Base, layer: Layer) -> Layer:
    """Both factors as matrices on the base's device, in fp32 at least."""
    dtype = torch.promote_types(layer.down.dtype, torch.float32)
    return Layer(layer.down.flatten(1).to(base.device, dtype), layer.up.flatten(1).to(base.device, dtype))


def _shaped(layer: Layer, like: Layer) -> Layer:
    """The factors in the shape, dtype and place of another layer's, at their own rank."""
    rank = layer.down.shape[0]
    down = layer.down.reshape(rank, *like.down.shape[1:]).to(like.down)
    return Layer(down, layer.up.reshape(like.up.shape[0], rank, *like.up.shape[2:]).to(like.up))
