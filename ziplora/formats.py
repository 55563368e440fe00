"""LoRA files: read in every layout of `ziplora.layouts`, written as kohya's tools write them, or in diffusers' layout.

A written file is one that diffusers, ComfyUI, Forge, A1111 and InvokeAI all load, with the same effect: kohya's names,
the scale folded in, one rank in all modules (zero-padded), `.alpha` = rank. Equal content gives equal bytes.
"""

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import safetensors
import torch
from safetensors.torch import load as load_bytes
from torch import Tensor

from ziplora.errors import FormatError
from ziplora.headers import LIMITS, Header, Limits, read_header_bytes, read_header_file, shown
from ziplora.layouts import ParsedLoRA, parse, read_alphas
from ziplora.lora import Layer, LoRA, Mergers, max_rank, tensor_bytes
from ziplora.module_names import Architecture, kohya_name


@dataclass(frozen=True, slots=True, eq=False)
class LoRAFile:
    """A LoRA as read, and what its file said about it."""

    lora: LoRA  # fp32 unless asked otherwise; fp64 if a tensor of the file is
    name: str
    layout: str
    alphas: Mapping[str, float]  # by module path; alpha/rank is what was folded in
    metadata: Mapping[str, str]
    triggers: tuple[str, ...]
    notes: tuple[str, ...]  # what was assumed, in sentences
    n_bytes: int

    @property
    def trigger(self) -> str | None:
        return self.triggers[0] if self.triggers else None


def read_lora(
    source: Path | str | bytes, *, name: str | None = None, limits: Limits = LIMITS, dtype: torch.dtype | None = None
) -> LoRAFile:
    """Read a LoRA file of any layout, alpha/rank folded into `up`; computed and returned in `dtype`, fp32 by default.

    Every bound is checked on the header, before a value is read. Raises FormatError, or UnsupportedAdapter for other
    kinds of adapters; FormatError also names a tensor with NaN or Inf.
    """
    name = name or ("LoRA" if isinstance(source, bytes) else str(source))
    header = _header(source, name, limits)
    parsed = parse(header, name, limits)
    with _opened(source, name) as file:

        def read(start: int, stop: int) -> bytes:
            file.seek(start)
            return file.read(stop - start)

        alphas = read_alphas(read, header, parsed)
    dtype = dtype or _natural_dtype(header)
    get = _tensors(source, name)
    layers = {}
    for path, keys in parsed.modules.items():
        down = _finite(get(keys.down), keys.down, name).to(dtype, copy=True)
        up = _finite(get(keys.up), keys.up, name).to(dtype, copy=True)
        layers[path] = Layer(down, up if alphas[path] == keys.rank else up * (alphas[path] / keys.rank))
    notes = _notes(parsed, alphas)
    return LoRAFile(LoRA(layers), name, parsed.layout, alphas, header.metadata, parsed.triggers, notes, header.n_bytes)


def write_kohya(
    lora: LoRA,
    *,
    metadata: Mapping[str, str],
    architecture: Architecture,
    title: str = "",
    trigger: str = "",
    dtype: torch.dtype = torch.float16,
) -> bytes:
    """The file that every tool loads: sgm block names for SDXL, diffusers' for SD 1.5, one rank, `.alpha` = rank.

    `metadata` goes into the header, over the keys that user interfaces read and that are filled in here (`ss_…`,
    `modelspec.…`, `sshs_model_hash`). Raises FormatError for values that `dtype` cannot hold, an empty LoRA, or modules
    that the architecture has no kohya name for.
    """
    file = io.BytesIO()
    _kohya(file, lora, metadata, architecture, title, trigger, dtype)
    return file.getvalue()


def save_kohya(
    lora: LoRA,
    path: Path | str,
    *,
    metadata: Mapping[str, str],
    architecture: Architecture,
    title: str = "",
    trigger: str = "",
    dtype: torch.dtype = torch.float16,
) -> None:
    """`write_kohya` to a file, one module in memory at a time. A failure leaves a file that every reader refuses."""
    with Path(path).open("wb") as file:
        _kohya(file, lora, metadata, architecture, title, trigger, dtype)


