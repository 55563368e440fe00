"""How good is the miniature? Recognised rates of a base model, as the recogniser sees its samples.

python -m ziplora.pocket.check --base DIR --recogniser DIR [--sheet FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ziplora.base import load_base
from ziplora.pocket import world
from ziplora.pocket.recognise import Recogniser


@dataclass(frozen=True, slots=True)
class Rates:
    """Shares of `n` samples in which the shape, the style, or both were recognised."""

    shape: float
    style: float
    both: float
    n: int


def rates(recogniser: Recogniser, images: Sequence[Image.Image], scenes: Sequence[world.Scene]) -> Rates:
    """How often each image shows its scene's shape and style ("photo" where the scene has none)."""
    seen = recogniser.look(images)
    shape = np.array([a == scene.shape for a, scene in zip(seen.shapes(), scenes, strict=True)])
    wanted = ["photo" if scene.style is None else scene.style.name for scene in scenes]
    style = np.array([a == b for a, b in zip(seen.styles(), wanted, strict=True)])
    return Rates(float(shape.mean()), float(style.mean()), float((shape & style).mean()), len(images))


def combinations(kind: str, n: int, seed: int) -> list[world.Scene]:
    """`n` scenes: "trained" pairs of seen shapes and styles, "left out" pairs, or "photo"s in random colours."""
    rng = np.random.default_rng(seed)
    if kind == "photo":
        return [
            world.Scene(str(rng.choice(world.SEEN_SHAPES)), None, (str(a), str(b)))
            for a, b in (rng.choice(tuple(world.COLOURS), 2, replace=False) for _ in range(n))
        ]
    pairs = [
        (shape, style)
        for shape in world.SEEN_SHAPES
        for style in world.SEEN_STYLES
        if world.left_out(shape, style) == (kind == "left out")
    ]
    chosen = rng.choice(len(pairs), n, replace=False)
    return [world.Scene(pairs[i][0], world.STYLES[pairs[i][1]]) for i in chosen]


def sample(
    pipeline: DiffusionPipeline, prompts: Sequence[str], *, seed: int, steps: int = 20, guidance: float = 4.0
) -> list[Image.Image]:
    images: list[Image.Image] = []
    for start in range(0, len(prompts), 16):
        batch = list(prompts[start : start + 16])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        images += pipeline(batch, num_inference_steps=steps, guidance_scale=guidance, generator=generators).images
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--recogniser", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32, help="of each kind")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--sheet", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = load_base(arguments.base).pipeline
    recogniser = Recogniser(arguments.recogniser)
    rows: list[list[Image.Image]] = []
    for kind in ("photo", "trained", "left out"):
        scenes = combinations(kind, arguments.samples, seed=0)
        prompts = [world.caption(scene) for scene in scenes]
        images = sample(pipeline, prompts, seed=0, steps=arguments.steps, guidance=arguments.guidance)
        found = rates(recogniser, images, scenes)
        print(json.dumps({"kind": kind, "shape": found.shape, "style": found.style, "both": found.both, "n": found.n}))
        truth = [world.picture(scene, i) for i, scene in enumerate(scenes)]
        for start in range(0, min(len(images), 24), 12):
            rows += [truth[start : start + 12], images[start : start + 12]]
    if arguments.sheet:
        world.sheet(rows).save(arguments.sheet)


if __name__ == "__main__":
    main()
