"""Whether a LoRA fits a base model: from the header of one and the weight shapes of the other; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ziplora.errors import FormatError, ShapeMismatch
from ziplora.headers import Header, few
from ziplora.module_names import canonical

if TYPE_CHECKING:
    from ziplora.layouts import ParsedLoRA


def check_shapes(parsed: ParsedLoRA, base_shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Every module exists in the base model, with its shape. `base_shapes`: by canonical path, of all components.

    Raises ShapeMismatch where the shapes differ or the LoRA was made for another family of base models, FormatError
    where a module does not exist.
    """
    missing = [path for path in parsed.modules if path not in base_shapes]
    wrong = [p for p, keys in parsed.modules.items() if p in base_shapes and keys.weight_shape != tuple(base_shapes[p])]
    if not missing and not wrong:
        return
    ours, theirs = parsed.base, base_name(base_shapes)
    if ours and theirs and ours != theirs:
        raise ShapeMismatch(
            f"{name} is a LoRA for {ours}, the base model is {theirs}: of its {len(parsed.modules)} modules"
            f" {len(missing)} do not exist there and {len(wrong)} have other shapes ({few(missing + wrong, 1)});"
            f" use one for {theirs}"
        )
    if missing:
        raise FormatError(
            f"{name}: {len(missing)} of its {len(parsed.modules)} modules do not exist in the base model"
            f" ({few(missing)}): was it trained on another base model?"
        )
    path = wrong[0]
    keys, shape = parsed.modules[path], base_shapes[path]
    if not keys.kernel and len(shape) == 2 and keys.in_features != shape[1]:
        fault = f"LoRA down is [{keys.rank}, {keys.in_features}] but {path} takes {shape[1]} inputs"
    elif not keys.kernel and len(shape) == 2:
        fault = f"LoRA up is [{keys.out_features}, {keys.rank}] but {path} gives {shape[0]} outputs"
    else:
        fault = f"the LoRA changes a weight of shape {list(keys.weight_shape)} but {path} has {list(shape)}"
    raise ShapeMismatch(
        f"{fault} ({name}; {len(wrong)} of {len(parsed.modules)} modules do not fit):"
        " was it trained on another base model?"
    )


def module_shapes(header: Header, owner: str) -> dict[str, tuple[int, ...]]:
    """Weight shapes by canonical path, from the header of a base model's own file of the component `owner`."""
    ending = ".weight"
    return {
        canonical(f"{owner}.{key.removesuffix(ending)}"): tensor.shape
        for key, tensor in header.tensors.items()
        if key.endswith(ending) and len(tensor.shape) in (2, 4)
    }


def base_name(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The family of base models, by which blocks have attention, and by its context's width where that decides."""
    unet = [path.removeprefix("unet.") for path in shapes if path.startswith("unet.")]
    widths = {shape[1] for path, shape in shapes.items() if path.endswith((".attn2.to_k", ".attn2.to_v"))}
    if any(path.startswith(("down_blocks.0.attentions", "down_blocks.3.", "up_blocks.3.")) for path in unet):
        return "SD 2" if widths == {1024} else "SD 1.5"
    if any(path.startswith(("up_blocks.0.attentions", "add_embedding.")) for path in unet):
        return "SDXL"
    if any(path.startswith("text_encoder_2.") for path in shapes):
        return "SDXL"
    return {768: "SD 1.5", 1024: "SD 2", 2048: "SDXL"}.get(max(widths)) if len(widths) == 1 else None