def restyle_kohya(
    content: bytes, *, subject_rank: int, style_strength: float, metadata: Mapping[str, str], name: str = "LoRA"
) -> bytes:
    """A file of `write_kohya` with the style's half, the rows from `subject_rank` on, times `style_strength`, and
    `metadata` over the header's own. In the file's dtype, without unpacking the rest of it: as quick as the disk.

    Raises FormatError for other files, and for values that the dtype cannot hold any more.
    """
    header = read_header_bytes(content, name)
    get = _tensors(content, name)
    dtypes = {info.dtype for info in header.tensors.values()}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPE_NAMES.values()):
        raise FormatError(f"{name} is not as this program writes LoRAs: its tensors are {', '.join(sorted(dtypes))}")
    dtype = next(dtype for dtype, known in _DTYPE_NAMES.items() if {known} == dtypes)

    def values() -> Iterator[tuple[str, Tensor]]:
        for key in sorted(header.tensors):
            tensor = get(key)
            if key.endswith(".lora_up.weight"):
                tensor = tensor.clone()
                tensor[:, subject_rank:] *= style_strength
                if style_strength > 1 and not torch.isfinite(tensor).all():  # nothing leaves the dtype by shrinking
                    raise FormatError(f"{name}: {shown(key)} leaves {dtype} at style strength {style_strength:g}")
            yield key, tensor

    file = io.BytesIO(bytes(len(content)))  # about as long as it will be: growing it step by step copies it many times
    shapes = {key: info.shape for key, info in header.tensors.items()}
    _write(file, shapes, values(), dtype, {**header.metadata, **metadata}, hash_key="sshs_model_hash")
    file.truncate()
    return file.getvalue()


def write_peft(lora: LoRA, *, metadata: Mapping[str, str], dtype: torch.dtype = torch.float16) -> bytes:
    """The same values in diffusers' own layout, one rank, no alpha (scale 1); of all tools only diffusers loads it."""
    rank, layers = _uniform(lora)
    shapes: dict[str, Shape] = {}
    for path, (down, up) in layers.items():
        shapes |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}

    def values() -> Iterator[tuple[str, Tensor]]:
        for path in sorted(layers):
            down, up = _cast(path, _balanced(lora.layers[path], rank), dtype)
            yield f"{path}.lora_A.weight", down
            yield f"{path}.lora_B.weight", up

    file = io.BytesIO()
    _write(file, shapes, values(), dtype, {"format": "pt", **metadata})
    return file.getvalue()


def sidecar(*, trigger: str, architecture: Architecture, description: str = "") -> bytes:
    """`<stem>.json` beside a LoRA file, with the keys that A1111, Forge and others show for it."""
    card = {
        "description": description,
        "sd version": {"sdxl": "SDXL", "sd15": "SD1"}[architecture],
        "activation text": trigger,
        "preferred weight": 1.0,
        "negative text": "",
        "notes": "",
    }
    return (json.dumps(card, ensure_ascii=False, indent=2) + "\n").encode()


def write_mergers(mergers: Mergers, metadata: Mapping[str, str]) -> bytes:
    """m_c and m_s as safetensors, keys `subject.<path>` and `style.<path>`, fp32."""
    tensors = {f"subject.{path}": m for path, m in mergers.subject.items()}
    tensors |= {f"style.{path}": m for path, m in mergers.style.items()}
    shapes = {key: tuple(tensors[key].shape) for key in tensors}
    file = io.BytesIO()
    values = ((key, tensors[key].to(torch.float32)) for key in sorted(tensors))
    _write(file, shapes, values, torch.float32, metadata)
    return file.getvalue()


def read_mergers(source: Path | str | bytes, *, name: str | None = None, limits: Limits = LIMITS) -> Mergers:
    """What `write_mergers` wrote; FormatError for anything else, NaN and Inf included."""
    name = name or ("mergers" if isinstance(source, bytes) else str(source))
    header = _header(source, name, limits)
    get = _tensors(source, name)
    halves: dict[str, dict[str, Tensor]] = {"subject": {}, "style": {}}
    for key, info in header.tensors.items():
        half, _, path = key.partition(".")
        if half not in halves or len(info.shape) != 1 or info.dtype != "F32":
            raise FormatError(f"{name} is no file of mergers: it has {shown(key)}, {info.dtype}{list(info.shape)}")
        halves[half][path] = _finite(get(key), key, name).clone()
    return Mergers(**halves)


