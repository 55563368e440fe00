"""Train the miniature's judges on rendered truth, the new shapes and styles included:

- `recogniser`: a ResNet that names the shape and the style of a picture; every "recognised" rate comes from it;
- `clip`: a CLIP, contrastively on captions; for style alignment (CLIP-I) and text alignment (CLIP-T);
- `dino`: a ResNet whose pooled features say which shape, whatever the style; for subject alignment, in DINO's place.

    python -m ziplora.pocket.train_scorers --out DIR
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)

from ziplora.pocket import models, world
from ziplora.pocket.pace import learning_rate
from ziplora.pocket.pool import Pool, read_pool, write_pool
from ziplora.pocket.recognise import SHAPE_NAMES, STYLE_NAMES

log = logging.getLogger(__name__)


def scorer_example(rng: np.random.Generator) -> tuple[world.Scene, str]:
    """Like `world.training_example`, with every shape and named style; new shapes photographed in their own colours."""
    shape = str(rng.choice(tuple(world.SHAPES)))
    first, second = (str(c) for c in rng.choice(tuple(world.COLOURS), 2, replace=False))
    if shape in world.SUBJECT_COLOURS and rng.random() < 0.6:
        first, second = world.SUBJECT_COLOURS[shape]
    extra = str(rng.choice(world.EXTRAS)) if rng.random() < 0.25 else None
    kind = rng.random()
    style = None if kind < 0.25 else world.STYLES[str(rng.choice(tuple(world.STYLES)))]
    if kind > 0.9:
        style = world.random_style(rng)
    scene = world.Scene(shape, style, (first, second), extra)
    return scene, world.caption(scene)


def augment(pixels: np.ndarray, generator: torch.Generator) -> Tensor:
    """uint8 [n, h, w, 3] → float [n, 3, h, w] in -1..1, some blurred and all a little noisy, as generated pictures
    are."""
    x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    amount = (torch.rand(len(x), 1, 1, 1, generator=generator) * 1.4 - 0.5).clamp(0, 0.9)
    shift = torch.randn(len(x), 3, 1, 1, generator=generator) * 0.03
    noise = torch.randn(x.shape, generator=generator) * 0.04
    return x + amount * (soft - x) + shift + noise


def fit(
    model: nn.Module,
    loss: Callable[[Tensor, np.ndarray], Tensor],
    pool: Pool,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    name: str,
) -> float:
    """AdamW with a cosine; returns the mean loss of the last 100 steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    recent: list[float] = []
    started = time.monotonic()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(lr, step, step / steps, warmup_steps=100, floor=0.01)
        rows = torch.randint(len(pool.pixels), (batch,), generator=generator).numpy()
        value = loss(augment(pool.pixels[rows], generator), rows)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(value.item())
        if (step + 1) % 100 == 0:
            log.info("%s %d loss %.4f %.0f s", name, step + 1, np.mean(recent[-100:]), time.monotonic() - started)
    model.eval()
    return float(np.mean(recent[-100:]))


def recogniser(pool: Pool, folder: Path, *, steps: int = 1500) -> float:
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[48, 96, 160],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=len(SHAPE_NAMES) + len(STYLE_NAMES),
    )
    model = ResNetForImageClassification(config)
    shapes, styles = torch.from_numpy(pool.shapes), torch.from_numpy(pool.styles) + 1  # photo is style 0
    n_shapes = len(SHAPE_NAMES)

    def loss(x: Tensor, rows: np.ndarray) -> Tensor:
        logits = model(x).logits
        named = torch.where(styles[rows] < 0, -100, styles[rows])
        return F.cross_entropy(logits[:, :n_shapes], shapes[rows]) + F.cross_entropy(
            logits[:, n_shapes:], named, ignore_index=-100
        )

    final = fit(model, loss, pool, steps=steps, batch=64, lr=2e-3, seed=1, name="recogniser")
    model.half().save_pretrained(folder / "recogniser")
    return final


def clip(pool: Pool, folder: Path, *, steps: int = 1500) -> float:
    tokens = models.tokenizer(folder / "clip")
    text = CLIPTextConfig(
        **{**models.text_config(len(tokens), activation="quick_gelu").to_dict(), "projection_dim": 64}
    )
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=world.SIZE,
        patch_size=6,
        projection_dim=64,
    )
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64))
    ids = tokens(
        list(pool.captions), padding="max_length", max_length=models.N_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids

    def loss(x: Tensor, rows: np.ndarray) -> Tensor:
        logits = model(input_ids=ids[rows], pixel_values=x).logits_per_image
        same = (ids[rows][:, None] == ids[rows][None]).all(-1).float()  # equal captions are no negatives of each other
        target = same / same.sum(1, keepdim=True)
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))

    final = fit(model, loss, pool, steps=steps, batch=96, lr=2e-3, seed=2, name="clip")
    model.half().save_pretrained(folder / "clip")
    tokens.save_pretrained(folder / "clip")
    processor(CLIPImageProcessorPil).save_pretrained(folder / "clip")
    return final


def dino(pool: Pool, folder: Path, *, steps: int = 1500) -> float:
    """Cosine softmax over shapes on pooled features. A ViT of this size does not find shapes in so few pictures; a
    ResNet does."""
    config = ResNetConfig(embedding_size=32, hidden_sizes=[48, 96, 128], depths=[1, 1, 1], layer_type="basic")
    model = ResNetModel(config)
    both = nn.ModuleDict({"dino": model})
    prototypes = nn.Parameter(torch.randn(len(SHAPE_NAMES), config.hidden_sizes[-1]))
    both.register_parameter("prototypes", prototypes)
    shapes = torch.from_numpy(pool.shapes)

    def loss(x: Tensor, rows: np.ndarray) -> Tensor:
        features = F.normalize(model(pixel_values=x).pooler_output.flatten(1), dim=-1)
        return F.cross_entropy(16 * features @ F.normalize(prototypes, dim=-1).T, shapes[rows])

    final = fit(both, loss, pool, steps=steps, batch=64, lr=2e-3, seed=3, name="dino")
    model.half().save_pretrained(folder / "dino")
    processor(CLIPImageProcessorPil).save_pretrained(folder / "dino")
    return final


def processor(kind: type) -> Any:
    """Pictures already have the model's size: only rescaling to -1..1 is left."""
    size = {"height": world.SIZE, "width": world.SIZE}
    return kind(
        do_resize=True,
        size=size,
        do_center_crop=False,
        do_normalize=True,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=60_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", choices=["recogniser", "clip", "dino"])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    out: Path = arguments.out
    if not (out / "scorer_pool" / "captions.json").exists():
        write_pool(out / "scorer_pool", arguments.pictures, seed=1, workers=arguments.workers, example=scorer_example)
    pool = read_pool(out / "scorer_pool")
    for name, train in (("recogniser", recogniser), ("clip", clip), ("dino", dino)):
        if arguments.only in (None, name):
            final = train(pool, out)
            (out / name / "training.json").write_text(json.dumps({"pictures": len(pool.pixels), "final_loss": final}))


if __name__ == "__main__":
    main()
