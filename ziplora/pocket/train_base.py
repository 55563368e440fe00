"""Train the miniature: pool of pictures → autoencoder → UNet with its text encoders.

    python -m ziplora.pocket.train_base --out DIR
    python -m ziplora.pocket.train_base --out DIR --family sd15 --steps 3000 --batch 32 --lr 6e-4

SD 1.5 is trained on the autoencoder that is shipped, and starts from the miniature of SDXL (see warm_start.py) unless
`--from-nothing` is given.

Noise prediction on the 1000-step schedule of both, squared error weighted by min(SNR, 5)/SNR (Min-SNR, arXiv
2303.09556), an exponential moving average of the weights, cosine learning rate. One caption in ten is dropped: to the
empty prompt, or for SDXL to zero embeddings (what `force_zeros_for_empty_prompt` gives in sampling). Interrupted runs
continue from their last checkpoint.
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
from typing import Any, get_args

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from torch import Tensor, nn

from ziplora.pocket import models, path, train_vae, world
from ziplora.pocket.pace import follow, learning_rate
from ziplora.pocket.pool import read_pool, write_pool
from ziplora.pocket.warm_start import warm_start

log = logging.getLogger(__name__)
TRAINED = ("unet", "text_encoder", "text_encoder_2")


@dataclass(frozen=True, slots=True)
class Recipe:
    family: models.Family = "sdxl"
    pictures: int = 100_000
    vae_steps: int = 2750
    vae_batch: int = 16
    steps: int = 10_000
    batch: int = 48
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 200
    ema: float = 0.9995
    drop_to_zero: float = 0.03
    drop_to_empty: float = 0.07
    min_snr: float = 5.0
    seed: int = 0
    threads: int = 1
    warm: bool = False  # from the shipped miniature of SDXL


def token_ids(parts: dict[str, Any], captions: list[str]) -> Tensor:
    """[n, N_TOKENS]. Both tokenizers agree but for padding, which no earlier position attends to."""
    batch = parts["tokenizer"](
        captions, padding="max_length", max_length=models.N_TOKENS, truncation=True, return_tensors="pt"
    )
    return batch.input_ids


def padded_for_second(ids: Tensor, end: int) -> Tensor:
    """The second tokenizer's padding: "!" (token 0) after the first end token."""
    after = (ids == end).cumsum(dim=1) - (ids == end).int() > 0
    return ids.masked_fill(after, 0)


class Trainer:
    def __init__(self, recipe: Recipe, parts: dict[str, Any], latents: Tensor, ids: Tensor, empty: Tensor) -> None:
        self.recipe, self.parts, self.latents, self.ids, self.empty = recipe, parts, latents, ids, empty
        self.end = parts["tokenizer"].eos_token_id
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.model = nn.ModuleDict({name: parts[name] for name in TRAINED if name in parts})
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=recipe.weight_decay, foreach=True
        )
        self.alphas = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
        self.step = 0
        self.seconds = 0.0

    def loss(self) -> tuple[Tensor, float]:
        """(weighted loss to minimise, plain mean squared error)."""
        recipe, generator = self.recipe, self.generator
        rows = torch.randint(len(self.latents), (recipe.batch,), generator=generator)
        x = self.latents[rows].float()
        ids = self.ids[rows].clone()
        draw = torch.rand(recipe.batch, generator=generator)
        ids[draw < recipe.drop_to_empty] = self.empty
        kept = (draw < 1 - recipe.drop_to_zero).float()
        t = torch.randint(1000, (recipe.batch,), generator=generator)
        noise = torch.randn(x.shape, generator=generator)
        alpha = self.alphas[t].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
        hidden, added = self.conditions(ids, kept)
        predicted = self.model["unet"](noisy, t, hidden, added_cond_kwargs=added).sample
        errors = (predicted - noise).square().mean((1, 2, 3))
        snr = (alpha / (1 - alpha)).flatten()
        return (errors * snr.clamp(max=recipe.min_snr) / snr).mean(), errors.detach().mean().item()

    def conditions(self, ids: Tensor, kept: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        """What the UNet gets of captions `ids` [n, N_TOKENS]: hidden states, and for SDXL the rest by name. `kept` [n]:
        0 where SDXL gets zeros and SD 1.5, whose pipeline has none, the empty prompt."""
        if "text_encoder_2" not in self.model:
            ids = torch.where(kept[:, None] > 0, ids, self.empty)
            return self.model["text_encoder"](ids).last_hidden_state, None
        a = self.model["text_encoder"](ids, output_hidden_states=True)
        b = self.model["text_encoder_2"](padded_for_second(ids, self.end), output_hidden_states=True)
        hidden = torch.cat([a.hidden_states[-2], b.hidden_states[-2]], dim=-1) * kept[:, None, None]
        size = float(world.SIZE)
        return hidden, {
            "text_embeds": b[0] * kept[:, None],
            "time_ids": torch.tensor([[size, size, 0.0, 0.0, size, size]]).expand(len(ids), -1),
        }

    def update(self, progress: float) -> float:
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe.lr, self.step, progress, warmup_steps=recipe.warmup_steps, floor=0.01)
        loss, plain = self.loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        follow(self.average.parameters(), self.model.parameters(), self.step, recipe.ema)
        return plain

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self, out: Path) -> None:
        """The averaged weights as a pipeline under out/base, and everything needed to continue in out/state.pt."""
        models.pipeline({**self.parts, **dict(self.average.items())}).save_pretrained(out / "base")
        torch.save(self.state(), out / "state.tmp")
        os.replace(out / "state.tmp", out / "state.pt")


