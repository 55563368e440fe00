"""LoRA slots in a resident model: base weights stay where they are, LoRAs pass through buffers beside them.

A slot takes `parts` LoRAs (one, or a subject and a style) for each of `merges` merges that share a forward pass.
With mergers m it computes

    y = W₀x + [B_c B_s] ([A_c∘m_c; A_s∘m_s] x)

which is Eq. 2 of ZipLoRA (arXiv 2311.13600v2): column scaling commutes with B, so ΔW·diag(m)·x = B·(A·diag(m))·x.
Folding m into the
small A costs rank × in multiplications instead of tokens × in, and no scaled copy of x is kept for the backward pass.

Slots are subclasses of the layers they stand in for and share their parameters, so state dicts, dtype look-ups and
pipelines see the base model unchanged.

For many predictions with one LoRA, `Slots.fused` lets W₀ + B·A stand in for W₀: no work beside the base layer's.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ziplora.errors import ShapeMismatch
from ziplora.layouts import is_target
from ziplora.lora import Layer, LoRA


class Slot:
    """The buffers of one layer. `down` [merges, parts, rank, in·kernel], `up` [merges, out, parts·rank]; `mergers`
    [merges, parts, in] or None."""

    down: Tensor | None
    up: Tensor | None
    mergers: Tensor | None
    active: bool

    def _empty(self) -> None:
        module = cast(nn.Module, self)
        module.register_buffer("down", None, persistent=False)  # not persistent: a state dict is the base model's
        module.register_buffer("up", None, persistent=False)
        self.storage: dict[str, Tensor] = {}
        self.__dict__["mergers"], self.active = None, False

    def close(self) -> None:
        """The base layer alone; the memory is kept for the next load."""
        self.__dict__["mergers"], self.active = None, False

    def free(self) -> None:
        self.close()
        self.down = self.up = None
        self.storage.clear()

    def _zeros(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """A zeroed view of memory that is kept between loads and only ever grows.

        Of exactly this shape: with rows left over from a larger load, the same LoRA would be summed in another order,
        and its result would depend on what was in the slot before.
        """
        size = math.prod(shape)
        if name not in self.storage or self.storage[name].numel() < size:
            self.storage[name] = like.new_empty(size)
        return self.storage[name][:size].view(shape).zero_()

    @torch.no_grad()
    def fill(self, layers: Sequence[Sequence[tuple[Tensor, Tensor] | None]], like: Tensor) -> None:
        """Write `layers[merge][part]` = (down [rank, …], up [out, rank, …]), None where a LoRA does not touch this
        layer.

        Smaller ranks are padded with zero rows. Reloading a pair of the same shape allocates nothing.
        """
        merges, parts = len(layers), len(layers[0])
        rank = max((pair[0].shape[0] for row in layers for pair in row if pair is not None), default=0)
        self.close()
        if rank == 0:
            return
        out_features, columns = like.shape[0], like[0].numel()
        self.down = self._zeros("down", like, merges, parts, rank, columns)
        self.up = self._zeros("up", like, merges, out_features, parts * rank)
        for merge, row in enumerate(layers):
            for part, pair in enumerate(row):
                if pair is not None:
                    down, up = pair
                    first = part * rank
                    self.down[merge, part, : down.shape[0]] = down.flatten(1).to(like)
                    self.up[merge, :, first : first + down.shape[0]] = up.flatten(1).to(like)
        self.active = True

    def folded(self) -> Tensor:
        """[A_c∘m_c; A_s∘m_s] of every merge: [merges, parts·rank, in]."""
        assert self.down is not None
        return self.down.flatten(1, 2) if self.mergers is None else _folded(self.down, self.mergers)


def _folded(down: Tensor, mergers: Tensor) -> Tensor:
    return (down * mergers.unsqueeze(2)).to(down.dtype).flatten(1, 2)


class _Folded(torch.autograd.Function):
    """rows [merges, n, in] → [B_c B_s] [A_c∘m_c; A_s∘m_s] x, [merges, n, out], differentiable in rows and mergers.

    The scaled A is small work and much memory: kept for the backward pass as autograd would, the 560 of SDXL at rank 64
    take 183 MB per merge. Here it is made twice.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, down: Tensor, up: Tensor, mergers: Tensor) -> Tensor:
        ctx.save_for_backward(rows, down, up, mergers)
        return torch.bmm(torch.bmm(rows, _folded(down, mergers).mT), up.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        rows, down, up, mergers = ctx.saved_tensors
        inner = torch.bmm(gradient, up)  # [merges, n, parts·rank]
        of_rows = torch.bmm(inner, _folded(down, mergers)) if ctx.needs_input_grad[0] else None
        of_mergers = None
        if ctx.needs_input_grad[3]:
            of_folded = torch.bmm(rows.mT, inner).mT.unflatten(1, down.shape[1:3])
            of_mergers = (of_folded.to(mergers.dtype) * down).sum(2)
        return of_rows, None, None, of_mergers


class SlotLinear(nn.Linear, Slot):
    """A Linear with a slot. Rows of the input batch are merge-major: rows of merge 0, rows of merge 1, …"""

    @classmethod
    def over(cls, linear: nn.Linear) -> "SlotLinear":
        slot = cls.__new__(cls)
        nn.Module.__init__(slot)
        slot.in_features, slot.out_features = linear.in_features, linear.out_features
        slot.weight, slot.bias = linear.weight, linear.bias
        slot._empty()
        return slot

    def forward(self, input: Tensor) -> Tensor:
        base = F.linear(input, self.weight, self.bias)
        if not self.active or self.up is None:
            return base
        if self.mergers is not None and torch.is_grad_enabled():
            rows = input.reshape(len(self.up), -1, self.in_features)
            return base + _Folded.apply(rows, self.down, self.up, self.mergers).reshape(base.shape)
        down, up = self.folded(), self.up
        if len(down) == 1:
            return base + F.linear(F.linear(input, down[0]), up[0])
        rows = input.reshape(len(down), -1, self.in_features)
        return base + torch.bmm(torch.bmm(rows, down.mT), up.mT).reshape(base.shape)


class SlotConv2d(nn.Conv2d, Slot):
    """A Conv2d with a slot: LoRA's down is a convolution of the layer's own kernel, its up a 1×1."""

    @classmethod
    def over(cls, conv: nn.Conv2d) -> "SlotConv2d":
        slot = cls.__new__(cls)
        nn.Module.__init__(slot)
        # everything a Conv2d computes with (stride, padding, …) is a plain attribute
        slot.__dict__.update({name: value for name, value in conv.__dict__.items() if not name.startswith("_")})
        slot._reversed_padding_repeated_twice = conv._reversed_padding_repeated_twice
        slot.weight, slot.bias = conv.weight, conv.bias
        slot._empty()
        return slot

    def forward(self, input: Tensor) -> Tensor:
        base = self._conv_forward(input, self.weight, self.bias)
        if not self.active or self.up is None:
            return base
        outputs = [
            F.conv2d(self._conv_forward(rows, down.unflatten(1, self.weight.shape[1:]), None), up[:, :, None, None])
            for rows, down, up in zip(input.chunk(len(self.up)), self.folded(), self.up, strict=True)
        ]
        return base + torch.cat(outputs)


class Slots:
    """Every Linear and Conv2d of some named models, with a slot in its place. Built once; afterwards only buffers
    change.

    `layers` maps module paths (`unet.down_blocks.1…to_q`) to slots.
    """

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        self.layers: dict[str, SlotLinear | SlotConv2d] = {}
        for component, model in components.items():
            for name, module in list(model.named_modules()):
                # exact types: quantised or already wrapped layers compute something else
                if type(module) is nn.Linear:
                    self._install(component, model, name, SlotLinear.over(module))
                elif type(module) is nn.Conv2d and module.groups == 1:
                    self._install(component, model, name, SlotConv2d.over(module))
        self.targets = {path: layer.in_features for path, layer in self.layers.items() if _is_merge_target(path, layer)}

    def _install(self, component: str, model: nn.Module, name: str, slot: SlotLinear | SlotConv2d) -> None:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, slot)
        self.layers[canonical_path(component, name)] = slot

    def load(self, merges: Sequence[Sequence[LoRA]]) -> None:
        """Put `merges[i][part]` into the slots, at merger 1; every merge has the same number of parts. Raises
        ShapeMismatch before it writes."""
        for lora in (lora for merge in merges for lora in merge):
            self._check(lora)
        for path, slot in self.layers.items():
            slot.fill([[_tensors(lora, path) for lora in merge] for merge in merges], slot.weight)

    def unload(self) -> None:
        """The base model alone again; the buffers are given back."""
        for slot in self.layers.values():
            slot.free()

    @contextmanager
    def loaded(self, merges: Sequence[Sequence[LoRA]]) -> Iterator["Slots"]:
        self.load(merges)
        try:
            yield self
        finally:
            self.close()

    def close(self) -> None:
        """The base model alone again, the buffers kept for the next load."""
        for slot in self.layers.values():
            slot.close()

    @contextmanager
    def fused(self, lora: LoRA) -> Iterator["Slots"]:
        """`lora` alone, as weights W₀ + ΔW that stand in for the base's until the block ends; whatever the slots hold
        is closed.

        The base's own tensors are put aside, never written to, so what comes back is what was there, bit for bit, even
        when the block fails. Takes as many bytes as the weights that the LoRA touches (SDXL's attention in bf16:
        1.9 GB) and gives them back. A tensor in a weight's place is nothing new to a compiled model, whichever layers
        the LoRA has. Raises ShapeMismatch before it changes anything.
        """
        self._check(lora)
        self.close()
        own = {path: self.layers[path].weight for path in lora.layers}
        try:
            for path, layer in lora.layers.items():
                self.layers[path].weight = _plus_delta(own[path], layer)
            yield self
        finally:
            for path, weight in own.items():
                self.layers[path].weight = weight

    def attach_mergers(self, initial: float = 1.0) -> dict[str, nn.Parameter]:
        """Trainable fp32 mergers [merges, parts, in] on every loaded target; fp32 because 1 − 5e-5 is 1 in bf16."""
        parameters = {}
        for path in self.targets:
            slot = self.layers[path]
            if slot.active and slot.down is not None:
                dtype = torch.float64 if slot.weight.dtype == torch.float64 else torch.float32
                # a part that the layer lacks (rank 0) is nobody's rival: its mergers are 0, where |m_c·m_s| is flat
                present = slot.down.flatten(2).any(-1, keepdim=True)  # [merges, parts, 1]
                values = present.to(dtype).mul(initial).repeat(1, 1, slot.weight.shape[1])
                parameters[path] = nn.Parameter(values)
                slot.__dict__["mergers"] = parameters[
                    path
                ]  # not a parameter of the model: its state dict is the base's
        return parameters

    def weigh(self, weights: Mapping[str, Tensor]) -> None:
        """Factors of the loaded parts, [merges, parts] by path, until the next load; 1 where none is given."""
        for path, factors in weights.items():
            slot = self.layers[path]
            if slot.active:
                slot.__dict__["mergers"] = factors.to(slot.weight)[:, :, None]  # one for all columns

    def _check(self, lora: LoRA) -> None:
        for path, layer in lora.layers.items():
            slot = self.layers.get(path)
            if slot is None:
                raise ShapeMismatch(
                    f"LoRA has {path}, which this base does not have: was it trained on another base model?"
                )
            shape = [layer.up.shape[0], *layer.down.shape[1:]]
            if _without_1x1(shape) != _without_1x1(slot.weight.shape):
                raise ShapeMismatch(
                    f"LoRA is {shape} at {path}, the base {list(slot.weight.shape)}:"
                    " was it trained on another base model?"
                )


