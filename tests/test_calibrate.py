"""Second moments and output weights against their definitions, and calibrations as files."""

import dataclasses

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.random_loras import random_lora
from tests.tiny import tiny_sd15, tiny_sdxl
from ziplora.base import Base, resident
from ziplora.calibrate import Calibration, calibrate, predictions
from ziplora.calibration_files import calibration_key, read_calibration, write_calibration
from ziplora.calibration_settings import CalibrationSettings
from ziplora.errors import FormatError
from ziplora.module_names import CONTEXT, input_of
from ziplora.moments import STORED_SHARE, compact, readers, restored, weigh_outputs

PICTURES = [Image.linear_gradient("L"), Image.radial_gradient("L")]
SETTINGS = CalibrationSettings(draws=6, seed=0, noise="separate", size=32, moments="inputs+outputs")


@pytest.fixture(scope="module", params=["sdxl", "sd15"])
def base(request: pytest.FixtureRequest) -> Base:
    return resident((tiny_sdxl if request.param == "sdxl" else tiny_sd15)(torch.float64))


@pytest.fixture(scope="module")
def calibration(base: Base) -> Calibration:
    return calibrate(base, random_lora(base.slots, 3), "a dog", PICTURES, SETTINGS)


def test_layers_of_one_name_read_the_same_tensor_and_others_another(base: Base) -> None:
    seen: dict[str, Tensor] = {}
    hooks = [
        base.slots.layers[path].register_forward_pre_hook(lambda _, args, path=path: seen.__setitem__(path, args[0]))
        for path in base.slots.targets
    ]
    base.predict_noise(torch.randn(1, 4, 4, 4).double(), torch.tensor([5]), base.encode_prompts(["a"]))
    for hook in hooks:
        hook.remove()
    tensors = {name: {id(seen[path]) for path in paths} for name, paths in readers(base.slots.targets).items()}
    assert all(len(some) == 1 for some in tensors.values())
    assert len(set.union(*tensors.values())) == len(tensors)
    blocks = sum(path.endswith("attn1.to_q") for path in base.slots.targets)
    assert len(tensors) == 4 * blocks + 1  # 281 for SDXL's 70 blocks


def test_moments_are_those_of_the_inputs_in_the_teachers_run(base: Base, calibration: Calibration) -> None:
    lora = random_lora(base.slots, 3)
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
    rows: list[Tensor] = []
    hook = base.slots.layers[path].register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, -2)))
    with base.slots.loaded([[lora]]):
        predictions(base, calibration.noisy, calibration.timesteps, calibration.conditioning)
    hook.remove()
    x = torch.cat(rows)
    assert calibration.moments is not None
    torch.testing.assert_close(calibration.moments[input_of(path)], x.mT @ x / len(x), rtol=1e-12, atol=1e-14)
    embeds = calibration.conditioning.embeds[0]
    torch.testing.assert_close(calibration.moments[CONTEXT], embeds.mT @ embeds / len(embeds), rtol=1e-12, atol=1e-14)


def test_output_weights_are_the_trace_of_the_gauss_newton_matrix(base: Base) -> None:
    """tr(zᵀJ Jᵀz)/out/numel, J the Jacobian of the prediction in the outputs of one layer: that of zzᵀ, whose mean is
    1, in place of tr(JᵀJ)."""
    path = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0"
    noisy = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    at, prompt, layer = torch.tensor([300, 700]), base.encode_prompts(["a dog"]), base.slots.layers[path]
    found, predictions_too = weigh_outputs(base, noisy, at, prompt, seed=5)
    assert found.keys() == base.slots.targets.keys()
    torch.testing.assert_close(predictions_too, predictions(base, noisy, at, prompt), rtol=1e-12, atol=1e-14)
    generator, expected = torch.Generator().manual_seed(5), 0.0
    for i in range(2):
        changes: list[Tensor] = []

        def add_nothing(_: object, __: object, y: Tensor, changes: list[Tensor] = changes) -> Tensor:
            changes.append(torch.zeros_like(y).requires_grad_())
            return y + changes[0]

        hook = layer.register_forward_hook(add_nothing)
        predicted = base.predict_noise(noisy[i : i + 1], at[i : i + 1], prompt)
        hook.remove()
        z = torch.randn(predicted.shape, generator=generator).double()
        gradient = torch.autograd.grad(predicted, changes[0], z)[0]  # Jᵀz
        expected += gradient.square().sum().item() / predicted.numel() / gradient.shape[-1] / 2
    assert found[path] == pytest.approx(expected, rel=1e-9)


