"""Figures about LoRAs, held against dense matrices."""

import pytest
import torch

from tests.lora_files import random_lora
from ziplora.diagnose import (
    alignment,
    block_of,
    by_block,
    effective_rank,
    interference,
    merger_cosine,
    merger_histograms,
    parts_of,
    sparsity,
    without_smallest,
)
from ziplora.lora import Layer, LoRA, Mergers, delta, stacked, zipped

BLOCK = "attentions.0.transformer_blocks.0"
Q, K = f"unet.mid_block.{BLOCK}.attn1.to_q", f"unet.down_blocks.1.{BLOCK}.attn2.to_k"
CONV = "unet.mid_block.resnets.0.conv1"
SHAPES = {Q: (12, 10), K: (12, 16), CONV: (4, 3, 3, 3)}
SUBJECT, STYLE = (random_lora(SHAPES, rank=3, seed=seed, dtype=torch.float64) for seed in (0, 1))


def dense(lora: LoRA) -> list[torch.Tensor]:
    return [delta(lora.layers[path]) for path in (Q, K)]


def test_sparsity_counts_elements_and_energy() -> None:
    found = sparsity(SUBJECT)
    for threshold, share in found.below.items():
        below = sum(int((one.abs() < threshold * one.abs().max()).sum()) for one in dense(SUBJECT))
        assert share == below / sum(one.numel() for one in dense(SUBJECT))
    for dropped, left in found.energy_left.items():
        expected = []
        for one in dense(SUBJECT):
            kept = one.abs().flatten().sort().values[int(dropped * one.numel()) :]
            expected.append(float(kept.square().sum() / one.square().sum()))
        assert left == pytest.approx(sum(expected) / 2, abs=1e-12)
    assert found.rank == {Q: 3, K: 3}
    assert all(1 < value < 3 for value in found.effective_rank.values())


def test_without_the_smallest_elements_the_largest_are_as_they_were() -> None:
    left = without_smallest(SUBJECT, 0.8)
    for path in (Q, K):
        whole, kept = delta(SUBJECT.layers[path]), delta(left.layers[path])
        gone = int(0.8 * whole.numel())
        assert int((kept == 0).sum()) == gone
        assert whole[kept == 0].abs().max() <= whole[kept != 0].abs().min()
        assert torch.equal(kept[kept != 0], whole[kept != 0])
        energy = float(kept.square().sum() / whole.square().sum())
        assert energy == pytest.approx(
            float(whole.abs().flatten().sort().values[gone:].square().sum() / whole.square().sum())
        )
    assert left.layers[CONV] is SUBJECT.layers[CONV]
    assert without_smallest(SUBJECT, 0.0).layers == SUBJECT.layers
    with pytest.raises(ValueError, match=r"share is 1\.0; from 0, below 1"):
        without_smallest(SUBJECT, 1.0)


def test_a_lora_without_attention_layers_has_nothing_to_look_at() -> None:
    with pytest.raises(ValueError, match="no attention layer"):
        sparsity(LoRA({CONV: SUBJECT.layers[CONV]}))
    silent = {Q: Layer(SUBJECT.layers[Q].down, SUBJECT.layers[Q].up * 0)}
    with pytest.raises(ValueError, match="no attention layer"):
        sparsity(LoRA(silent))
    assert interference(LoRA(silent), STYLE) == alignment(LoRA(silent), STYLE) == {Q: 0.0}


def test_effective_rank_counts_equal_directions() -> None:
    up = torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64))[0]
    down = torch.linalg.qr(torch.randn(7, 4, dtype=torch.float64))[0].mT
    assert effective_rank(Layer(down, up)) == pytest.approx(4)
    assert effective_rank(Layer(down, up * torch.tensor([1.0, 1e-9, 0.0, 0.0]))) == pytest.approx(1, abs=1e-6)
    assert effective_rank(Layer(down, up * 0)) == 0


def test_alignment_and_interference_are_those_of_dense_columns() -> None:
    for found, path in ((alignment(SUBJECT, STYLE), Q), (alignment(SUBJECT, STYLE), K)):
        c, s = delta(SUBJECT.layers[path]), delta(STYLE.layers[path])
        assert found[path] == pytest.approx(float(torch.cosine_similarity(c, s, dim=0).abs().mean()), abs=1e-12)
        meeting = (c * s).sum(0).abs().sum() / (c.norm() * s.norm())
        assert interference(SUBJECT, STYLE)[path] == pytest.approx(float(meeting), abs=1e-12)
    same = LoRA({path: Layer(layer.down, -layer.up) for path, layer in SUBJECT.layers.items()})
    assert list(alignment(SUBJECT, same).values()) == pytest.approx([1, 1])
    assert list(interference(SUBJECT, same).values()) == pytest.approx([1, 1])


def test_mergers_change_interference_and_no_cosine() -> None:
    generator = torch.Generator().manual_seed(2)
    halves = [{path: torch.rand(SHAPES[path][1], generator=generator) + 0.1 for path in (Q, K)} for _ in range(2)]
    mergers = Mergers(*halves)
    merged = zipped(SUBJECT, STYLE, mergers)
    assert alignment(*merged) == pytest.approx(alignment(SUBJECT, STYLE))
    assert interference(*merged) != pytest.approx(interference(SUBJECT, STYLE), rel=1e-3)
    left = torch.arange(10) < 5
    apart = Mergers({Q: left.float()}, {Q: (~left).float()})
    assert interference(*zipped(SUBJECT, STYLE, apart))[Q] == 0
    assert merger_cosine(apart) == {Q: 0}
    assert merger_cosine(Mergers({Q: torch.ones(10)}, {Q: torch.ones(10)}))[Q] == pytest.approx(1)


def test_histograms_count_every_coefficient_by_block() -> None:
    mergers = Mergers({Q: torch.tensor([1.0, 1.0, 0.0, -9.0]), K: torch.ones(16)}, {Q: torch.full((4,), 9.0)})
    found = merger_histograms(mergers)
    assert list(found) == ["down_blocks.1", "mid_block"]
    subject, style = found["mid_block"]
    assert (subject.sum(), subject[0], style[-1]) == (4, 1, 4)
    assert found["down_blocks.1"][0].sum() == 16


def test_blocks_in_the_order_of_the_unet() -> None:
    paths = [
        f"unet.{block}.{BLOCK}.attn1.to_q" for block in ("up_blocks.0", "mid_block", "down_blocks.2", "down_blocks.1")
    ]
    assert block_of(paths[1]) == "mid_block"
    found = by_block({path: float(number) for number, path in enumerate(paths)} | {f"{paths[0]}x": 2.0})
    assert list(found) == ["down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0"]
    assert found["up_blocks.0"] == 1.0


def test_a_published_merge_comes_apart() -> None:
    subject, style = parts_of(stacked([SUBJECT, STYLE]), 3)
    for path in SHAPES:
        assert torch.equal(delta(subject.layers[path]), delta(SUBJECT.layers[path]))
        assert torch.equal(delta(style.layers[path]), delta(STYLE.layers[path]))
