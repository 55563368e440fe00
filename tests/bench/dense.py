"""The dense form of public ZipLoRA code, written here to compare with: ΔW_c and ΔW_s as matrices in every attention
layer, ΔW_c·diag(m_c) + ΔW_s·diag(m_s) built in every forward pass, and four passes per step: either LoRA alone without
gradient, and the merge on either's latents.

Kinder than what is published: matrices in the model's dtype and not always fp32, latents encoded once and not at every
step, one LoRA's pass without the other's matrix.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ziplora.base import Base, Conditioning
from ziplora.lora import LoRA, delta

Draws = tuple[Tensor, Tensor, Conditioning]  # noisy latents [n, c, h, w], timesteps [n], one encoded prompt


class DenseLinear(nn.Module):
    """What public code puts into every attention layer: two dense updates and their mergers."""

    def __init__(self, base: nn.Linear, subject: Tensor, style: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.mode = base.weight, base.bias, "both"
        self.subject, self.style = subject, style  # [out, in]
        self.mergers = nn.Parameter(torch.ones(2, base.in_features, dtype=torch.float32, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "both":
            m_subject, m_style = self.mergers.to(x.dtype)
            mixed = self.subject * m_subject + self.style * m_style
        else:
            mixed = self.subject if self.mode == "subject" else self.style
        return F.linear(x, self.weight, self.bias) + F.linear(x, mixed)


def dense_layers(base: Base, subject: LoRA, style: LoRA) -> dict[str, DenseLinear]:
    layers = {}
    for path in base.slots.targets:
        deltas = [delta(_float(lora, path)).to(base.device, base.dtype) for lora in (subject, style)]
        layers[path] = DenseLinear(base.slots.layers[path], *deltas)  # type: ignore[arg-type]
    return layers


def _float(lora: LoRA, path: str):  # type: ignore[no-untyped-def]
    layer = lora.layers[path]
    return type(layer)(layer.down.float(), layer.up.float())


@contextmanager
def installed(base: Base, layers: dict[str, DenseLinear]) -> Iterator[None]:
    """In the slots' places until the block ends."""

    def put(modules: dict[str, nn.Module]) -> None:
        for path, module in modules.items():
            parent, _, name = path.removeprefix("unet.").rpartition(".")
            setattr(base.unet.get_submodule(parent), name, module)

    own: dict[str, nn.Module] = {path: base.slots.layers[path] for path in layers}
    put(dict(layers))
    try:
        yield
    finally:
        put(own)


def dense_step(base: Base, layers: dict[str, DenseLinear], subject: Draws, style: Draws) -> Callable[[int], None]:
    """One update of the mergers by Eq. 3; the i-th draw of either LoRA at step i. The layers must be installed."""
    optimizer = torch.optim.Adam([layer.mergers for layer in layers.values()], lr=0.01)

    def predict(draws: Draws, i: int, mode: str) -> Tensor:
        for layer in layers.values():
            layer.mode = mode
        noisy, timesteps, conditioning = draws
        return base.predict_noise(noisy[i : i + 1], timesteps[i : i + 1], conditioning)

    def step(i: int) -> None:
        i %= len(subject[1])
        loss: Tensor | float = 0.0
        for mode, draws in (("subject", subject), ("style", style)):
            with torch.no_grad():
                teacher = predict(draws, i, mode)
            loss = loss + (predict(draws, i, "both").float() - teacher).square().mean()
        penalty = sum(
            (layer.mergers[0] * layer.mergers[1]).sum().abs() / layer.mergers.shape[1] for layer in layers.values()
        )
        optimizer.zero_grad(set_to_none=True)
        (loss + 0.01 * penalty / len(layers)).backward()  # type: ignore[union-attr]
        optimizer.step()

    return step