def prepare(out: Path, recipe: Recipe, workers: int, shipped: Path | None = None) -> AutoencoderKL:
    """The pool and the autoencoder, made when they are not there yet; or the autoencoder in `shipped`, as fp32."""
    if not (out / "pool" / "captions.json").exists():
        write_pool(out / "pool", recipe.pictures, seed=recipe.seed, workers=workers)
    if shipped is not None:
        AutoencoderKL.from_pretrained(shipped, dtype=torch.float32).save_pretrained(out / "vae")
    elif not (out / "vae" / "config.json").exists():
        vae = models.vae()
        train_vae.sharpen(vae)
        pixels = read_pool(out / "pool").pixels
        train_vae.train(vae, pixels, steps=recipe.vae_steps, batch=recipe.vae_batch, lr=2e-3, seed=recipe.seed)
        train_vae.standardise(vae, pixels[:4000])
        vae.save_pretrained(out / "vae")
    return AutoencoderKL.from_pretrained(out / "vae")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="working directory: pool, vae, checkpoints, base")
    parser.add_argument("--family", choices=get_args(models.Family), default="sdxl")
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    parser.add_argument("--batch", type=int, default=Recipe().batch)
    parser.add_argument("--lr", type=float, default=Recipe().lr)
    parser.add_argument("--pictures", type=int, default=Recipe().pictures, help="of the pool; the first ones")
    parser.add_argument("--from-nothing", action="store_true", help="no start from the shipped miniature of SDXL")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="end the learning-rate schedule by then at the latest"
    )
    parser.add_argument(
        "--pause-after", type=float, default=math.inf, metavar="MINUTES", help="stop; the same command carries on"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that render")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    recipe = Recipe(
        arguments.family,
        arguments.pictures,
        steps=arguments.steps,
        batch=arguments.batch,
        lr=arguments.lr,
        warm=arguments.family == "sd15" and not arguments.from_nothing,
    )
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    out: Path = arguments.out
    vae = prepare(out, recipe, arguments.workers, path() / "vae" if recipe.family == "sd15" else None)
    parts = {**models.build(out, recipe.family), "vae": vae}
    if recipe.warm:
        log.info("%.0f %% of the UNet taken over", 100 * warm_start(parts, path()))
    pool = read_pool(out / "pool")
    captions = list(pool.captions[: recipe.pictures])
    if not (out / "latents.pt").exists():
        torch.save(train_vae.encode_all(vae, pool.pixels[: recipe.pictures]), out / "latents.pt")
    empty = token_ids(parts, [""])[0]
    trainer = Trainer(recipe, parts, torch.load(out / "latents.pt"), token_ids(parts, captions), empty)
    if (out / "state.pt").exists():
        trainer.restore(torch.load(out / "state.pt"))
    train(trainer, out, limit_s=arguments.minutes * 60, pause_s=arguments.pause_after * 60)


def train(
    trainer: Trainer,
    out: Path,
    *,
    limit_s: float,
    pause_s: float = math.inf,
    log_every: int = 100,
    save_every_s: float = 300,
) -> None:
    recipe = trainer.recipe
    before, started, saved = trainer.seconds, time.monotonic(), time.monotonic()
    losses: list[float] = []
    while True:
        progress = max(trainer.step / recipe.steps, trainer.seconds / limit_s)
        if progress >= 1:
            break
        losses.append(trainer.update(progress))
        trainer.seconds = before + time.monotonic() - started
        if trainer.step % log_every == 0:
            recent = float(np.mean(losses[-log_every:]))
            log.info("step %d loss %.4f progress %.3f %.0f s", trainer.step, recent, progress, trainer.seconds)
            with (out / "losses.jsonl").open("a") as lines:
                lines.write(
                    json.dumps({"step": trainer.step, "loss": recent, "seconds": round(trainer.seconds)}) + "\n"
                )
        if time.monotonic() - saved > save_every_s:
            trainer.save(out)
            saved = time.monotonic()
        if time.monotonic() - started > pause_s:
            break
    trainer.save(out)
    summary = {
        **asdict(recipe),
        "steps_done": trainer.step,
        "seconds": round(trainer.seconds),
        "loss_last_1000": float(np.mean(losses[-1000:])),
    }
    (out / "recipe.json").write_text(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
