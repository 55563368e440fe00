"""Adapters of masked-token models as files, in the layout that diffusers' `load_lora_adapter(prefix="transformer")`
reads.

LoRA files of SDXL and SD 1.5 come from everywhere, in many layouts (formats.py); these are only our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ziplora.errors import FormatError
from ziplora.formats import write_peft
from ziplora.lora import Layer, LoRA

DOWN, UP = ".lora_A.weight", ".lora_B.weight"


def write_adapter(adapter: LoRA, metadata: Mapping[str, str]) -> bytes:
    """fp32: an adapter of a few megabytes is not worth rounding."""
    return write_peft(adapter, metadata=metadata, dtype=torch.float32)


def read_adapter(path: Path) -> tuple[LoRA, dict[str, str]]:
    """An adapter and its header, as `write_adapter` wrote them. FormatError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.offset_keys()}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} cannot be read as an adapter: {error}") from error
    modules = {key.removesuffix(DOWN) for key in tensors if key.endswith(DOWN)}
    if not modules or {name + end for name in modules for end in (DOWN, UP)} != tensors.keys():
        raise FormatError(f"{path} holds other keys than an adapter's ({DOWN[1:]} and {UP[1:]} of each module)")
    return LoRA({name: Layer(tensors[name + DOWN], tensors[name + UP]) for name in sorted(modules)}), metadata
