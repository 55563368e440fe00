"""All that a merge needs to know of one LoRA: fixed draws of (image, noise, timestep), what the LoRA alone predicts on
them, and on request second moments of what its layers read meanwhile.

Both reconstruction terms of ZipLoRA's Eq. 3 (arXiv 2311.13600v2) compare the merged model with ε(L; x, p), the
prediction of one LoRA on its own noised images and its own prompt. That prediction does not depend on the partner.
So it is computed once per LoRA, and an S×T grid needs S + T teachers instead of 2·S·T. With as many draws as the
optimisation takes steps, every step still sees a fresh draw: nothing is approximated. The closed forms need no
prediction but the moments (`ziplora.moments`), recorded in the same passes.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from ziplora.base import Base, Conditioning
from ziplora.calibration_settings import SELF_GUIDANCE, SELF_IMAGES, SELF_STEPS, CalibrationSettings
from ziplora.lora import LoRA, digest
from ziplora.moments import recorded, total_bytes, weigh_outputs
from ziplora.sample import sample_latents

TEACHER_ROWS = 4  # predictions per forward pass
WEIGHT_ROWS = 6  # draws that output weights are averaged over; 8 gain 1 % (tests/bench/results/draws.json)

Source = Literal["images", "self-generated"]


@dataclass(frozen=True, slots=True)
class Calibration:
    """`noisy` and `target` [draws, c, h, w], `timesteps` [draws]; `conditioning` is the one encoded prompt, by the
    LoRA's own text encoders. `moments` [in, in] by name of the input and `output_weights` by path, if they were asked
    for: see `ziplora.moments`."""

    prompt: str
    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    conditioning: Conditioning
    source: Source
    moments: Mapping[str, Tensor] | None = None
    output_weights: Mapping[str, float] | None = None

    @property
    def n_bytes(self) -> int:
        tensors = (self.noisy, self.timesteps, self.target, self.conditioning.embeds, self.conditioning.pooled)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None) + total_bytes(self.moments)


def calibrate(
    base: Base,
    lora: LoRA,
    prompt: str,
    images: Sequence[Image.Image],
    settings: CalibrationSettings,
    lora_digest: str | None = None,
) -> Calibration:
    """Observe `lora` on its own prompt. Without images, latents that the LoRA itself generates take their place.

    The model of a LoRA's own samples is the LoRA, so they cover what the teacher can do, but not how its training
    images were framed.
    """
    side = settings.size or base.default_size
    seed = settings.seed
    if settings.noise == "separate":
        seed = derived_seed(seed, lora_digest or digest(lora))
    with torch.no_grad(), base.slots.loaded([[lora]]):
        conditioning = base.encode_prompts([prompt])
        if images:
            latents, source = base.encode_images(images, side, side), "images"
        else:
            seeds = [derived_seed(seed, f"image {i}") for i in range(SELF_IMAGES)]
            latents = sample_latents(base, [prompt] * SELF_IMAGES, seeds, SELF_STEPS, SELF_GUIDANCE, side, side)
            source = "self-generated"
        index, noise, timesteps = draw(len(latents), latents.shape[1:], base.n_timesteps, settings.draws, seed)
        clean = latents[index.to(latents.device)]
        noisy = base.add_noise(clean, noise.to(clean), timesteps)
        n = WEIGHT_ROWS if settings.moments == "inputs+outputs" else 0
        weights, targets = None, []
        with recorded(base.slots) if settings.moments != "none" else nullcontext() as moments:
            if n:
                z_seed = derived_seed(seed, "output weights")
                weights, first = weigh_outputs(base, noisy[:n], timesteps[:n], conditioning, z_seed)
                targets.append(first)
            if len(noisy) > n:
                targets.append(predictions(base, noisy[n:], timesteps[n:], conditioning))
        target = torch.cat(targets)
    return Calibration(prompt, noisy, timesteps, target, conditioning, source, moments, weights)  # type: ignore[arg-type]


@torch.no_grad()
def predictions(base: Base, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """ε of the model as it is, for every draw under the one prompt, a few rows at a time; like noisy."""
    parts = zip(noisy.split(TEACHER_ROWS), timesteps.split(TEACHER_ROWS), strict=True)
    return torch.cat([base.predict_noise(some, at, conditioning.repeat(len(some))) for some, at in parts])


def draw(
    n_images: int, shape: Sequence[int], n_timesteps: int, n_draws: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Image indices [draws], standard normal noise [draws, *shape] and timesteps [draws] uniform over the training
    schedule.

    Images go round in order so that few draws still use all of them. On the CPU: the same draws on every machine.
    """
    generator = torch.Generator().manual_seed(seed)
    timesteps = torch.randint(0, n_timesteps, (n_draws,), generator=generator)
    noise = torch.randn(n_draws, *shape, generator=generator)
    return torch.arange(n_draws) % n_images, noise, timesteps


def derived_seed(seed: int, name: str) -> int:
    """A seed for `name` that depends on nothing else: neither on the order of work nor on which worker does it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
