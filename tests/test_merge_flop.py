"""Operations that are counted in advance, held against those that are done: torch counts the matrix products."""

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.random_loras import random_lora
from tests.tiny import tiny_sdxl
from ziplora import merge_flop
from ziplora.base import Base, resident
from ziplora.baseline_knobs import OVERSAMPLED
from ziplora.factor import compressed
from ziplora.fusion_knobs import HISTORY, GradientFusionKnobs, KLoRAKnobs
from ziplora.gradient_fusion import fused
from ziplora.k_lora import k_lora
from ziplora.lora import Layer
from ziplora.merged import Pair


def products(work: Callable[[], object]) -> int:
    """Operations of the matrix products alone: factorisations are not counted."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def base() -> Base:
    return resident(tiny_sdxl())


def test_k_lora_makes_both_updates_dense(base: Base) -> None:
    pair = Pair(random_lora(base.slots, 2, 1), random_lora(base.slots, 3, 2))
    targets = {path: (len(base.slots.layers[path].weight), width) for path, width in base.slots.targets.items()}
    done = products(lambda: k_lora(base, [pair], KLoRAKnobs()))
    elements = sum(out * width for out, width in targets.values())
    counted = merge_flop.chosen(targets, (2, 3), KLoRAKnobs())
    assert counted - 2 * merge_flop.SELECTING * elements == done


@pytest.mark.parametrize(("name", "steps"), [("attn1.to_q", 50), ("attn2.to_k", 100)])
def test_gradient_fusion_evaluates_hardly_more_often_than_it_steps(name: str, steps: int) -> None:
    path = f"unet.mid_block.attentions.0.transformer_blocks.0.{name}"
    out, width, ranks = 64, 128, (4, 4)
    generator = torch.Generator().manual_seed(0)
    layers = [Layer(*(torch.randn(shape, generator=generator) for shape in ((r, width), (out, r)))) for r in ranks]
    spread = torch.logspace(0, -3, width)[:, None]
    seen = [torch.randn(width, 3 * width, generator=generator) * spread for _ in ranks]
    moments = [one @ one.mT for one in seen]
    done = products(lambda: fused(layers, moments, steps))
    counted = merge_flop.fused({path: (out, width)}, ranks, GradientFusionKnobs(steps=50, context_steps=100))
    memory = steps * 8 * HISTORY * sum(ranks) * width  # of L-BFGS: no matrix products, like the factorisation
    assert done == pytest.approx(counted - memory - merge_flop.qr(out, sum(ranks)), rel=0.1)


def test_a_large_update_is_factored_by_products_with_a_few_columns() -> None:
    dense, rank = torch.randn(700, 640, generator=torch.Generator().manual_seed(0)), 8
    columns = rank + OVERSAMPLED
    counted = 10 * merge_flop.dense(700, 640, columns) + merge_flop.dense(700, 640, rank)
    assert products(lambda: compressed(dense, rank)) == pytest.approx(counted, rel=0.02)
    assert merge_flop.compressed(700, 640, rank) > counted
    assert merge_flop.compressed(700, 640, rank) < merge_flop.svd(700, 640) / 10
