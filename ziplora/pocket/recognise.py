"""What does a picture of the world show? A small ResNet trained on rendered truth names its shape and its style."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import ResNetForImageClassification

from ziplora.pocket import world

SHAPE_NAMES = tuple(world.SHAPES)
STYLE_NAMES = ("photo", *world.STYLES)


@dataclass(frozen=True, slots=True)
class Seen:
    """Log probabilities: `shape` [n, len(SHAPE_NAMES)], `style` [n, len(STYLE_NAMES)]."""

    shape: Tensor
    style: Tensor

    def shapes(self) -> list[str]:
        return [SHAPE_NAMES[i] for i in self.shape.argmax(1).tolist()]

    def styles(self) -> list[str]:
        return [STYLE_NAMES[i] for i in self.style.argmax(1).tolist()]


class Recogniser:
    def __init__(self, folder: Path) -> None:
        self.model = ResNetForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def look(self, images: Sequence[Image.Image | np.ndarray], *, batch: int = 64) -> Seen:
        """`images`: RGB, resized to the world's size where needed."""
        logits = torch.cat([self.model(_pixels(images[i : i + batch])).logits for i in range(0, len(images), batch)])
        n = len(SHAPE_NAMES)
        return Seen(logits[:, :n].log_softmax(1), logits[:, n:].log_softmax(1))


def _pixels(images: Sequence[Image.Image | np.ndarray]) -> Tensor:
    arrays = []
    for image in images:
        picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image.convert("RGB")
        if picture.size != (world.SIZE, world.SIZE):
            picture = picture.resize((world.SIZE, world.SIZE), Image.Resampling.LANCZOS)
        arrays.append(np.asarray(picture))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