def canonical_path(component: str, name: str) -> str:
    """The path a LoRA knows a module by. transformers ≥ 5 dropped `text_model.` from CLIPTextModel's own names;
    LoRA files keep it."""
    if component.startswith("text_encoder") and not name.startswith(("text_model.", "text_projection")):
        name = f"text_model.{name}"
    return f"{component}.{name}"


@torch.no_grad()
def _plus_delta(weight: Tensor, layer: Layer) -> nn.Parameter:
    """W₀ + B·A in W₀'s shape and dtype. Summed in at least fp32, so that a bf16 base rounds once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    down, up = (tensor.flatten(1).to(weight.device, wide) for tensor in (layer.down, layer.up))
    total = torch.addmm(weight.flatten(1).to(wide), up, down)
    return nn.Parameter(total.to(weight.dtype).view_as(weight), requires_grad=False)


def _is_merge_target(path: str, layer: nn.Module) -> bool:
    return isinstance(layer, SlotLinear) and is_target(path)


def _without_1x1(shape: Sequence[int]) -> tuple[int, ...]:
    """A linear layer and the 1×1 convolution that some files store it as have the same numbers."""
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)


def _tensors(lora: LoRA, path: str) -> tuple[Tensor, Tensor] | None:
    layer = lora.layers.get(path)
    return None if layer is None else (layer.down, layer.up)
