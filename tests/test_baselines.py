"""Merges that need nothing but the two LoRAs, held against their equations on dense matrices, in float64.

The right-hand sides are built from ΔW = up·down, never from the factors that the code under test works with.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from tests.random_loras import random_lora
from tests.tiny import tiny_sdxl
from ziplora import factor
from ziplora.base import Base, resident
from ziplora.baseline_knobs import DareKnobs, DirectKnobs, NullSpaceKnobs, PruneKnobs, SvdKnobs, TiesKnobs
from ziplora.baselines import direct
from ziplora.lora import Layer, LoRA, delta, max_rank, restyled, select
from ziplora.low_rank_merges import np_lora, svd
from ziplora.merged import Merged, Pair
from ziplora.methods import METHODS
from ziplora.sparse_merges import dare, dropped, prune, ties

WHOLE = 10_000  # a rank above every layer's: nothing is left out
WEIGHTS = torch.ones(2, dtype=torch.float64)


@pytest.fixture(scope="module")
def base() -> Base:
    return resident(tiny_sdxl(torch.float64))


def some(lora: LoRA) -> LoRA:
    """The layers of one block: self-attention, cross-attention, and what else there is."""
    return select(lora, lambda path: path.startswith("unet.mid_block."))


@pytest.fixture(scope="module")
def pair(base: Base) -> Pair:
    return Pair(some(random_lora(base.slots, rank=3, seed=1)), some(random_lora(base.slots, rank=5, seed=2)))


def deltas(pair: Pair, path: str) -> list[Tensor]:
    return [delta(lora.layers[path]) for lora in (pair.subject, pair.style)]


def assert_merge(merged: Merged, expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    lora = merged.lora()
    assert lora.layers.keys() == expected.keys()
    for path, right in expected.items():
        assert (delta(lora.layers[path]) - right).abs().max() <= tolerance * right.abs().max(), path


def positive(lora: LoRA) -> LoRA:
    return LoRA({path: Layer(layer.down.abs(), layer.up.abs()) for path, layer in lora.layers.items()})


def test_ties_at_density_1_with_agreeing_signs_is_the_mean(base: Base, pair: Pair) -> None:
    agreeing = Pair(positive(pair.subject), positive(pair.style))
    (merged,) = ties(base, [agreeing], TiesKnobs(density=1.0))
    assert_merge(merged, {path: sum(deltas(agreeing, path)) / 2 for path in pair.subject.layers})
    assert merged.report["factor_error_max"] < 1e-12  # half of a LoRA has its rank


@pytest.mark.parametrize("elect", ["total", "frequency"])
def test_ties_is_its_algorithm_on_dense_updates(base: Base, pair: Pair, elect: str) -> None:
    (merged,) = ties(base, [pair], TiesKnobs(density=0.3, elect=elect, scale=0.7, rank=WHOLE))
    expected = {}
    for path in pair.subject.layers:
        kept = []
        for dense in deltas(pair, path):
            smallest_kept = dense.abs().flatten().sort(descending=True).values[int(0.3 * dense.numel()) - 1]
            kept.append(torch.where(dense.abs() >= smallest_kept, dense, 0.0))
        c, s = kept
        votes = c + s if elect == "total" else c.sign() + s.sign()
        sign = torch.where(votes >= 0, 1.0, -1.0)
        agree = [(one.sign() == sign).double() for one in kept]
        expected[path] = 0.7 * (c * agree[0] + s * agree[1]) / (agree[0] + agree[1]).clamp(min=1)
        library = merge_utils.ties(deltas(pair, path), WEIGHTS, 0.3, elect)
        assert torch.allclose(expected[path], 0.7 * library, rtol=0, atol=1e-14)
    assert_merge(merged, expected)


def test_prune_keeps_the_largest_of_each(base: Base, pair: Pair) -> None:
    (merged,) = prune(base, [pair], PruneKnobs(density=0.2, rank=WHOLE))
    library = {path: merge_utils.magnitude_prune(deltas(pair, path), WEIGHTS, 0.2) for path in pair.subject.layers}
    assert_merge(merged, library)
    (merged,) = prune(base, [pair], PruneKnobs(density=1.0))
    assert_merge(merged, {path: sum(deltas(pair, path)) for path in pair.subject.layers})


def test_dare_keeps_the_expectation(base: Base, pair: Pair) -> None:
    (merged,) = dare(base, [pair], DareKnobs(density=1.0))
    assert_merge(merged, {path: sum(deltas(pair, path)) for path in pair.subject.layers})
    dense = deltas(pair, next(iter(pair.subject.layers)))[0]
    draws = torch.stack([dropped(dense, 0.25, seed) for seed in range(400)])
    values = {0.0, *(dense / 0.25).flatten().tolist()}
    assert set(draws[0].flatten().tolist()) <= values
    deviation = (draws.mean(0) - dense) / (dense.abs() * (0.75 / 0.25 / 400) ** 0.5)
    assert deviation.abs().max() < 5.5  # standard errors, over some thousand elements
    assert 0.9 < deviation.std() < 1.1


def test_dare_depends_on_its_seed_alone_and_no_two_layers_share_a_draw(base: Base, pair: Pair) -> None:
    knobs = DareKnobs(density=0.5, rank=WHOLE)
    (one,) = dare(base, [pair], knobs)
    torch.manual_seed(99)
    same, other = dare(base, [pair, Pair(pair.style, pair.subject)], knobs)
    paths = [path for path in pair.subject.layers if "attn1" in path]
    assert all(torch.equal(delta(one.lora().layers[path]), delta(same.lora().layers[path])) for path in paths)
    dropped_where = [delta(one.subject.layers[path]).abs() < 1e-9 for path in paths]
    alike = [torch.equal(a, b) for a, b in pairwise(dropped_where) if a.shape == b.shape]
    assert alike
    assert not any(alike)
    assert not torch.equal(delta(one.subject.layers[paths[0]]), delta(other.style.layers[paths[0]]))
    (seeded,) = dare(base, [replace(pair, seed=1)], knobs)
    assert not any(torch.equal(delta(one.subject.layers[path]), delta(seeded.subject.layers[path])) for path in paths)


def test_dare_with_elected_signs_is_the_librarys(base: Base, pair: Pair) -> None:
    (merged,) = dare(base, [pair], DareKnobs(density=0.5, combine="ties", rank=WHOLE))
    (plain,) = dare(base, [pair], DareKnobs(density=0.5, rank=WHOLE))
    expected = {}
    for path in pair.subject.layers:
        kept = torch.stack([delta(plain.subject.layers[path]), delta(plain.style.layers[path])])
        kept = torch.where(kept.abs() < 1e-9 * kept.abs().max(), 0.0, kept)
        expected[path] = merge_utils.disjoint_merge(kept, merge_utils.calculate_majority_sign_mask(kept))
    assert_merge(merged, expected)


def test_svd_at_full_rank_is_the_direct_merge_and_below_it_the_best(base: Base, pair: Pair) -> None:
    (merged,) = svd(base, [pair], SvdKnobs(rank=8))
    assert_merge(merged, {path: sum(deltas(pair, path)) for path in pair.subject.layers})
    (cut,) = svd(base, [pair], SvdKnobs())
    assert max_rank(cut.lora()) == 5
    errors = []
    for path in pair.subject.layers:
        total = sum(deltas(pair, path))
        u, s, vh = torch.linalg.svd(total)
        best = (u[:, :5] * s[:5]) @ vh[:5]
        assert torch.allclose(delta(cut.lora().layers[path]), best, rtol=0, atol=1e-9)
        errors.append(float((total - best).norm() / total.norm()))
    assert cut.report["factor_error_max"] == pytest.approx(max(errors), abs=1e-9)
    assert cut.report["factor_error_mean"] == pytest.approx(sum(errors) / len(errors), abs=1e-9)


def test_svd_takes_every_module_convolutions_too(base: Base) -> None:
    pair = Pair(*(some(random_lora(base.slots, 3, seed, components="all", drop=4 + seed)) for seed in (0, 1)))
    (merged,) = svd(base, [pair], SvdKnobs(rank=6))
    (expected,) = direct(base, [pair], DirectKnobs())
    assert_merge(merged, {path: delta(layer) for path, layer in expected.lora().layers.items()})


def test_np_lora_without_mu_keeps_off_the_styles_row_space(base: Base, pair: Pair) -> None:
    (merged,) = np_lora(base, [pair], NullSpaceKnobs(mu=None))
    for path in pair.subject.layers:
        projected, style = delta(merged.subject.layers[path]), deltas(pair, path)[1]
        assert (projected @ style.mT).abs().max() <= 1e-9 * projected.norm() * style.norm()
        assert merged.subject.layers[path].rank == 3
        assert torch.equal(delta(merged.style.layers[path]), style)
    assert 0 < merged.report["subject_kept_min"] <= merged.report["subject_kept_mean"] < 1


def test_np_lora_at_mu_0_is_the_direct_merge(base: Base, pair: Pair) -> None:
    (merged,) = np_lora(base, [pair], NullSpaceKnobs(mu=0.0))
    assert_merge(merged, {path: sum(deltas(pair, path)) for path in pair.subject.layers}, 1e-15)
    assert merged.report["subject_kept_min"] == 1


@pytest.mark.parametrize("directions", [None, 2])
def test_np_lora_between_minimises_its_objective(base: Base, pair: Pair, directions: int | None) -> None:
    """‖X − ΔW_c‖² + μ‖X·V‖² has gradient 2(X − ΔW_c) + 2μ·X·V·Vᵀ."""
    mu = 0.7
    (merged,) = np_lora(base, [pair], NullSpaceKnobs(mu=mu, directions=directions))
    for path in pair.subject.layers:
        subject, style = deltas(pair, path)
        v = torch.linalg.svd(style).Vh[: directions or 5].mT
        x = delta(merged.subject.layers[path])
        gradient = (x - subject) + mu * x @ v @ v.mT
        assert gradient.abs().max() <= 1e-9 * subject.abs().max()


def methods() -> list[tuple]:
    return [
        (ties, TiesKnobs(density=0.4)), (dare, DareKnobs(density=0.6)), (prune, PruneKnobs(density=0.4)),
        (np_lora, NullSpaceKnobs()), (svd, SvdKnobs()),
    ]  # fmt: skip


@pytest.mark.parametrize(("method", "knobs"), methods(), ids=lambda value: getattr(value, "__name__", ""))
def test_layers_that_only_one_has_and_those_that_are_no_targets(base: Base, method, knobs) -> None:
    pair = Pair(
        *(
            some(random_lora(base.slots, 3, seed, dtype=torch.float32, components="all", drop=4 + seed))
            for seed in (0, 1)
        )
    )
    (merged,) = method(base, [pair], knobs)
    lora = merged.lora()
    assert lora.layers.keys() == pair.subject.layers.keys() | pair.style.layers.keys()
    assert {layer.down.dtype for layer in lora.layers.values()} == {torch.float32}
    carried = [path for path in lora.layers if path not in base.slots.targets]
    for path in carried if method is not svd else []:
        expected = sum(delta(one.layers[path]) for one in (pair.subject, pair.style) if path in one.layers)
        torch.testing.assert_close(delta(lora.layers[path]), expected, rtol=0, atol=1e-6)
    with base.slots.loaded([[lora]]):
        pass  # every shape fits


@pytest.mark.parametrize(("method", "knobs"), methods(), ids=lambda value: getattr(value, "__name__", ""))
def test_the_style_can_be_scaled_afterwards_where_the_table_says_so(base: Base, pair: Pair, method, knobs) -> None:
    (merged,) = method(base, [pair], knobs)
    weak = restyled(merged.lora(), merged.subject_rank, 0.4)
    (row,) = (row for row in METHODS.values() if row.load() is method)
    if not row.parts:
        assert merged.subject_rank == max_rank(merged.lora())
        return
    for path in pair.subject.layers:
        expected = delta(merged.subject.layers[path]) + 0.4 * delta(merged.style.layers[path])
        assert torch.allclose(delta(weak.layers[path]), expected, rtol=0, atol=1e-12)
        assert delta(merged.style.layers[path]).abs().max() > 0


def test_large_layers_are_factored_nearly_as_well_as_can_be() -> None:
    generator = torch.Generator().manual_seed(0)
    low_rank = torch.randn(700, 24, generator=generator) @ torch.randn(24, 900, generator=generator)
    dense = torch.where(torch.rand(700, 900, generator=generator) < 0.3, low_rank, 0.0)
    layer, error = factor.compressed(dense, 24)
    s = torch.linalg.svdvals(dense.double())
    best = float(s[24:].norm() / s.norm())
    assert best <= error + 1e-6
    assert error <= 1.01 * best
    assert error == pytest.approx(float((dense - layer.up @ layer.down).norm() / dense.norm()), rel=1e-4)
    again, _ = factor.compressed(dense, 24)
    assert torch.equal(again.down, layer.down)


def test_a_silent_lora_is_no_division_by_nought(base: Base, pair: Pair) -> None:
    silent = LoRA({path: Layer(layer.down, layer.up * 0) for path, layer in pair.style.layers.items()})
    for method, knobs in methods():
        (merged,) = method(base, [Pair(pair.subject, silent)], knobs)
        assert all(torch.isfinite(delta(layer)).all() for layer in merged.lora().layers.values())
        (merged,) = method(base, [Pair(silent, silent)], knobs)
        assert not any(delta(layer).any() for layer in merged.lora().layers.values())


def test_bad_settings_are_refused_with_what_would_do() -> None:
    for knobs, given, reason in (
        (TiesKnobs, {"density": 0.0}, r"density is 0.0; above 0 \(nothing kept\) and at most 1"),
        (PruneKnobs, {"density": 1.1}, "density is 1.1"),
        (DareKnobs, {"rank": 0}, "rank is 0; at least 1, or null for the LoRA's own"),
        (SvdKnobs, {"rank": -1}, "rank is -1; at least 1, or null for the larger of the two LoRAs'"),
        (TiesKnobs, {"scale": 0.0}, "scale is 0.0; above 0 and finite"),
        (NullSpaceKnobs, {"mu": -0.1}, "mu is -0.1; at least 0"),
        (NullSpaceKnobs, {"directions": 0}, "directions is 0; at least 1"),
    ):
        with pytest.raises(ValueError, match=reason):
            knobs(**given)


def test_a_density_that_keeps_nothing_is_refused(base: Base, pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"density 1e-06 keeps nothing of a layer of [\d,]+ elements"):
        ties(base, [pair], TiesKnobs(density=1e-6))
