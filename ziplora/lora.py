"""A LoRA as a value: module path → (down, up), the scale alpha/rank already folded in, so that ΔW = up·down exactly.

Paths carry the component: `unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q`,
`text_encoder.text_model.encoder.layers.0.self_attn.q_proj`.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ziplora.errors import ShapeMismatch


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One module's update ΔW = up·down."""

    down: Tensor  # [rank, in], of a convolution [rank, in, kh, kw]
    up: Tensor  # [out, rank], of a convolution [out, rank, 1, 1]

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class LoRA:
    layers: Mapping[str, Layer]


@dataclass(frozen=True, slots=True, eq=False)
class Mergers:
    """m_c and m_s of Eq. 2 (arXiv 2311.13600v2), fp32, by module path; a module that a LoRA lacks has none."""

    subject: Mapping[str, Tensor]  # [in]
    style: Mapping[str, Tensor]  # [in]


def delta(layer: Layer) -> Tensor:
    """ΔW = up·down, [out, in] or [out, in, kh, kw], in the layer's dtype."""
    flat = layer.up.flatten(1) @ layer.down.flatten(1)
    return flat.reshape(layer.up.shape[0], *layer.down.shape[1:])


def scaled(lora: LoRA, weight: float) -> LoRA:
    """weight·ΔW of every module."""
    return LoRA({path: Layer(layer.down, layer.up * weight) for path, layer in lora.layers.items()})


def concat(loras: Sequence[LoRA]) -> LoRA:
    """The LoRA whose ΔW is the sum of the given ones, exactly: [B₁ B₂ …]·[A₁; A₂; …], rank r₁ + r₂ + ….

    A module that only some have is kept from those. Raises ShapeMismatch naming the module.
    """
    paths = dict.fromkeys(path for lora in loras for path in lora.layers)
    return LoRA(
        {path: _side_by_side(path, [lora.layers[path] for lora in loras if path in lora.layers]) for path in paths}
    )


def zip_merge(subject: LoRA, style: LoRA, mergers: Mergers, *, targets: Collection[str] | None = None) -> LoRA:
    """Eq. 2 (arXiv 2311.13600v2), ΔW_m = ΔW_c·diag(m_c) + ΔW_s·diag(m_s), as an exact LoRA of rank r_c + r_s.

    The mergers scale columns, so they go into `down`: [A_c·diag(m_c); A_s·diag(m_s)], [B_c B_s]. Modules without
    mergers are carried: summed as in `concat`. `targets` names the modules that must not be carried; one of them that a
    LoRA has and its mergers lack raises ShapeMismatch, as do mergers of another length than the module's inputs.
    """
    for mine, lora, name in ((mergers.subject, subject, "subject"), (mergers.style, style, "style")):
        lacking = [path for path in targets or () if path in lora.layers and path not in mine]
        if lacking:
            raise ShapeMismatch(f"the {name}'s mergers lack {len(lacking)} merge targets, such as {lacking[0]}")
    return concat(zipped(subject, style, mergers))


def select(lora: LoRA, predicate: Callable[[str], bool]) -> LoRA:
    """The modules whose path satisfies the predicate."""
    return LoRA({path: layer for path, layer in lora.layers.items() if predicate(path)})


