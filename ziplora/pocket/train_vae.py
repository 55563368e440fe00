"""The miniature's autoencoder: 48×48×3 pictures ↔ 12×12×4 latents, trained on the pool.

Stage one trains encoder and decoder together. Then each latent channel is brought to mean 0 and deviation 1 by
folding an affine map into `quant_conv` and `post_quant_conv`, so the pipeline's scaling factor is 1. Stage two
(`--decoder-only`) polishes the decoder while the latents stay as they are.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from ziplora.pocket import models
from ziplora.pocket.pace import learning_rate
from ziplora.pocket.pool import read_pool

log = logging.getLogger(__name__)


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [n, h, w, 3] → float [n, 3, h, w] in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train(
    vae: AutoencoderKL, pixels: np.ndarray, *, steps: int, batch: int, lr: float, seed: int, kl_weight: float = 1e-7
) -> float:
    """Minimise |x̂ − x| + 2(x̂ − x)² + kl_weight·KL. Returns the mean absolute error of the last 100 steps."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    errors: list[float] = []
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(lr, step, step / steps, warmup_steps=50, floor=0.02)
        x = to_tensor(pixels[torch.randint(len(pixels), (batch,), generator=generator).numpy()])
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample(generator)).sample - x
        loss = error.abs().mean() + 2 * error.square().mean() + kl_weight * posterior.kl().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        errors.append(error.detach().abs().mean().item())
        if (step + 1) % 100 == 0:
            log.info(
                "vae step %d mae %.4f std %.3f %.0f s",
                step + 1,
                np.mean(errors[-100:]),
                posterior.std.mean().item(),
                time.monotonic() - started,
            )
    return float(np.mean(errors[-100:]))


@torch.no_grad()
def sharpen(vae: AutoencoderKL) -> None:
    """Start every channel's posterior at deviation e⁻³: a wide one is noise, and the decoder learns to ignore its
    channel."""
    assert vae.quant_conv is not None
    n = vae.config.latent_channels
    vae.quant_conv.weight[n:] = 0
    vae.quant_conv.bias[n:] = -6.0


@torch.no_grad()
def standardise(vae: AutoencoderKL, pixels: np.ndarray) -> None:
    """Give every latent channel mean 0 and deviation 1 over `pixels`, leaving decode(encode(x)) as it was."""
    z = torch.cat([vae.encode(to_tensor(pixels[i : i + 250])).latent_dist.mode() for i in range(0, len(pixels), 250)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    assert vae.quant_conv is not None
    assert vae.post_quant_conv is not None
    n = len(mean)
    vae.quant_conv.weight[:n] /= std[:, None, None, None]
    vae.quant_conv.bias[:n] = (vae.quant_conv.bias[:n] - mean) / std
    vae.quant_conv.bias[n:] -= 2 * std.log()
    weight = vae.post_quant_conv.weight
    vae.post_quant_conv.bias += torch.einsum("oiyx,i->o", weight, mean)
    weight *= std[None, :, None, None]


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pixels: np.ndarray) -> torch.Tensor:
    """Latent means, fp16 [n, 4, SIZE/4, SIZE/4]."""
    return torch.cat(
        [vae.encode(to_tensor(pixels[i : i + 250])).latent_dist.mode().half() for i in range(0, len(pixels), 250)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="working directory; reads out/pool, writes out/vae")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--go-on", action="store_true", help="start from out/vae")
    parser.add_argument("--decoder-only", action="store_true", help="keep the encoder and so the latents")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    pixels = read_pool(arguments.out / "pool").pixels
    vae = AutoencoderKL.from_pretrained(arguments.out / "vae") if arguments.go_on else models.vae()
    if not arguments.decoder_only:
        sharpen(vae)
    if arguments.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    train(vae, pixels, steps=arguments.steps, batch=arguments.batch, lr=arguments.lr, seed=arguments.seed)
    if not arguments.decoder_only:
        standardise(vae, pixels[:4000])
    vae.save_pretrained(arguments.out / "vae")


if __name__ == "__main__":
    main()
