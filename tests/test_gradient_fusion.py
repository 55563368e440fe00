"""Gradient fusion held against its objective on recorded inputs, in float64."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.random_loras import random_lora
from tests.tiny import tiny_sdxl
from ziplora.base import Base, resident
from ziplora.calibrate import calibrate
from ziplora.fusion_knobs import GradientFusionKnobs
from ziplora.gradient_fusion import fused, mix_of_show
from ziplora.lora import Layer, LoRA, delta, select
from ziplora.merged import Pair
from ziplora.slots import SlotLinear

OUT, WIDTH = 14, 10
TEXT = "text_encoder.text_model.encoder.layers.0."


def layer(rank: int, seed: int) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    return Layer(
        *(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((rank, WIDTH), (OUT, rank)))
    )


def inputs(seed: int, n: int = 40) -> Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(x: Tensor) -> Tensor:
    return x.mT @ x


def test_it_is_the_least_squares_of_the_paper_on_the_inputs_themselves() -> None:
    """min Σ‖(W₀ + ΔW_i) X_i − W X_i‖² by a dense solver that has never seen a moment or a factor."""
    updates, xs = [layer(3, 1), layer(2, 2)], [inputs(3), inputs(4)]
    made, left = fused(updates, [moment(x) for x in xs], 400)
    outputs = torch.cat([x @ delta(update).mT for update, x in zip(updates, xs, strict=True)])
    expected = torch.linalg.lstsq(torch.cat(xs), outputs).solution.mT
    found = delta(made[0]) + delta(made[1])
    assert (found - expected).abs().max() <= 1e-8 * expected.abs().max()
    assert [one.rank for one in made] == [3, 2]
    error = sum(((found - delta(u)) @ x.mT).square().sum() for u, x in zip(updates, xs, strict=True))
    start = sum((delta(u) @ x.mT).square().sum() for u, x in zip(updates, xs, strict=True))
    assert left == pytest.approx(float(error / start), rel=1e-9)


def test_every_iterate_is_what_l_bfgs_on_the_whole_matrix_gives() -> None:
    """The factored space loses nothing: the same number of steps from W₀, dense and by autograd, ends close by."""
    updates, xs = [layer(3, 1), layer(2, 2)], [inputs(3), inputs(4)]
    _, left = fused(updates, [moment(x) for x in xs], 6)
    dense = torch.zeros(OUT, WIDTH, dtype=torch.float64, requires_grad=True)
    start = float(sum((delta(u) @ x.mT).square().sum() for u, x in zip(updates, xs, strict=True)))

    def objective() -> Tensor:
        return sum(((delta(u) - dense) @ x.mT).square().sum() for u, x in zip(updates, xs, strict=True)) / start

    def closure() -> Tensor:
        dense.grad = None
        value = objective()
        value.backward()
        return value

    torch.optim.LBFGS([dense], max_iter=6, history_size=25, line_search_fn="strong_wolfe").step(closure)
    columns = torch.linalg.qr(torch.cat([u.up for u in updates], 1)).Q
    change = dense.detach()
    assert (change - columns @ (columns.mT @ change)).norm() <= 1e-12 * change.norm()
    assert left == pytest.approx(objective().item(), rel=0.5)


@pytest.mark.parametrize("twice", [False, True])
def test_fusion_of_one_lora_returns_it(twice: bool) -> None:
    one, g = layer(3, 1), moment(inputs(2))
    updates = [one, one] if twice else [one, None]
    made, left = fused(updates, [g, g if twice else torch.zeros_like(g)], 300)
    assert (sum(map(delta, made)) - delta(one)).abs().max() <= 1e-8 * delta(one).abs().max()
    assert left < 1e-15


def test_where_nothing_was_seen_or_nothing_changes_the_base_stays() -> None:
    one, g = layer(3, 1), moment(inputs(2))
    silent = Layer(one.down, one.up * 0)
    for updates, moments in (([one, layer(2, 2)], [g * 0, g * 0]), ([silent, silent], [g, g])):
        made, left = fused(updates, moments, 5)
        assert not any(delta(part).any() for part in made)
        assert left == 0


@pytest.fixture(scope="module")
def base() -> Base:
    return resident(tiny_sdxl(torch.float64))


@pytest.fixture(scope="module")
def pair(base: Base) -> Pair:
    def some(rank: int, seed: int, drop: int) -> LoRA:
        lora = random_lora(base.slots, rank=rank, seed=seed, components="all", drop=drop)
        return select(lora, lambda path: path.startswith(("unet.mid_block.", TEXT)))

    loras = [some(3, 1, 5), some(2, 2, 7)]
    settings = GradientFusionKnobs(draws=2, size=32).calibration(0)
    prompts = ("a photo of sks dog", "a house in szn style")
    image = Image.effect_mandelbrot((32, 32), (-2, -1.5, 1, 1.5), 20).convert("RGB")
    known = [calibrate(base, lora, prompt, [image], settings) for lora, prompt in zip(loras, prompts, strict=True)]
    return Pair(*loras, *known)


def test_targets_and_text_encoders_are_fused_and_the_rest_is_carried(base: Base, pair: Pair) -> None:
    (merged,) = mix_of_show(base, [pair], GradientFusionKnobs(steps=20, context_steps=40))
    lora = merged.lora()
    assert lora.layers.keys() == pair.subject.layers.keys() | pair.style.layers.keys()
    for path in lora.layers:
        total = sum(delta(one.layers[path]) for one in (pair.subject, pair.style) if path in one.layers)
        text = path.startswith("text_encoder") and isinstance(base.slots.layers[path], SlotLinear)
        same = torch.allclose(delta(lora.layers[path]), total, rtol=0, atol=1e-12)
        assert same != (path in base.slots.targets or text), path
    assert 0 < merged.report["fusion_left_mean"] <= merged.report["fusion_left_max"] < 1
    assert {layer.rank for layer in merged.style.layers.values()} == {2}
    with base.slots.loaded([[lora]]):
        pass  # every shape fits


def test_what_it_cannot_do_is_refused(base: Base, pair: Pair) -> None:
    with pytest.raises(ValueError, match="needs both LoRAs' calibrations with moments 'inputs'"):
        mix_of_show(base, [Pair(pair.subject, pair.style)], GradientFusionKnobs())
    bare = [select(lora, lambda path: ".resnets." in path) for lora in (pair.subject, pair.style)]
    with pytest.raises(ValueError, match="neither LoRA touches a layer that can be fused"):
        mix_of_show(base, [replace(pair, subject=bare[0], style=bare[1])], GradientFusionKnobs())
    path = next(path for path in pair.subject.layers if path in base.slots.targets)
    broken = dict(pair.subject.layers) | {
        path: Layer(pair.subject.layers[path].down * float("nan"), pair.subject.layers[path].up)
    }
    with pytest.raises(ArithmeticError, match=r"is not finite: is a LoRA broken"):
        mix_of_show(base, [replace(pair, subject=LoRA(broken))], GradientFusionKnobs(steps=1, context_steps=1))
    for given, reason in (
        ({"steps": 0}, "steps is 0; at least 1"),
        ({"draws": 0}, "draws is 0"),
        ({"size": 4}, "size is 4; at least 8"),
    ):
        with pytest.raises(ValueError, match=reason):
            GradientFusionKnobs(**given)