def to(lora: LoRA, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> LoRA:
    """The same LoRA in another dtype or on another device; tensors that are there already are shared, not copied."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=dtype)

    return LoRA({path: Layer(moved(layer.down), moved(layer.up)) for path, layer in lora.layers.items()})


def max_rank(lora: LoRA) -> int:
    return max((layer.rank for layer in lora.layers.values()), default=0)


def touches_text_encoder(lora: LoRA) -> bool:
    return any(path.startswith("text_encoder") for path in lora.layers)


def n_bytes(lora: LoRA) -> int:
    """Bytes of all values in the dtype they have now."""
    return sum(tensor.nbytes for layer in lora.layers.values() for tensor in (layer.down, layer.up))


def digest(lora: LoRA) -> str:
    """Hex sha256 of the content: paths in sorted order, then each tensor's dtype, shape and bytes."""
    sha = hashlib.sha256()
    for path in sorted(lora.layers):
        layer = lora.layers[path]
        for tensor in (layer.down, layer.up):
            sha.update(f"{path} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            sha.update(tensor_bytes(tensor))
    return sha.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's values, row by row, in the machine's byte order; no copy if it lies contiguous in host memory."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _side_by_side(path: str, layers: Sequence[Layer]) -> Layer:
    if len(layers) == 1:
        return layers[0]
    if any(layer.down.ndim == 4 for layer in layers):
        layers = [_as_convolution(layer) for layer in layers]
    first = layers[0]
    for other in layers[1:]:
        if (first.down.shape[1:], first.up.shape[0]) != (other.down.shape[1:], other.up.shape[0]):
            raise ShapeMismatch(
                f"{path}: one LoRA changes a weight of shape {_weight_shape(first)}, another one of"
                f" {_weight_shape(other)}: were they trained on the same base model?"
            )
    return Layer(torch.cat([x.down for x in layers], dim=0), torch.cat([x.up for x in layers], dim=1))


def _as_convolution(layer: Layer) -> Layer:
    """A linear layer seen as the 1×1 convolution that some files store it as."""
    if layer.down.ndim == 4:
        return layer
    return Layer(layer.down[:, :, None, None], layer.up[:, :, None, None])


def _weight_shape(layer: Layer) -> list[int]:
    return [layer.up.shape[0], *layer.down.shape[1:]]


def _times_columns(lora: LoRA, mergers: Mapping[str, Tensor]) -> LoRA:
    layers = dict(lora.layers)
    for path, m in mergers.items():
        down = layers[path].down
        if m.shape != down.shape[1:]:
            raise ShapeMismatch(f"{path}: mergers of shape {list(m.shape)} on a LoRA down of shape {list(down.shape)}")
        layers[path] = Layer(down * m.to(down), layers[path].up)
    return LoRA(layers)


def stacked(parts: Sequence[LoRA]) -> LoRA:
    """`concat` with every part's rows at the same place in all modules: part i begins at row Σ_{j<i} max_rank(part j).

    Modules that a part lacks, or has at a lower rank, get zero rows. One number then says, for the whole file, which
    rows came from which LoRA, so that the strength of one of them can be changed later.
    """
    paths = dict.fromkeys(path for part in parts for path in part.layers)
    ranks = [max_rank(part) for part in parts]

    def rows(part: LoRA, path: str, rank: int) -> Layer:
        like = next(other.layers[path] for other in parts if path in other.layers)
        layer = part.layers.get(path) or Layer(like.down[:0], like.up[:, :0])
        down = layer.down.new_zeros(rank, *layer.down.shape[1:])
        up = layer.up.new_zeros(layer.up.shape[0], rank, *layer.up.shape[2:])
        down[: layer.rank], up[:, : layer.rank] = layer.down, layer.up
        return Layer(down, up)

    return LoRA(
        {
            path: _side_by_side(path, [rows(part, path, rank) for part, rank in zip(parts, ranks, strict=True) if rank])
            for path in paths
        }
    )


def restyled(merged: LoRA, subject_rank: int, style_strength: float) -> LoRA:
    """A `stacked` merge with its style half, the rows from `subject_rank` on, times `style_strength`."""

    def scale(layer: Layer) -> Layer:
        strengths = torch.ones_like(layer.up[0])  # [rank, …]
        strengths[subject_rank:] = style_strength
        return Layer(layer.down, layer.up * strengths)

    return LoRA({path: scale(layer) for path, layer in merged.layers.items()})


def zipped(subject: LoRA, style: LoRA, mergers: Mergers) -> tuple[LoRA, LoRA]:
    """ΔW_c·diag(m_c) and ΔW_s·diag(m_s), the two summands of Eq. 2 (arXiv 2311.13600v2), as LoRAs of their own.

    ShapeMismatch for mergers of other LoRAs: of modules that these lack, or of another length than a module's inputs.
    """
    for mine, lora, name in ((mergers.subject, subject, "subject"), (mergers.style, style, "style")):
        strange = [path for path in mine if path not in lora.layers]
        if strange:
            raise ShapeMismatch(f"the {name}'s mergers have {len(strange)} modules that it lacks, such as {strange[0]}")
    return _times_columns(subject, mergers.subject), _times_columns(style, mergers.style)
