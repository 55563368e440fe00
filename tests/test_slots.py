"""Slots against dense weights: the same UNet with W₀ + ΔW written into it."""

import pytest
import torch
from torch import Tensor

from tests.random_loras import random_lora
from tests.tiny import tiny_sd15, tiny_sdxl
from ziplora.base import Base, Conditioning, resident
from ziplora.errors import ShapeMismatch
from ziplora.lora import Layer, LoRA, Mergers, concat, delta, zip_merge


@pytest.fixture(scope="module", params=["sdxl", "sd15"])
def base(request: pytest.FixtureRequest) -> Base:
    return resident((tiny_sdxl if request.param == "sdxl" else tiny_sd15)(torch.float64))


def inputs(base: Base, rows: int = 2) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(7)
    noisy = torch.randn(rows, 4, 8, 8, generator=generator, dtype=torch.float64)
    prompts = [f"picture {i}" for i in range(rows)]
    return noisy, torch.randint(0, 1000, (rows,), generator=generator), base.encode_prompts(prompts)


@torch.no_grad()
def dense_prediction(base: Base, lora: LoRA, rows: tuple[Tensor, Tensor, Conditioning]) -> Tensor:
    """The prediction with ΔW added to the weights themselves, which are put back bit by bit."""
    kept = {path: base.slots.layers[path].weight.clone() for path in lora.layers}
    for path, layer in lora.layers.items():
        weight = base.slots.layers[path].weight
        weight += delta(layer).reshape(weight.shape)
    result = base.predict_noise(*rows)
    for path, weight in kept.items():
        base.slots.layers[path].weight.copy_(weight)
    return result


@torch.no_grad()
def test_one_lora_in_the_slots_is_w0_plus_delta(base: Base) -> None:
    rows = inputs(base)
    for components in ("targets", "all"):
        lora = random_lora(base.slots, components=components)
        lora = LoRA({path: layer for path, layer in lora.layers.items() if path.startswith("unet.")})
        with base.slots.loaded([[lora]]):
            slotted = base.predict_noise(*rows)
        torch.testing.assert_close(slotted, dense_prediction(base, lora, rows), rtol=0, atol=1e-11)
        assert (slotted - base.predict_noise(*rows)).abs().max() > 1e-3


@torch.no_grad()
def test_merged_pair_is_eq_2(base: Base) -> None:
    rows, generator = inputs(base), torch.Generator().manual_seed(1)
    subject, style = random_lora(base.slots, rank=4, seed=1), random_lora(base.slots, rank=6, seed=2, drop=5)
    with base.slots.loaded([[subject, style]]):
        parameters = base.slots.attach_mergers()
        for parameter in parameters.values():
            parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2)
        slotted = base.predict_noise(*rows)
    mergers = Mergers(
        {path: parameters[path][0, 0] for path in subject.layers},
        {path: parameters[path][0, 1] for path in style.layers},
    )
    dense = LoRA(
        {
            path: Layer(torch.eye(layer.down.shape[1], dtype=torch.float64), weighted)
            for path, layer in subject.layers.items()
            if (
                weighted := delta(layer) * parameters[path][0, 0]
                + (delta(style.layers[path]) * parameters[path][0, 1] if path in style.layers else 0)
            )
            is not None
        }
    )
    expected = dense_prediction(base, dense, rows)
    torch.testing.assert_close(slotted, expected, rtol=0, atol=1e-11)
    with base.slots.loaded([[zip_merge(subject, style, mergers)]]):
        torch.testing.assert_close(base.predict_noise(*rows), expected, rtol=0, atol=1e-11)


@torch.no_grad()
def test_special_mergers(base: Base) -> None:
    rows = inputs(base)
    subject, style = random_lora(base.slots, seed=1), random_lora(base.slots, seed=2)
    alone, both = dense_prediction(base, subject, rows), dense_prediction(base, concat([subject, style]), rows)
    with base.slots.loaded([[subject, style]]):
        parameters = base.slots.attach_mergers()
        torch.testing.assert_close(base.predict_noise(*rows), both, rtol=0, atol=1e-11)
        for parameter in parameters.values():
            parameter[:, 1] = 0
        torch.testing.assert_close(base.predict_noise(*rows), alone, rtol=0, atol=1e-11)


@torch.no_grad()
def test_merges_side_by_side_equal_each_alone(base: Base) -> None:
    pairs = [
        [random_lora(base.slots, rank=2 + i, seed=i, components="all"), random_lora(base.slots, seed=10 + i)]
        for i in range(3)
    ]
    noisy, timesteps, conditioning = inputs(base, rows=6)
    with base.slots.loaded(pairs):
        together = base.predict_noise(noisy, timesteps, conditioning)
    for i, pair in enumerate(pairs):
        mine = slice(2 * i, 2 * i + 2)
        with base.slots.loaded([pair]):
            alone = base.predict_noise(noisy[mine], timesteps[mine], conditioning.rows(mine))
        torch.testing.assert_close(together[mine], alone, rtol=0, atol=1e-11)


