"""A miniature of SD 1.5 that starts from what the miniature of SDXL has learned: a tenth of the training does then.

Both have the same levels of 32, 64 and 128 channels; SD 1.5 adds attention to the first level and a fourth level below
the third, where SDXL has its middle. So SDXL's blocks are SD 1.5's, the last three of the way up one place later:

    SDXL    down 0 1 2 ·   mid   up · 0 1 2
    SD 1.5  down 0 1 2 3   mid   up 0 1 2 3

What has no counterpart starts as it is built. Of SDXL's two text encoders the first is taken; SDXL reads it before its
last layer, so that layer starts as the identity.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ziplora.pocket.models import TEXT_WIDTH


@torch.no_grad()
def warm_start(parts: dict[str, Any], sdxl: Path) -> float:
    """Copy what the SD 1.5 miniature `parts` has in common with the SDXL miniature in `sdxl`. Returns the share of
    the UNet's values that were copied."""
    source = DiffusionPipeline.from_pretrained(sdxl, dtype=torch.float32)
    unet = parts["unet"].state_dict()
    copied = {name: value for name, value in map(_moved, source.unet.state_dict().items()) if _fits(unet, name, value)}
    _add_constant(copied, source)
    parts["unet"].load_state_dict(copied, strict=False)
    _silence_first_level(parts["unet"])
    parts["text_encoder"].load_state_dict(source.text_encoder.state_dict())
    last = parts["text_encoder"].encoder.layers[-1]
    for linear in (last.self_attn.out_proj, last.mlp.fc2):
        linear.weight.zero_()
        linear.bias.zero_()
    return sum(value.numel() for value in copied.values()) / sum(value.numel() for value in unet.values())


def _moved(entry: tuple[str, Tensor]) -> tuple[str, Tensor]:
    name, value = entry
    name = re.sub(r"^up_blocks\.(\d)", lambda found: f"up_blocks.{int(found[1]) + 1}", name)
    if re.search(r"\.proj_(in|out)\.weight$", name):
        return name, value[:, :, None, None]  # SD 1.5's are convolutions
    if ".attn2.to_k" in name or ".attn2.to_v" in name:
        return name, value[:, :TEXT_WIDTH]  # the first encoder's part of the text
    return name, value


def _fits(state: dict[str, Tensor], name: str, value: Tensor) -> bool:
    return name in state and state[name].shape == value.shape


def _add_constant(copied: dict[str, Tensor], source: Any) -> None:
    """SDXL adds an embedding of the pooled text and the sizes to that of the time; its mean over prompts stays."""
    prompts = ["", "a photo of a cat", "a star in poster style", "a car in stamp style"]
    pooled = source.encode_prompt(prompts, num_images_per_prompt=1, do_classifier_free_guidance=False)[2]
    side = float(source.unet.config.sample_size * source.vae_scale_factor)
    sizes = torch.tensor([[side, side, 0.0, 0.0, side, side]]).expand(len(prompts), -1)
    embedded = source.unet.add_time_proj(sizes.flatten()).reshape(len(prompts), -1)
    constant = source.unet.add_embedding(torch.cat([pooled, embedded], dim=-1)).mean(0)
    name = "time_embedding.linear_2.bias"
    copied[name] = copied[name] + constant


def _silence_first_level(unet: nn.Module) -> None:
    """Attention that SDXL lacks there adds nothing at first."""
    for name, module in unet.named_modules():
        if re.search(r"^(down_blocks\.0|up_blocks\.3)\..*proj_out$", name):
            module.weight.zero_()
            module.bias.zero_()
