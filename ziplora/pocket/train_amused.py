"""Train a miniature of aMUSEd on the pool, for StyleDrop (ziplora/styledrop.py); not shipped.

    python -m ziplora.pocket.train_amused --out DIR

DIR/pool is rendered when it is not there. Two parts come from the shipped miniature of SDXL, so that only the masked
transformer is learned from nothing: its second text encoder, frozen as aMUSEd's is, and its autoencoder, whose latents
get a codebook (k-means), after which both are tuned for a while through the quantisation. The transformer learns
`ziplora.masked.masked_loss`; one caption in ten is dropped to the empty prompt. Interrupted runs go on from their last
checkpoint. At the end the recognised rates are printed, as check.py's are.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AmusedPipeline, AmusedScheduler, AutoencoderKL, UVit2DModel, VQModel
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from ziplora.masked import MaskedBase, TextCondition, masked_loss, resident_masked
from ziplora.pocket import models, path, scorer, world
from ziplora.pocket.check import combinations, rates
from ziplora.pocket.pace import follow, learning_rate
from ziplora.pocket.pool import read_pool, write_pool
from ziplora.pocket.recognise import Recogniser
from ziplora.styledrop import sample_mixture
from ziplora.styledrop_knobs import Mixture

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    pictures: int = 40_000
    codes: int = 256
    vq_steps: int = 300
    vq_batch: int = 16
    vq_lr: float = 5e-4
    steps: int = 6000
    batch: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 100
    ema: float = 0.999
    drop: float = 0.1
    seed: int = 0


def in_unit_range(pixels: np.ndarray) -> Tensor:
    """uint8 [n, h, w, 3] → float [n, 3, h, w] in 0..1, aMUSEd's range."""
    return torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 255


# The autoencoder


@torch.no_grad()
def vq_model(vae: AutoencoderKL, codes: int) -> VQModel:
    """The shipped autoencoder in VQModel's form, its codebook still random: the posterior's mean is the latent, and
    pixels are 0..1 in place of -1..1. The decoder computes the same; the encoder pads with black now, not with grey."""
    config = vae.config
    vq = VQModel(
        down_block_types=config.down_block_types,
        up_block_types=config.up_block_types,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        num_vq_embeddings=codes,
        norm_num_groups=config.norm_num_groups,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    )
    n = config.latent_channels
    assert vae.quant_conv is not None
    encoder = vae.encoder.state_dict()
    mean, bias = vae.quant_conv.weight[:n, :, 0, 0], vae.quant_conv.bias[:n]
    encoder["conv_out.weight"] = torch.einsum("om,mihw->oihw", mean, encoder["conv_out.weight"])
    encoder["conv_out.bias"] = mean @ encoder["conv_out.bias"] + bias
    encoder["conv_in.bias"] = encoder["conv_in.bias"] - encoder["conv_in.weight"].sum((1, 2, 3))
    encoder["conv_in.weight"] = encoder["conv_in.weight"] * 2
    decoder = vae.decoder.state_dict()
    decoder["conv_out.weight"] = decoder["conv_out.weight"] / 2
    decoder["conv_out.bias"] = decoder["conv_out.bias"] / 2 + 0.5
    vq.encoder.load_state_dict(encoder)
    vq.decoder.load_state_dict(decoder)
    vq.quant_conv.weight.copy_(torch.eye(n)[:, :, None, None])
    vq.quant_conv.bias.zero_()
    vq.post_quant_conv.load_state_dict(vae.post_quant_conv.state_dict())
    return vq


@torch.no_grad()
def k_means(points: Tensor, n: int, generator: torch.Generator, *, rounds: int = 20) -> Tensor:
    """`n` centres [n, d] of `points` [m, d]: Lloyd's algorithm from centres that are drawn far apart (k-means++, Arthur
    and Vassilvitskii 2007). One that loses all its points takes a random one."""
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    squares = torch.cdist(points, centres)[:, 0].square()
    for _ in range(n - 1):
        new = points[torch.multinomial(squares, 1, generator=generator)]
        centres = torch.cat([centres, new])
        squares = torch.minimum(squares, torch.cdist(points, new)[:, 0].square())
    for _ in range(rounds):
        nearest = torch.cdist(points, centres).argmin(1)
        counts = torch.bincount(nearest, minlength=n)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        strays = points[torch.randint(len(points), (n,), generator=generator)]
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), strays)
    return centres