def test_what_is_not_asked_for_is_not_recorded(base: Base) -> None:
    lora = random_lora(base.slots, 2)
    plain, inputs = (
        calibrate(base, lora, "a dog", PICTURES, dataclasses.replace(SETTINGS, moments=moments))
        for moments in ("none", "inputs")
    )
    assert plain.moments is plain.output_weights is inputs.output_weights is None
    assert inputs.moments is not None
    assert inputs.n_bytes - plain.n_bytes == sum(moment.nbytes for moment in inputs.moments.values())
    assert torch.equal(plain.target, inputs.target)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in base.slots.layers.values())


# Files


def test_a_file_gives_back_what_was_written(base: Base, calibration: Calibration) -> None:
    content = write_calibration(calibration)
    assert content == write_calibration(calibration)
    read = read_calibration(content, base)
    assert (read.prompt, read.source, read.output_weights) == ("a dog", "images", calibration.output_weights)
    for name in ("noisy", "timesteps", "target"):
        assert torch.equal(getattr(read, name), getattr(calibration, name))
    assert torch.equal(read.conditioning.embeds, calibration.conditioning.embeds)
    assert (read.conditioning.pooled is None) == (calibration.conditioning.pooled is None)
    assert calibration.moments is not None
    assert read.moments is not None
    assert read.moments.keys() == calibration.moments.keys()
    for name, moment in calibration.moments.items():
        torch.testing.assert_close(read.moments[name].diagonal(), moment.diagonal(), rtol=2e-3, atol=1e-12)
    plain = dataclasses.replace(calibration, moments=None, output_weights=None)
    assert read_calibration(write_calibration(plain), base).moments is None


def test_compact_moments_keep_within_their_bytes_and_keep_what_counts() -> None:
    """Spectra that fall like those of trained models; a flat one gets less."""
    generator = torch.Generator().manual_seed(0)
    moments = {}
    for name, decay in (("steep", 0.5), ("falling", 0.85), ("flat", 1.0)):
        x = torch.randn(400, 64, generator=generator) * decay ** torch.arange(64)
        turned = x @ torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
        moments[name] = turned.mT @ turned / 400
    stored = compact(moments)
    assert sum(factor.numel() for factor, _, _ in stored.values()) <= STORED_SHARE * 3 * 64**2
    for name, moment in moments.items():
        again = restored(stored[name])
        assert torch.linalg.eigvalsh(again.double())[0] > -1e-6
        torch.testing.assert_close(again.diagonal(), moment.diagonal(), rtol=2e-3, atol=1e-6)
        if name != "flat":
            assert (again - moment).norm() < 0.06 * moment.norm(), name
    assert compact({}) == {}
    for nothing in (torch.zeros(8, 8), torch.eye(8)[:1].T @ torch.eye(8)[:1]):
        torch.testing.assert_close(restored(compact({"x": nothing})["x"]), nothing, rtol=1e-3, atol=1e-6)


def test_the_target_of_256_mb_at_the_size_of_sdxl() -> None:
    """By arithmetic: 240 moments of width 1280, 40 of 640, one of 2048; 32 draws at 1024 pixels in bf16."""
    widths = [1280] * 240 + [640] * 40 + [2048]
    factors = 2 * STORED_SHARE * sum(width**2 for width in widths)
    draws = 32 * 2 * 4 * 128**2 * 2
    assert 4 * sum(width**2 for width in widths) == pytest.approx(1655e6, rel=1e-3)
    assert factors + 4 * sum(widths) + draws < 256e6


def test_other_bytes_are_refused(base: Base, calibration: Calibration) -> None:
    content = write_calibration(dataclasses.replace(calibration, moments=None))
    other = content.replace(b'\\"version\\": 2', b'\\"version\\": 9')
    assert other != content
    with pytest.raises(FormatError, match="is of version 9, this one reads 2: calibrate again"):
        read_calibration(other, base)
    for broken in (b"", content[:100], content[:-8]):
        with pytest.raises(FormatError, match=r"x\.safetensors is no calibration"):
            read_calibration(broken, base, "x.safetensors")


def test_the_key_changes_with_everything_that_decides() -> None:
    known = ("lora", 1.0, "a dog", ("a", "b"), SETTINGS, "base", torch.float32)
    others = ("l", 0.5, "a cat", ("b", "a"), dataclasses.replace(SETTINGS, moments="inputs"), "b", torch.bfloat16)
    keys = {calibration_key(*known)}  # type: ignore[arg-type]
    for i, other in enumerate(others):
        keys.add(calibration_key(*known[:i], other, *known[i + 1 :]))  # type: ignore[arg-type]
    assert len(keys) == 8
    assert calibration_key(*known) in keys  # type: ignore[arg-type]
    assert all(len(key) == 64 for key in keys)
