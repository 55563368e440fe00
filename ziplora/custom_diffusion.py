"""Custom Diffusion's merge (arXiv 2212.04488, section 3.3): K and V of the cross-attentions, in closed form.

    Ŵ = argmin_W ‖W C_regᵀ − W₀ C_regᵀ‖_F   subject to   W Cᵀ = V

C [words, in] are the text states of the concepts' words, V what each concept's own weights make of them, C_reg those of
plain captions. By Lagrange multipliers, with d = C (C_regᵀC_reg)⁻¹:

    Ŵ = W₀ + (V − W₀ Cᵀ) (d Cᵀ)⁻¹ d

(d Cᵀ)⁻¹ d has one row for each word, which is 1 at that word and 0 at all others. Rows of the subject's words make the
subject's half, those of the style's words the style's: exact LoRAs, of no more rank than there are words.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ziplora.base import Base
from ziplora.captions import builtin_captions
from ziplora.factor import summed
from ziplora.fusion_knobs import CustomDiffusionKnobs
from ziplora.lora import Layer, LoRA, concat, select
from ziplora.merged import Merged, Pair, Words
from ziplora.module_names import CONTEXT, input_of

SAME = 1e-4  # words whose states differ by less, as a share of their length, are the same word in the same context
INDEPENDENT = 1e-3  # what of a word's state no earlier word has, as a share of it, in the captions' own measure
ENCODED = 32  # captions at a time


def custom_diffusion(base: Base, pairs: Sequence[Pair], knobs: CustomDiffusionKnobs) -> list[Merged]:
    """Custom Diffusion's constrained merge (arXiv 2212.04488, Eqs. 4 and 5) of each pair.

    A concept's words are those of its trigger and what follows them, end of text included, in the trigger alone and in
    its LoRA's prompt: what comes before does not know of them. States that both concepts have are nobody's word; one
    that is a combination of earlier ones is left out. SDXL's K and V read the states of both text encoders side by
    side, SD 1.5's those of one.

    The concepts' own weights are W₀ + ΔW of LoRAs, which may have K and V alone. Full-rank differences, in which Custom
    Diffusion's own files store K and V, are refused where LoRA files are read. Layers that are no K or V of a
    cross-attention are summed as in the direct merge, or left out: see the knob `others`. Where LoRAs have text-encoder
    parts, C are the states of the merged text encoders, and V what each LoRA alone makes of its own.

    Raises ValueError for too few captions, for concepts that share all their words, and where no LoRA has a K or V.
    """
    return [_constrained(base, pair, knobs) for pair in pairs]


def duals(words: Tensor, plain: Tensor) -> tuple[Tensor, list[int]]:
    """(d Cᵀ)⁻¹ d [words, in] for C [words, in] and C_regᵀC_reg [in, in], and which words they are of: those that are no
    combination of earlier ones. Through the orthogonal factors of C·L⁻ᵀ, L·Lᵀ = C_regᵀC_reg, as d Cᵀ would square the
    condition."""
    root, failed = torch.linalg.cholesky_ex(plain)
    if failed:
        raise ValueError("captions say the same in every direction: give other captions, or a larger ridge")
    columns = torch.linalg.solve_triangular(root, words.mT, upper=False)  # [in, words]
    kept: list[int] = []
    basis = columns[:, :0]
    for i, column in enumerate(columns.unbind(1)):
        rest = column
        for _ in range(2):  # twice is enough to be orthogonal to rounding (Kahan and Parlett)
            rest = rest - basis @ (basis.mT @ rest)
        if len(kept) < len(plain) and rest.norm() > INDEPENDENT * column.norm():
            kept.append(i)
            basis = torch.cat([basis, rest[:, None] / rest.norm()], 1)
    whitened = torch.linalg.solve(basis.mT @ columns[:, kept], basis.mT)
    return torch.linalg.solve_triangular(root.mT, whitened.mT, upper=True).mT, kept


@dataclass(frozen=True, slots=True)
class Asked:
    """Of one concept's words: `read` [words, in], the states that the merged model reads; `own`, those that the LoRA
    alone reads. The same where no LoRA trains a text encoder."""

    read: Tensor
    own: Tensor

    def some(self, rows: Tensor) -> "Asked":
        read = self.read[rows]
        return Asked(read, read if self.own is self.read else self.own[rows])


def _constrained(base: Base, pair: Pair, knobs: CustomDiffusionKnobs) -> Merged:
    loras = (pair.subject, pair.style)
    paths = [path for path in base.slots.targets if input_of(path) == CONTEXT]
    paths = [path for path in paths if any(path in lora.layers for lora in loras)]
    if not paths:
        raise ValueError("neither LoRA touches K or V of a cross-attention: nothing to solve, use the direct method")
    texts = [select(lora, lambda path: path.startswith("text_encoder")) for lora in loras]
    merged_text = concat(texts) if knobs.others == "direct" else LoRA({})
    plain, n_states = _plain(base, knobs, merged_text)
    asked = _asked(base, pair, texts, merged_text)
    n_words, n_subject = sum(len(one.read) for one in asked), len(asked[0].read)
    rows, kept = duals(torch.cat([one.read for one in asked]), plain)
    numbers = torch.tensor(kept, device=rows.device)
    chosen = (numbers[numbers < n_subject], numbers[numbers >= n_subject] - n_subject)
    asked = [one.some(words) for one, words in zip(asked, chosen, strict=True)]
    parts, missed = _solved(base, pair, paths, asked, rows)
    if knobs.others == "direct":
        for lora, part in zip(loras, parts, strict=True):
            part |= {path: layer for path, layer in lora.layers.items() if path not in paths}
    report = {
        "words": [len(words) for words in chosen],
        "words_left_out": n_words - len(kept),
        "caption_states": n_states,
        "constraint_error_max": missed,
    }
    return Merged(LoRA(parts[0]), LoRA(parts[1]), None, report)


def _solved(
    base: Base, pair: Pair, paths: Sequence[str], asked: Sequence[Asked], rows: Tensor
) -> tuple[list[dict[str, Layer]], float]:
    """Both halves of these layers, and the largest ‖W Cᵀ − V‖/‖V − W₀Cᵀ‖ that they leave."""
    parts: list[dict[str, Layer]] = [{}, {}]
    words, missed = torch.cat([one.read for one in asked]), 0.0
    halves = rows.split([len(one.read) for one in asked])
    for path in paths:
        layers = [lora.layers.get(path) for lora in (pair.subject, pair.style)]
        like = next(layer.down for layer in layers if layer is not None)
        weight = base.slots.layers[path].weight
        wanted = [wanted_of(layer, weight, one) for layer, one in zip(layers, asked, strict=True)]
        made = torch.zeros_like(weight, dtype=rows.dtype)
        for part, layer, one, half, target in zip(parts, layers, asked, halves, wanted, strict=True):
            if target.any():
                rank = len(half) if layer is None or one.own is not one.read else min(len(half), layer.rank)
                found, _ = summed([Layer(half, target)], rank)  # balanced, and exact: wanted has no more rank
                part[path] = Layer(found.down.to(like), found.up.to(like))
                made += part[path].up.to(made) @ part[path].down.to(made)
        both = torch.cat(wanted, 1)
        if both.any():
            missed = max(missed, float((made @ words.mT - both).norm() / both.norm()))
    return parts, missed


def wanted_of(layer: Layer | None, weight: Tensor, asked: Asked) -> Tensor:
    """V − W₀Cᵀ [out, words]: what the LoRA alone gives at its words, less what W₀ makes of the states that are read."""
    wanted = asked.own.new_zeros(len(weight), len(asked.own))
    if layer is not None:
        wanted += layer.up.flatten(1).to(wanted) @ (layer.down.flatten(1).to(wanted) @ asked.own.mT)
    if asked.own is not asked.read:
        wanted += weight.to(wanted) @ (asked.own - asked.read).mT
    return wanted


# Text states, [words, in], in float64: a few thousand rows, whose products span ten orders of magnitude


def _asked(base: Base, pair: Pair, texts: Sequence[LoRA], merged: LoRA) -> list[Asked]:
    """Of the subject's and of the style's words, without those that are in both."""
    if pair.words is None:
        raise ValueError("custom-diffusion needs Pair.words: both LoRAs' prompts and triggers")
    found = []
    for words, own in zip(pair.words, texts, strict=True):
        read = _states(base, words, merged)
        found.append(Asked(read, _states(base, words, own) if own.layers or merged.layers else read))
    subject, style = found
    apart = torch.cdist(subject.read, style.read)
    shared = apart <= SAME * style.read.norm(dim=1)
    left = [subject.some(_kept(shared.any(1))), style.some(_kept(shared.any(0)))]
    if not all(len(one.read) for one in left):
        raise ValueError(
            f"the subject's words '{pair.words[0].trigger}' and the style's '{pair.words[1].trigger}' are not told"
            " apart by the text encoders: give each LoRA a trigger of its own"
        )
    return left


def _kept(shared: Tensor) -> Tensor:
    return (~shared).nonzero().flatten()


def _states(base: Base, words: Words, text: LoRA) -> Tensor:
    trigger = base.token_ids(words.trigger)[1:-1]
    found = []
    for prompt in dict.fromkeys((words.trigger, words.prompt)):
        ids = base.token_ids(prompt)
        starts = [i for i in range(1, len(ids)) if trigger and ids[i : i + len(trigger)] == trigger]
        encoded = base.encode_prompt(prompt, text if text.layers else None).embeds[0]
        found.append(encoded[starts[0] if starts else 1 : len(ids)])
    return torch.cat(found).double()


def _plain(base: Base, knobs: CustomDiffusionKnobs, text: LoRA) -> tuple[Tensor, int]:
    """C_regᵀC_reg + ρtI [in, in], and of how many different states. ValueError for fewer than they have values."""
    captions = builtin_captions() if knobs.captions == "built-in" else tuple(knobs.captions)
    key = ("plain captions", captions, knobs.ridge)
    if text.layers or key not in base.derived:
        ids = [base.token_ids(caption) for caption in captions]
        n_states = len({tuple(one[:end]) for one in ids for end in range(2, len(one) + 1)})
        width = base.unet.config.cross_attention_dim
        if n_states < width:
            raise ValueError(
                f"missing captions: {len(captions)} have {n_states} words in different contexts, at least {width} are"
                " needed for this base; give more, or captions: built-in"
            )
        total = _second_moment(base, captions, [len(one) for one in ids], text)
        total.diagonal().add_(knobs.ridge * total.diagonal().mean())
        if text.layers:
            return total, n_states
        base.derived[key] = total, n_states
    known: tuple[Tensor, int] = base.derived[key]
    return known


def _second_moment(base: Base, captions: Sequence[str], lengths: Sequence[int], text: LoRA) -> Tensor:
    """C_regᵀC_reg over all words of all captions, ends included."""
    parts = []
    with base.slots.fused(text):
        for first in range(0, len(captions), ENCODED):
            some = slice(first, first + ENCODED)
            encoded = base.encode_prompts(captions[some]).embeds
            parts += [states[1:end] for states, end in zip(encoded, lengths[some], strict=True)]
    states = torch.cat(parts).double()
    return states.mT @ states
