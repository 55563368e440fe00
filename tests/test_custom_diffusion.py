"""Custom Diffusion's merge held against its constraints and against the constrained least squares, in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.random_loras import random_lora
from tests.tiny import tiny_sd15, tiny_sdxl
from ziplora.base import Base, resident
from ziplora.captions import builtin_captions
from ziplora.custom_diffusion import custom_diffusion, duals
from ziplora.fusion_knobs import CustomDiffusionKnobs
from ziplora.lora import LoRA, delta, max_rank, scaled, select
from ziplora.merged import Merged, Pair, Words
from ziplora.methods import METHODS

WORDS = (Words("a photo of sks", "sks"), Words("a house in wzn", "wzn"))
CAPTIONS = builtin_captions()[::40]  # enough for the tiny bases, whose tokens are bytes


def constrained_least_squares(words: Tensor, wanted: Tensor, plain: Tensor) -> Tensor:
    """X that minimises tr(X·plain·Xᵀ) with X·wordsᵀ = wanted, by the whole KKT system: 2·plain·Xᵀ + wordsᵀ·λ = 0."""
    n, width = words.shape
    system = torch.zeros(width + n, width + n, dtype=torch.float64)
    system[:width, :width], system[:width, width:], system[width:, :width] = 2 * plain, words.mT, words
    right = torch.cat([torch.zeros(width, len(wanted), dtype=torch.float64), wanted.mT])
    return torch.linalg.solve(system, right)[:width].mT


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_is_the_constrained_least_squares_and_the_papers_formula() -> None:
    words, captions, wanted = random(5, 12, seed=1), random(40, 12, seed=2), random(7, 5, seed=3)
    plain = captions.mT @ captions
    rows, kept = duals(words, plain)
    assert kept == [0, 1, 2, 3, 4]
    assert (rows @ words.mT - torch.eye(5)).abs().max() < 1e-12
    brute = constrained_least_squares(words, wanted, plain)
    assert (wanted @ rows - brute).abs().max() < 1e-10 * brute.abs().max()
    d = words @ torch.linalg.inv(plain)
    assert torch.allclose(wanted @ torch.linalg.inv(d @ words.mT) @ d, brute, rtol=0, atol=1e-10)


def test_a_word_that_others_say_already_is_left_out() -> None:
    words = random(4, 12, seed=1)
    words[2] = words[0] + 2 * words[1]
    rows, kept = duals(words, torch.eye(12, dtype=torch.float64))
    assert kept == [0, 1, 3]
    assert (rows @ words[kept].mT - torch.eye(3)).abs().max() < 1e-12
    assert duals(random(15, 12), torch.eye(12, dtype=torch.float64))[1] == list(range(12))
    with pytest.raises(ValueError, match="captions say the same in every direction"):
        duals(words, random(3, 12).mT @ random(3, 12))


@pytest.fixture(scope="module", params=[tiny_sdxl, tiny_sd15], ids=["sdxl", "sd15"])
def base(request: pytest.FixtureRequest) -> Base:
    return resident(request.param(torch.float64))


@pytest.fixture(scope="module")
def pair(base: Base) -> Pair:
    def some(rank: int, seed: int) -> LoRA:
        lora = random_lora(base.slots, rank=rank, seed=seed)
        return select(lora, lambda path: path.startswith(("unet.mid_block.", "unet.up_blocks.1.")))

    return Pair(some(3, 1), some(4, 2), words=WORDS)


def is_kv(path: str) -> bool:
    return path.endswith((".attn2.to_k", ".attn2.to_v"))


def states(base: Base, prompt: str, trigger: str, text: LoRA | None = None) -> Tensor:
    """From the trigger on, to the end of text: bytes are tokens here, and spaces none."""
    before = len(prompt.partition(trigger)[0].replace(" ", ""))
    end = len(prompt.replace(" ", "")) + 2
    return base.encode_prompt(prompt, text).embeds[0, 1 + before : end]


def of_both(base: Base, text: LoRA | None = None) -> list[Tensor]:
    return [
        torch.cat([states(base, prompt, words.trigger, text) for prompt in (words.trigger, words.prompt)])
        for words in WORDS
    ]


def merge(base: Base, pair: Pair, **knobs: object) -> Merged:
    (merged,) = custom_diffusion(base, [pair], CustomDiffusionKnobs(captions=CAPTIONS, **knobs))  # type: ignore[arg-type]
    return merged


def test_both_concepts_words_give_what_they_gave_alone(base: Base, pair: Pair) -> None:
    merged = merge(base, pair)
    made = merged.lora()
    paths = [path for path in made.layers if is_kv(path)]
    assert {base.slots.targets[path] for path in paths} == {base.unet.config.cross_attention_dim}
    read = of_both(base)
    assert merged.report["words"][0] + merged.report["words"][1] + merged.report["words_left_out"] == sum(
        map(len, read)
    )
    assert merged.report["words_left_out"] == 0
    for path in paths:
        weight = base.slots.layers[path].weight
        for lora, words in zip((pair.subject, pair.style), read, strict=True):
            alone = (weight + delta(lora.layers[path])) @ words.mT
            found = (weight + delta(made.layers[path])) @ words.mT
            assert (found - alone).norm() <= 1e-6 * alone.norm()
    assert merged.report["constraint_error_max"] < 1e-6


def test_of_all_that_do_it_changes_plain_captions_least(base: Base, pair: Pair) -> None:
    ridge = 1e-3
    made = merge(base, pair, ridge=ridge).lora()
    plain = torch.cat([base.encode_prompt(text).embeds[0, 1 : len(base.token_ids(text))] for text in CAPTIONS])
    system = plain.mT @ plain
    system += ridge * system.diagonal().mean() * torch.eye(len(system))
    read = of_both(base)
    for path in [path for path in made.layers if is_kv(path)]:
        updates = [delta(lora.layers[path]) for lora in (pair.subject, pair.style)]
        wanted = torch.cat([update @ words.mT for update, words in zip(updates, read, strict=True)], 1)
        brute = constrained_least_squares(torch.cat(read), wanted, system)
        assert (delta(made.layers[path]) - brute).norm() <= 1e-6 * brute.norm()


def test_other_layers_are_summed_or_left_out_and_kv_parts_suffice(base: Base, pair: Pair) -> None:
    whole, kv_alone = merge(base, pair), merge(base, pair, others="none")
    for path, layer in whole.lora().layers.items():
        if not is_kv(path):
            total = delta(pair.subject.layers[path]) + delta(pair.style.layers[path])
            assert torch.allclose(delta(layer), total, rtol=0, atol=1e-12)
    assert all(map(is_kv, kv_alone.lora().layers))
    trained = replace(pair, subject=select(pair.subject, is_kv), style=select(pair.style, is_kv))
    for path, layer in merge(base, trained).lora().layers.items():
        assert is_kv(path)
        assert torch.equal(delta(layer), delta(kv_alone.lora().layers[path]))
        assert torch.equal(delta(layer), delta(whole.lora().layers[path]))
    assert max_rank(whole.subject) == 3
    assert max_rank(whole.style) == 4


def test_the_style_can_be_scaled_afterwards(base: Base, pair: Pair) -> None:
    assert METHODS["custom-diffusion"].parts
    merged, weaker = merge(base, pair), merge(base, replace(pair, style=scaled(pair.style, 0.4)))
    for path in filter(is_kv, merged.style.layers):
        assert torch.allclose(
            delta(weaker.style.layers[path]), 0.4 * delta(merged.style.layers[path]), rtol=0, atol=1e-9
        )
        assert torch.allclose(delta(weaker.subject.layers[path]), delta(merged.subject.layers[path]), rtol=0, atol=1e-9)


def test_a_layer_that_one_lora_lacks_still_leaves_that_ones_words_alone(base: Base, pair: Pair) -> None:
    path = next(filter(is_kv, pair.style.layers))
    lacking = LoRA({name: layer for name, layer in pair.style.layers.items() if name != path})
    made = merge(base, replace(pair, style=lacking)).lora()
    change = delta(made.layers[path])
    subject, style = of_both(base)
    assert (change @ style.mT).norm() <= 1e-9 * change.norm() * style.norm()
    assert torch.allclose(change @ subject.mT, delta(pair.subject.layers[path]) @ subject.mT, rtol=0, atol=1e-8)


def test_trained_text_encoders_give_the_states_that_are_read(base: Base, pair: Pair) -> None:
    def text(seed: int) -> LoRA:
        lora = random_lora(base.slots, rank=2, seed=seed, scale=0.1, components="all")
        return select(lora, lambda path: path.startswith("text_encoder."))

    texts = [text(5), text(6)]
    subject, style = (
        LoRA({**lora.layers, **own.layers}) for lora, own in zip((pair.subject, pair.style), texts, strict=True)
    )
    merged = merge(base, replace(pair, subject=subject, style=style))
    made = merged.lora()
    both = select(made, lambda path: path.startswith("text_encoder."))
    assert both.layers.keys() == texts[0].layers.keys()
    for words, own, lora, read in zip(WORDS, texts, (subject, style), of_both(base, both), strict=True):
        alone = torch.cat([states(base, prompt, words.trigger, own) for prompt in (words.trigger, words.prompt)])
        for path in filter(is_kv, made.layers):
            weight = base.slots.layers[path].weight
            wanted = (weight + delta(lora.layers[path])) @ alone.mT
            assert ((weight + delta(made.layers[path])) @ read.mT - wanted).norm() <= 1e-6 * wanted.norm()


def test_what_it_cannot_do_is_refused(base: Base, pair: Pair) -> None:
    width = base.unet.config.cross_attention_dim
    with pytest.raises(ValueError, match=rf"missing captions: 1 have 4 words .* at least {width} are needed"):
        custom_diffusion(base, [pair], CustomDiffusionKnobs(captions=("dog",)))
    same = (Words("a photo of sks", "sks"), Words("a drawing of sks", "sks"))
    custom_diffusion(
        base, [replace(pair, words=same)], CustomDiffusionKnobs(captions=CAPTIONS)
    )  # told apart in context
    with pytest.raises(ValueError, match="the subject's words 'sks' and the style's 'sks' are not told apart"):
        custom_diffusion(base, [replace(pair, words=(same[0], same[0]))], CustomDiffusionKnobs(captions=CAPTIONS))
    bare = [select(lora, lambda path: "attn1" in path) for lora in (pair.subject, pair.style)]
    with pytest.raises(ValueError, match="neither LoRA touches K or V of a cross-attention: nothing to solve"):
        merge(base, replace(pair, subject=bare[0], style=bare[1]))
    with pytest.raises(ValueError, match=r"needs Pair\.words"):
        merge(base, replace(pair, words=None))


def test_bad_settings_are_refused_with_what_would_do() -> None:
    for given, reason in (
        ({"captions": ()}, "captions is empty; plain captions to leave alone, or built-in"),
        ({"captions": ("a dog", " ")}, r"captions\[1\] is empty; a plain caption such as"),
        ({"ridge": -1.0}, r"ridge is -1.0; from 0 \(the paper\) to 1"),
    ):
        with pytest.raises(ValueError, match=reason):
            CustomDiffusionKnobs(**given)  # type: ignore[arg-type]


def test_the_builtin_captions_say_enough_for_sdxl() -> None:
    """A word is at least a token, and a causal encoder gives it a state for each different beginning."""
    captions = builtin_captions()
    assert len(set(captions)) == len(captions)
    texts = [caption.split() for caption in captions]
    assert len({tuple(text[:end]) for text in texts for end in range(1, len(text) + 1)}) > 2 * 2048
    assert max(map(len, texts)) < 30
