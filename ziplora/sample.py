"""Images from a base and whatever LoRAs its slots hold."""

from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor

from ziplora.base import Base

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


def sample_images(
    base: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 50,
    guidance: float = 5.0,
    width: int | None = None,
    height: int | None = None,
    negative: str = "",
    scheduler: str | None = None,
) -> list[Image.Image]:
    """One picture per (prompt, seed), in order, with the LoRAs that are in the slots (text encoders included).

    Each picture is sampled by itself, from noise made on the CPU, so that it does not depend on its neighbours.
    """
    return [
        _run(base, prompt, seed, steps, guidance, width, height, negative, scheduler, "pil")[0]
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]


def sample_latents(
    base: Base, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float, width: int, height: int
) -> Tensor:
    """Scaled latents [prompts, c, h, w] instead of pictures: nothing passes through the VAE."""
    latents = [
        _run(base, prompt, seed, steps, guidance, width, height, "", None, "latent")
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    return torch.cat(latents)


def _run(
    base: Base,
    prompt: str,
    seed: int,
    steps: int,
    guidance: float,
    width: int | None,
    height: int | None,
    negative: str,
    scheduler: str | None,
    output_type: str,
) -> Any:
    pipeline = base.pipeline
    own = pipeline.scheduler
    # a fresh scheduler every time: some carry state from one run into the next
    pipeline.scheduler = make_scheduler(scheduler, own)
    try:
        return pipeline(
            prompt=prompt,
            negative_prompt=negative or None,  # none at all is zeros for SDXL; an empty text is something else
            num_inference_steps=steps,
            guidance_scale=guidance,
            width=width,
            height=height,
            generator=torch.Generator().manual_seed(seed),
            output_type=output_type,
        ).images
    finally:
        pipeline.scheduler = own


def make_scheduler(name: str | None, own: Any) -> Any:
    """The scheduler called `name` in SCHEDULERS, or a fresh one of the base's own kind, on the base's noise
    schedule."""
    if name is None:
        return type(own).from_config(own.config)
    kind, options = SCHEDULERS[name]
    return getattr(diffusers, kind).from_config(own.config, **options)