@torch.no_grad()
def test_a_fused_lora_is_w0_plus_delta_and_leaves_nothing_behind(base: Base) -> None:
    rows = inputs(base)
    weights = {path: (slot.weight, slot.weight.clone()) for path, slot in base.slots.layers.items()}
    lora = random_lora(base.slots, components="all", drop=3)
    lora = LoRA({path: layer for path, layer in lora.layers.items() if path.startswith("unet.")})
    expected = dense_prediction(base, lora, rows)
    base.slots.load([[random_lora(base.slots, seed=9)]])
    with base.slots.fused(lora):
        torch.testing.assert_close(base.predict_noise(*rows), expected, rtol=0, atol=1e-11)
        assert all(torch.equal(own, copy) for own, copy in weights.values())
    with pytest.raises(RuntimeError, match="half way"), base.slots.fused(lora):
        raise RuntimeError("half way")
    assert all(base.slots.layers[path].weight is own for path, (own, _) in weights.items())
    assert all(torch.equal(own, copy) for own, copy in weights.values())
    wrong = LoRA({**lora.layers, "unet.nowhere": Layer(torch.zeros(2, 5), torch.zeros(7, 2))})
    with pytest.raises(ShapeMismatch), base.slots.fused(wrong):
        pass
    assert all(base.slots.layers[path].weight is own for path, (own, _) in weights.items())


@torch.no_grad()
def test_a_lora_fused_into_bf16_is_rounded_once() -> None:
    base = resident(tiny_sdxl(torch.bfloat16))
    lora = random_lora(base.slots, rank=16, dtype=torch.float32)
    for path, layer in lora.layers.items():
        own = base.slots.layers[path].weight
        exact = own.double() + delta(layer).double()
        with base.slots.fused(LoRA({path: layer})):
            error = (base.slots.layers[path].weight.double() - exact).abs()
        assert (error <= exact.abs() * 2**-7.99 + 1e-9).all()  # half a unit in the last place


@torch.no_grad()
def test_text_encoder_parts_act_while_loaded(base: Base) -> None:
    plain = base.encode_prompts(["a cat"]).embeds
    lora = random_lora(base.slots, components="all")
    with base.slots.loaded([[lora]]):
        assert (base.encode_prompts(["a cat"]).embeds - plain).abs().max() > 1e-3
    assert torch.equal(base.encode_prompts(["a cat"]).embeds, plain)


@torch.no_grad()
def test_base_is_untouched_and_buffers_are_reused(base: Base) -> None:
    weights = {name: tensor.clone() for name, tensor in base.unet.state_dict().items()}
    modules = [id(module) for module in base.unet.modules()]
    with base.slots.loaded([[random_lora(base.slots, seed=0), random_lora(base.slots, seed=1)]]):
        buffers = {path: slot.down.data_ptr() for path, slot in base.slots.layers.items() if slot.down is not None}
    for seed in range(2, 8):
        with base.slots.loaded([[random_lora(base.slots, seed=seed), random_lora(base.slots, rank=3, seed=seed + 1)]]):
            base.predict_noise(*inputs(base))
            base.slots.attach_mergers()
    assert {path: slot.down.data_ptr() for path, slot in base.slots.layers.items() if slot.down is not None} == buffers
    assert modules == [id(module) for module in base.unet.modules()]
    assert weights.keys() == base.unet.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in base.unet.state_dict().items())


def test_lora_of_another_base_is_refused_before_anything_is_written(base: Base) -> None:
    target = next(iter(base.slots.targets))
    wrong = LoRA({target: Layer(torch.zeros(2, 5), torch.zeros(7, 2))})
    with pytest.raises(ShapeMismatch, match=r"LoRA is \[7, 5\] at unet\..*another base model"):
        base.slots.load([[wrong]])
    with pytest.raises(ShapeMismatch, match=r"unet.nowhere, which this base does not have"):
        base.slots.load([[LoRA({"unet.nowhere": Layer(torch.zeros(2, 5), torch.zeros(7, 2))})]])
    assert not any(slot.active for slot in base.slots.layers.values())


@torch.no_grad()
def test_what_was_loaded_before_changes_no_bit() -> None:
    base = resident(tiny_sdxl(torch.float32))
    rows = inputs(base)
    rows = (rows[0].float(), *rows[1:])
    lora = random_lora(base.slots, rank=3, dtype=torch.float32)
    with base.slots.loaded([[lora]]):
        fresh = base.predict_noise(*rows)
    with base.slots.loaded([[random_lora(base.slots, rank=17, components="all"), lora]]):
        base.predict_noise(*rows)
    with base.slots.loaded([[lora]]):
        assert torch.equal(base.predict_noise(*rows), fresh)