# Reading


def _header(source: Path | str | bytes, name: str, limits: Limits) -> Header:
    if isinstance(source, bytes):
        return read_header_bytes(source, name, limits)
    return read_header_file(source, limits, name=name)


def _opened(source: Path | str | bytes, name: str) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb")


def _tensors(source: Path | str | bytes, name: str) -> Callable[[str], Tensor]:
    """How to get one tensor of a file whose header has been checked."""
    try:
        if isinstance(source, bytes):
            return load_bytes(source).__getitem__
        return safetensors.safe_open(source, framework="pt").get_tensor
    except (safetensors.SafetensorError, OSError) as error:
        raise FormatError(f"{name} cannot be loaded: {shown(str(error))}") from error


def _natural_dtype(header: Header) -> torch.dtype:
    double = any(tensor.dtype == "F64" and len(tensor.shape) > 1 for tensor in header.tensors.values())
    return torch.float64 if double else torch.float32


def _finite(tensor: Tensor, key: str, name: str) -> Tensor:
    if torch.isfinite(tensor).all():
        return tensor
    n_nan, n_inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    raise FormatError(
        f"{name}: {shown(key)} has {n_nan} NaN and {n_inf} Inf values: its training diverged; train it again"
    )


def _notes(parsed: ParsedLoRA, alphas: Mapping[str, float]) -> tuple[str, ...]:
    silent = [path for path, alpha in alphas.items() if alpha == 0]
    return (*parsed.notes, f"{len(silent)} modules have alpha 0, so they have no effect.") if silent else parsed.notes


# Writing

_DTYPE_NAMES = {torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}  # bf16 holds no alpha above 256

Shape = tuple[int, ...]


def _kohya(
    file: BinaryIO,
    lora: LoRA,
    metadata: Mapping[str, str],
    architecture: Architecture,
    title: str,
    trigger: str,
    dtype: torch.dtype,
) -> None:
    rank, layers = _uniform(lora)
    if dtype is torch.float16 and rank > 2048:
        raise FormatError(f"rank {rank} cannot be written in fp16, whose whole numbers end at 2048: write fp32")
    try:
        names = {kohya_name(path, architecture): path for path in layers}
    except ValueError as error:
        raise FormatError(f"this LoRA cannot be written for {architecture}: {error}") from error
    shapes: dict[str, Shape] = {}
    for name, path in names.items():
        shapes[f"{name}.alpha"] = ()
        shapes[f"{name}.lora_down.weight"], shapes[f"{name}.lora_up.weight"] = layers[path]

    def values() -> Iterator[tuple[str, Tensor]]:
        for name in sorted(names):
            down, up = _cast(names[name], _balanced(lora.layers[names[name]], rank), dtype)
            yield f"{name}.alpha", torch.tensor(rank, dtype=dtype)
            yield f"{name}.lora_down.weight", down
            yield f"{name}.lora_up.weight", up

    header = {**_interface_keys(architecture, rank, title, trigger), **metadata}
    if "lora_adapter_metadata" in header:
        raise FormatError("lora_adapter_metadata must not go into a kohya file: diffusers refuses it beside alphas")
    _write(file, shapes, values(), dtype, header, hash_key="sshs_model_hash")


def _interface_keys(architecture: Architecture, rank: int, title: str, trigger: str) -> dict[str, str]:
    """Header keys that user interfaces read: kohya's `ss_…` and https://github.com/Stability-AI/ModelSpec."""
    version, model, resolution, implementation = {
        "sdxl": (
            "sdxl_base_v1-0",
            "stable-diffusion-xl-v1-base",
            "1024x1024",
            "https://github.com/Stability-AI/generative-models",
        ),
        "sd15": ("sd_v1", "stable-diffusion-v1", "512x512", "diffusers"),
    }[architecture]
    keys = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_base_model_version": version,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{model}/lora",
        "modelspec.implementation": implementation,
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": resolution,
    }
    if architecture == "sd15":
        keys["ss_v2"] = "False"
    if title:
        keys |= {"modelspec.title": title, "ss_output_name": title}
    return keys | ({"modelspec.trigger_phrase": trigger} if trigger else {})


