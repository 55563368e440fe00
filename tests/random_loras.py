"""Random LoRAs for a base's slots: what tests of the mathematics need when no file is involved."""

import torch

from ziplora.lora import Layer, LoRA
from ziplora.slots import Slots


def random_lora(
    slots: Slots,
    rank: int = 4,
    seed: int = 0,
    scale: float = 0.3,
    dtype: torch.dtype = torch.float64,
    components: str = "targets",
    drop: int = 0,
) -> LoRA:
    """A LoRA on the merge targets, or on `all` slots; every `drop`-th layer is left out if drop > 0."""
    generator = torch.Generator().manual_seed(seed)
    paths = list(slots.targets) if components == "targets" else list(slots.layers)
    layers = {}
    for i, path in enumerate(paths):
        if drop and i % drop == 0:
            continue
        shape = slots.layers[path].weight.shape
        down = torch.randn(rank, *shape[1:], generator=generator, dtype=torch.float64) / shape[1:].numel() ** 0.5
        up = (
            torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator, dtype=torch.float64)
            * scale
            / rank**0.5
        )
        layers[path] = Layer(down.to(dtype), up.to(dtype))
    return LoRA(layers)
