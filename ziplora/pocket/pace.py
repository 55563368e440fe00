"""How the miniature's trainings go: a learning rate that warms up and falls, and a running average of the weights."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def learning_rate(lr: float, step: int, progress: float, *, warmup_steps: int, floor: float) -> float:
    """Linear over the first steps, then half a cosine down to `floor`, a share of `lr`. progress: 0 to 1."""
    warm = min(1.0, (step + 1) / warmup_steps)
    return lr * warm * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


@torch.no_grad()
def follow(averages: Iterable[Tensor], values: Iterable[Tensor], step: int, ema: float) -> None:
    """One step of an exponential moving average with decay `ema`, in place; with less of it during the first steps."""
    torch._foreach_lerp_(list(averages), list(values), 1 - min(ema, (1 + step) / (10 + step)))