def _uniform(lora: LoRA) -> tuple[int, dict[str, tuple[Shape, Shape]]]:
    """The one rank of a file, and the shapes of down and up in it by path."""
    rank = max_rank(lora)
    if rank == 0:
        raise FormatError("this LoRA has no modules, so there is nothing to write")
    shapes = {
        path: ((rank, *layer.down.shape[1:]), (layer.up.shape[0], rank, *layer.up.shape[2:]))
        for path, layer in lora.layers.items()
    }
    return rank, shapes


def _balanced(layer: Layer, rank: int) -> Layer:
    """The same ΔW with row r of down and column r of up about equally large, padded with zeros to `rank`.

    They are scaled by 2ᵏ and 2⁻ᵏ, which is exact, so that neither leaves fp16's range while the other has room.
    """
    largest_down = layer.down.abs().flatten(1).amax(1)  # [rank]
    largest_up = layer.up.abs().flatten(2).amax(2).amax(0) if layer.up.ndim > 2 else layer.up.abs().amax(0)
    exponents = torch.frexp(largest_up)[1] - torch.frexp(largest_down)[1]
    powers = [max(-100, min(100, k // 2)) for k in exponents.tolist()]
    rows = layer.down.new_tensor([2.0**k for k in powers]).reshape(-1, *[1] * (layer.down.ndim - 1))
    columns = layer.up.new_tensor([2.0**-k for k in powers]).reshape(1, -1, *[1] * (layer.up.ndim - 2))
    down = layer.down.new_zeros(rank, *layer.down.shape[1:])
    up = layer.up.new_zeros(layer.up.shape[0], rank, *layer.up.shape[2:])
    down[: layer.rank] = layer.down * rows
    up[:, : layer.rank] = layer.up * columns
    return Layer(down, up)


def _cast(path: str, layer: Layer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    down, up = layer.down.to(dtype), layer.up.to(dtype)
    for stored, exact in ((down, layer.down), (up, layer.up)):
        if torch.isfinite(stored).all():
            continue
        if not torch.isfinite(exact).all():
            raise FormatError(f"{path} has NaN or Inf values, so it is not written: did the merge diverge?")
        limits = f"values up to {float(exact.abs().max()):.3g}, {dtype} holds {torch.finfo(dtype).max:g} at most"
        raise FormatError(f"{path} has {limits}: is a LoRA broken or its weight far too large?")
    return down, up


def _write(
    file: BinaryIO,
    shapes: Mapping[str, Shape],
    values: Iterator[tuple[str, Tensor]],
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    hash_key: str | None = None,
) -> None:
    """A safetensors file with sorted keys: the library's own writer orders metadata differently from run to run.

    `values` must yield the tensors in sorted order; each is written and dropped. `hash_key` receives the sha256 of all
    bytes behind the header.
    """
    if dtype not in _DTYPE_NAMES:
        raise ValueError(f"LoRA files are written in fp16, fp32 or fp64, not {dtype}")
    metadata = dict(metadata) | ({hash_key: "0" * 64} if hash_key else {})
    header = _header_bytes(shapes, dtype, metadata)
    file.write(header)
    sha = hashlib.sha256()
    for (key, tensor), expected in zip(values, sorted(shapes), strict=True):
        if (key, tuple(tensor.shape)) != (expected, shapes[key]):
            raise AssertionError(f"{key} {tuple(tensor.shape)} written where {expected} {shapes[expected]} belongs")
        content = tensor_bytes(tensor)
        sha.update(content)
        file.write(content)
    if hash_key:
        end = file.tell()
        file.seek(0)
        file.write(_header_bytes(shapes, dtype, metadata | {hash_key: sha.hexdigest()}))
        file.seek(end)


def _header_bytes(shapes: Mapping[str, Shape], dtype: torch.dtype, metadata: Mapping[str, str]) -> bytes:
    bad = [key for key, value in metadata.items() if not isinstance(value, str)]
    if bad:
        raise TypeError(f"metadata of a safetensors file must be text; {bad[0]} is not")
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for key in sorted(shapes):
        stop = position + math.prod(shapes[key]) * dtype.itemsize
        entries[key] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shapes[key]), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
