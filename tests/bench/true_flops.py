"""FLOPs of SDXL at true size, 1024² pixels, rank 64, counted on the meta device: no weights, no GPU, no arithmetic."""

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from tests.bench.dense import DenseLinear, dense_step, installed
from tests.bench.measuring import flops
from tests.bench.models import SDXL_UNET
from ziplora.base import Base, Conditioning
from ziplora.lora import Layer, LoRA
from ziplora.slots import Slots

RANK, LATENT = 64, 128


def true_size_flops() -> dict[str, Any]:
    """Of a base pass, a teacher's, our step (both branches of one pair, forward and backward), the dense form's step
    and an encoded picture, which public code pays twice at every step."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=LATENT, **SDXL_UNET).bfloat16().requires_grad_(False)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        )
    base = Base(SimpleNamespace(unet=unet, vae_scale_factor=8), "sdxl", Slots({"unet": unet}), torch.zeros(1000))
    lora = LoRA(
        {
            path: Layer(_empty(RANK, n_in), _empty(base.slots.layers[path].weight.shape[0], RANK))
            for path, n_in in base.slots.targets.items()
        }
    )
    counted = {}
    with torch.no_grad():
        counted["base"] = flops(lambda: base.predict_noise(*_rows(1)))
        counted["encode"] = flops(lambda: vae.encode(_empty(1, 3, 8 * LATENT, 8 * LATENT)))
        with base.slots.loaded([[lora]]):
            counted["teacher"] = flops(lambda: base.predict_noise(*_rows(1)))
    with base.slots.loaded([[lora, lora]]):
        base.slots.attach_mergers()
        counted["ziplora"] = flops(lambda: base.predict_noise(*_rows(2)).float().square().mean().backward())
    base.slots.unload()
    layers = {
        path: DenseLinear(base.slots.layers[path], *(_like(base.slots.layers[path].weight) for _ in range(2)))  # type: ignore[arg-type]
        for path in base.slots.targets
    }
    with installed(base, layers):
        counted["dense"] = flops(lambda: dense_step(base, layers, _rows(1), _rows(1))(0))
    return {
        "flop": counted,
        "dense_over_ziplora": counted["dense"] / counted["ziplora"],
        "dense_and_encoding_over_ziplora": (counted["dense"] + 2 * counted["encode"]) / counted["ziplora"],
    }


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def _like(weight: Tensor) -> Tensor:
    return torch.empty_like(weight, requires_grad=False)


def _rows(n: int) -> tuple[Tensor, Tensor, Conditioning]:
    half = {"dtype": torch.bfloat16}
    prompt = Conditioning(_empty(n, 77, 2048, **half), _empty(n, 1280, **half))
    return _empty(n, 4, LATENT, LATENT, **half), _empty(n), prompt