def train_vq(vq: VQModel, pixels: np.ndarray, recipe: Recipe) -> float:
    """A codebook from the latents of some pictures, then |x̂ − x| + 2(x̂ − x)² + commitment through the quantisation
    (arXiv 1711.00937, Eq. 3). Returns the mean absolute error of the last 50 steps, of 0..1."""
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.no_grad():
        latents = vq.encode(in_unit_range(pixels[:500])).latents
        points = latents.permute(0, 2, 3, 1).flatten(0, 2)
        vq.quantize.embedding.weight.copy_(k_means(points, recipe.codes, generator))
    optimizer = torch.optim.AdamW(vq.parameters(), lr=recipe.vq_lr, weight_decay=0)
    errors: list[float] = []
    for step in range(recipe.vq_steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.vq_lr * 0.5 * (1 + math.cos(math.pi * step / recipe.vq_steps))
        x = in_unit_range(pixels[torch.randint(len(pixels), (recipe.vq_batch,), generator=generator).numpy()])
        decoded, commitment = vq.decode(vq.encode(x).latents, return_dict=False)
        error = decoded - x
        optimizer.zero_grad(set_to_none=True)
        (error.abs().mean() + 2 * error.square().mean() + 0.25 * commitment).backward()
        nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        optimizer.step()
        errors.append(error.detach().abs().mean().item())
    return float(np.mean(errors[-50:]))


# The transformer


def transformer(codes: int) -> UVit2DModel:
    """aMUSEd's U-ViT, made small; the last of a few spare tokens is the mask's, as there."""
    return UVit2DModel(
        hidden_size=128,
        cond_embed_dim=models.TEXT_WIDTH,
        micro_cond_encode_dim=8,
        micro_cond_embed_dim=5 * 8,
        encoder_hidden_size=models.TEXT_WIDTH,
        vocab_size=codes + 8,
        codebook_size=codes,
        in_channels=64,
        block_out_channels=64,
        num_res_blocks=2,
        block_num_heads=4,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=256,
        sample_size=models.LATENT_SIZE,
    )


def build(vq: VQModel, recipe: Recipe, out: Path) -> MaskedBase:
    """The pipeline with an untrained transformer, and the shipped second text encoder."""
    encoder = CLIPTextModelWithProjection.from_pretrained(path() / "text_encoder_2", dtype=torch.float32)
    torch.manual_seed(recipe.seed)
    pipeline = AmusedPipeline(
        vqvae=vq,
        tokenizer=models.tokenizer(out / "tokenizer", pad="!"),
        text_encoder=encoder,
        transformer=transformer(recipe.codes),
        scheduler=AmusedScheduler(mask_token_id=recipe.codes + 7),
    )
    return resident_masked(pipeline)


class Trainer:
    def __init__(self, base: MaskedBase, tokens: Tensor, captions: list[str], recipe: Recipe) -> None:
        """`tokens` [n, h, w] and a caption of each."""
        self.base, self.tokens, self.captions, self.recipe = base, tokens, captions, recipe
        self.model = base.pipeline.transformer.requires_grad_(True)
        self.average = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=recipe.weight_decay
        )
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.step = 0

    def update(self) -> float:
        recipe = self.recipe
        progress = self.step / recipe.steps
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe.lr, self.step, progress, warmup_steps=recipe.warmup_steps, floor=0.02)
        rows = torch.randint(len(self.tokens), (recipe.batch,), generator=self.generator)
        kept = torch.rand(recipe.batch, generator=self.generator) >= recipe.drop
        captions = [self.captions[i] if keep else "" for i, keep in zip(rows.tolist(), kept.tolist(), strict=True)]
        text: TextCondition = self.base.encode_prompts(captions)
        loss = masked_loss(self.base, self.tokens[rows], text, self.generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        follow(self.average.values(), self.model.parameters(), self.step, recipe.ema)
        return loss.item()

    def save(self, out: Path) -> None:
        state = {"model": self.model.state_dict(), "average": self.average, "optimizer": self.optimizer.state_dict()}
        torch.save({**state, "generator": self.generator.get_state(), "step": self.step}, out / "state.tmp")
        os.replace(out / "state.tmp", out / "state.pt")

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]

    def finish(self, out: Path) -> None:
        """The averaged weights, as a pipeline in `out`/base."""
        averaged = copy.deepcopy(self.model.state_dict()) | self.average
        self.model.load_state_dict(averaged)
        self.base.pipeline.save_pretrained(out / "base")


