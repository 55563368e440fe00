"""SDXL with seeded random weights, of true size or scaled down, and random LoRAs for it. Nothing is downloaded."""

from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.tiny import text_config, tokenizers
from ziplora.lora import Layer, LoRA
from ziplora.pocket.models import pipeline
from ziplora.slots import Slots

SDXL_UNET: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# A fifth of every width with heads of the same size, and as many layers: 560 merge targets like the true one.
SCALED_UNET = SDXL_UNET | {
    "block_out_channels": (64, 128, 256),
    "attention_head_dim": (1, 2, 4),
    "cross_attention_dim": 384,
    "addition_time_embed_dim": 64,
    "projection_class_embeddings_input_dim": 6 * 64 + 256,
}
# width and layers of both text encoders, widths of the autoencoder
PARTS: dict[str, tuple[tuple[int, int], tuple[int, int], tuple[int, ...]]] = {
    "true": ((768, 12), (1280, 32), (128, 256, 512, 512)),
    "scaled": ((128, 2), (256, 4), (32, 64, 64, 64)),
}


def random_unet(device: str, dtype: torch.dtype, size: str = "true") -> UNet2DConditionModel:
    """SDXL's UNet with seeded random weights, made in place: 2,567,463,684 parameters at true size."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=128, **(SDXL_UNET if size == "true" else SCALED_UNET))
    unet = unet.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5 / parameter[0].numel() ** 0.5, generator=generator)
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return unet.requires_grad_(False).eval()


def random_pipeline(device: str, dtype: torch.dtype, size: str = "true") -> StableDiffusionXLPipeline:
    """The whole of SDXL: UNet, both text encoders (their vocabulary is a small one), autoencoder, Euler scheduler."""
    (width, layers), (width_2, layers_2), vae_widths = PARTS[size]
    with torch.random.fork_rng(devices=[0] if device == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=vae_widths,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=1024,
            scaling_factor=0.13025,
        )
        text_encoder = CLIPTextModel(_text_config(width, layers, "quick_gelu"))
        text_encoder_2 = CLIPTextModelWithProjection(_text_config(width_2, layers_2, "gelu"))
    for model in (vae, text_encoder, text_encoder_2):
        torch.nn.Module.to(model, dtype).requires_grad_(False).eval()
    encoders = {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    made = pipeline({"unet": random_unet(device, dtype, size), "vae": vae, **encoders, **tokenizers()})
    assert isinstance(made, StableDiffusionXLPipeline)
    return made


def _text_config(width: int, layers: int, activation: str) -> CLIPTextConfig:
    return text_config(activation, width, layers, heads=width // 64, intermediate=4 * width)


def random_lora(slots: Slots, rank: int, seed: int, dtype: torch.dtype = torch.float16) -> LoRA:
    """On every merge target, in host memory as if read from a file."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path in slots.targets:
        n_out, n_in = slots.layers[path].weight.shape
        down = torch.randn(rank, n_in, generator=generator) / n_in**0.5
        up = torch.randn(n_out, rank, generator=generator) * 0.05
        layers[path] = Layer(down.to(dtype), up.to(dtype))
    return LoRA(layers)