def prepare(out: Path, recipe: Recipe) -> Trainer:
    if not (out / "pool" / "captions.json").exists():
        write_pool(out / "pool", recipe.pictures, seed=recipe.seed)
    pool = read_pool(out / "pool")
    pixels, captions = pool.pixels[: recipe.pictures], list(pool.captions[: recipe.pictures])
    if not (out / "vqvae" / "config.json").exists():
        vq = vq_model(AutoencoderKL.from_pretrained(path() / "vae", dtype=torch.float32), recipe.codes)
        log.info("autoencoder: mean absolute error %.4f", train_vq(vq, pixels, recipe))
        vq.save_pretrained(out / "vqvae")
    base = build(VQModel.from_pretrained(out / "vqvae"), recipe, out)
    if not (out / "tokens.pt").exists():
        torch.save(tokens_of(base, pixels), out / "tokens.pt")
    return Trainer(base, torch.load(out / "tokens.pt").long(), captions, recipe)


@torch.no_grad()
def tokens_of(base: MaskedBase, pixels: np.ndarray, batch: int = 100) -> Tensor:
    """int16 [n, grid, grid]."""
    vq, side = base.pipeline.vqvae, base.grid
    parts = []
    for start in range(0, len(pixels), batch):
        latents = vq.encode(in_unit_range(pixels[start : start + batch])).latents
        parts.append(vq.quantize(latents)[2][2].reshape(-1, side, side).short())
    return torch.cat(parts)


def recognised(base: MaskedBase, *, n: int = 32, guidance: float = 4.0) -> list[dict[str, Any]]:
    """check.py's rates, of this model's samples."""
    judge, found = Recogniser(scorer("recogniser")), []
    for kind in ("photo", "trained", "left out"):
        scenes = combinations(kind, n, seed=0)
        prompts = [world.caption(scene) for scene in scenes]
        weights = Mixture(0.0, 0.0, text=guidance - 1)
        images = list(sample_mixture(base, None, None, prompts, list(range(n)), weights))
        found.append({"kind": kind, **asdict(rates(judge, images, scenes))})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="working directory: pool, checkpoints, base")
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    parser.add_argument("--pictures", type=int, default=Recipe().pictures)
    parser.add_argument("--samples", type=int, default=32, help="of each kind, to be recognised")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    recipe = Recipe(steps=arguments.steps, pictures=arguments.pictures)
    out: Path = arguments.out
    trainer = prepare(out, recipe)
    if (out / "state.pt").exists():
        trainer.restore(torch.load(out / "state.pt"))
    started, losses = time.monotonic(), []
    while trainer.step < recipe.steps:
        losses.append(trainer.update())
        if trainer.step % 100 == 0:
            log.info("step %d loss %.4f %.0f s", trainer.step, np.mean(losses[-100:]), time.monotonic() - started)
        if trainer.step % 500 == 0:
            trainer.save(out)
    trainer.finish(out)
    found = recognised(trainer.base, n=arguments.samples)
    for row in found:
        print(json.dumps(row))
    (out / "recipe.json").write_text(json.dumps({**asdict(recipe), "recognised": found}, indent=1))


if __name__ == "__main__":
    main()
