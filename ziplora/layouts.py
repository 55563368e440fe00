"""What a LoRA file holds, from its header alone: layout, modules, ranks, scales, and whether it can be read; no torch.

| layout          | key of one factor                                              | scale                    |
|-----------------|----------------------------------------------------------------|--------------------------|
| peft            | `unet.<module>.lora_A.weight`, `….lora_B.default.weight`       | header, else alpha = rank |
| dreambooth      | `unet.<module>.lora.down.weight`, `….lora_linear_layer.up.…`   | the same                 |
| legacy          | `unet.….attn1.processor.to_q_lora.down.weight`                 | alpha = rank             |
| kohya-sgm       | `lora_unet_input_blocks_4_1_….lora_down.weight`                | `.alpha` of each module  |
| kohya-diffusers | `lora_unet_down_blocks_1_attentions_0_….lora_up.weight`        | the same                 |
| comfyui         | `diffusion_model.input_blocks.4.1.….lora_down.weight`          | the same                 |

Text encoders have no blocks to name differently: `lora_te_`, `lora_te1_`, `lora_te2_` or `text_encoder(_2).`, with or
without `text_model.`. Files mix layouts; each key is read for itself, and a key that is not understood is refused.
"""

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeVar

from ziplora.adapter_config import AdapterConfig, read_config
from ziplora.errors import FormatError, LoRAError
from ziplora.fit import base_name, check_shapes, module_shapes
from ziplora.headers import (
    LIMITS,
    Header,
    Limits,
    Read,
    TensorInfo,
    few,
    read_header,
    read_header_bytes,
    read_header_file,
    shown,
)
from ziplora.module_names import Located, canonical, component, is_target, locate
from ziplora.other_adapters import kind_of, refused_keys

__all__ = [
    "LIMITS",
    "Header",
    "Inspection",
    "Limits",
    "ModuleKeys",
    "ParsedLoRA",
    "TensorInfo",
    "base_name",
    "canonical",
    "check_shapes",
    "component",
    "inspect_file",
    "inspect_header",
    "is_target",
    "module_shapes",
    "parse",
    "read_alphas",
    "read_header",
    "read_header_bytes",
    "read_header_file",
]


@dataclass(frozen=True, slots=True)
class ModuleKeys:
    """One module of a LoRA file: where its factors are and what they amount to."""

    down: str
    up: str
    alpha: str | None  # the key of the alpha tensor
    scale: float  # of modules without an alpha tensor: from the header's metadata, else 1
    rank: int
    in_features: int
    out_features: int
    kernel: tuple[int, ...]  # () of a linear layer, (kh, kw) of a convolution

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the base model's weight that this changes."""
        return (self.out_features, self.in_features, *self.kernel)


@dataclass(frozen=True, slots=True)
class ParsedLoRA:
    name: str
    layout: str  # a row of this module's table, or several joined with " + "
    modules: Mapping[str, ModuleKeys]  # by canonical path
    triggers: tuple[str, ...]  # words that the header gives for the concept, the likeliest first
    notes: tuple[str, ...]  # what was assumed, in sentences

    @property
    def trigger(self) -> str | None:
        return self.triggers[0] if self.triggers else None

    @property
    def base(self) -> str | None:
        """The family of base models that it fits by structure: `SDXL`, `SD 1.5`, `SD 2`; None if it cannot be told."""
        return base_name({path: keys.weight_shape for path, keys in self.modules.items()})


@dataclass(frozen=True, slots=True)
class Inspection:
    """All that can be said of a LoRA file without loading its values."""

    name: str
    n_bytes: int
    layout: str
    base: str | None  # by structure
    stated_base: str | None  # by the header's metadata
    dtypes: Mapping[str, int]  # dtype → tensors
    ranks: Mapping[int, int]  # rank → modules
    alphas: Mapping[float, int]  # alpha → modules; where the file has none, the one that gives its scale
    n_targets: int  # modules that ZipLoRA merges
    n_targets_of_base: int | None  # how many the base has
    carried: Mapping[str, int]  # the other modules, by component and kind; both sides' are kept at weight 1
    triggers: tuple[str, ...]
    notes: tuple[str, ...]
    refusals: tuple[str, ...]  # why it cannot be merged; empty if it can
    metadata: Mapping[str, str]


def parse(header: Header, name: str, limits: Limits = LIMITS) -> ParsedLoRA:
    """The modules of a LoRA file, every key accounted for.

    Raises UnsupportedAdapter naming the kind and its keys for adapters that are no plain LoRA and for LoRAs of other
    architectures; FormatError for keys not understood, halves without their other half, wrong dtypes, ranks beyond the
    limit and metadata that contradicts the tensors.
    """
    parsed, refusals = _survey(header, name, limits)
    if refusals:
        raise refusals[0]
    return parsed


def read_alphas(read: Read, header: Header, parsed: ParsedLoRA) -> dict[str, float]:
    """Each module's alpha (its scale is alpha/rank), one small read per alpha tensor. FormatError if not finite."""
    alphas = {}
    for path, keys in parsed.modules.items():
        if keys.alpha is None:
            alphas[path] = keys.scale * keys.rank
            continue
        tensor = header.tensors[keys.alpha]
        alphas[path] = _scalar(read(header.data_start + tensor.start, header.data_start + tensor.stop), tensor.dtype)
        if not math.isfinite(alphas[path]):
            raise FormatError(
                f"{parsed.name}: {shown(keys.alpha)} is {alphas[path]}, so the scale of {path} is unknown"
            )
    return alphas


def inspect_file(path: Path | str, limits: Limits = LIMITS) -> Inspection:
    """Describe a LoRA file. FormatError if it is no sound safetensors file; all other faults are listed as refusals."""
    header = read_header_file(path, limits)
    with Path(path).open("rb") as file:

        def read(start: int, stop: int) -> bytes:
            file.seek(start)
            return file.read(stop - start)

        return inspect_header(read, header, str(path), limits)


def inspect_header(read: Read, header: Header, name: str, limits: Limits = LIMITS) -> Inspection:
    """`inspect_file` of a header read before, from wherever `read` reads."""
    parsed, refusals = _survey(header, name, limits)
    try:
        alphas = read_alphas(read, header, parsed)
    except FormatError as error:
        alphas, refusals = {}, [*refusals, error]
    targets = [path for path in parsed.modules if is_target(path)]
    return Inspection(
        name=name,
        n_bytes=header.n_bytes,
        layout=parsed.layout,
        base=parsed.base,
        stated_base=_first(header.metadata, ("ss_base_model_version", "modelspec.architecture")),
        dtypes=_counted(tensor.dtype for tensor in header.tensors.values()),
        ranks=_counted(keys.rank for keys in parsed.modules.values()),
        alphas=_counted(alphas.values()),
        n_targets=len(targets),
        n_targets_of_base={"SDXL": 560, "SD 1.5": 128, "SD 2": 128}.get(parsed.base or ""),
        carried=_counted(_kind_of_module(path) for path in parsed.modules if not is_target(path)),
        triggers=parsed.triggers,
        notes=parsed.notes,
        refusals=tuple(str(error) for error in refusals),
        metadata=header.metadata,
    )


_T = TypeVar("_T")

_FACTORS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(?P<module>.+)\.lora_(?P<role>down|up)\.weight"), "kohya"),
    (re.compile(r"(?P<module>.+)\.lora_(?P<role>A|B)(?:\.(?P<adapter>[^.]+))?\.weight"), "peft"),
    (re.compile(r"(?P<module>.+)\.lora(?:_linear_layer)?\.(?P<role>down|up)\.weight"), "dreambooth"),
    (re.compile(r"(?P<module>.+)_lora\.(?P<role>down|up)\.weight"), "legacy"),
    (re.compile(r"(?P<module>.+?)(?:[._]lora)?\.(?P<role>alpha)"), "alpha"),
)
_ROLES: Mapping[str, Literal["down", "up", "alpha"]] = {
    "down": "down",
    "A": "down",
    "up": "up",
    "B": "up",
    "alpha": "alpha",
}
KEYS = 32768  # an SDXL LoRA has about 2,000
_WEIGHT_DTYPES = ("F16", "BF16", "F32", "F64")
_SCALARS = {"F16": "<e", "F32": "<f", "F64": "<d", "I8": "<b", "U8": "<B", "I16": "<h", "I32": "<i", "I64": "<q"}


def _survey(header: Header, name: str, limits: Limits) -> tuple[ParsedLoRA, list[LoRAError]]:
    """What was understood of a file, and all reasons to refuse it."""
    found: dict[str, dict[str, list[str]]] = {}  # path → role → keys
    layouts: set[str] = set()
    adapters: set[str] = set()
    kinds: dict[str, list[str]] = {}
    strange: list[str] = []
    for key in header.tensors:
        if kind := kind_of(key):
            kinds.setdefault(kind, []).append(key)
        elif factor := _factor(key):
            located, role, layout, adapter = factor
            found.setdefault(located.path, {}).setdefault(role, []).append(key)
            layouts.add(layout)
            adapters.add(adapter)
        else:
            strange.append(key)
    refusals = refused_keys(name, kinds, strange, header.tensors.keys())
    understood = not refusals
    adapters.discard("")
    if len(adapters) > 1:
        refusals.append(FormatError(f"{name} holds several PEFT adapters ({few(sorted(adapters))}): save them apart"))
    config, config_refusals = read_config(header.metadata, name)
    refusals += config_refusals
    modules: dict[str, ModuleKeys] = {}
    faults: list[LoRAError] = []
    for path, keys in found.items():
        try:
            modules[path] = _module(header, name, path, keys, config, limits)
        except LoRAError as error:
            faults.append(error)
    if understood:  # otherwise the lone alphas of a LoHa, and the like, are consequences
        refusals += faults[:3]
    if config and any(keys.alpha for keys in modules.values()):
        refusals.append(FormatError(f"{name} has both alpha tensors and lora_adapter_metadata: which scale is meant?"))
    wrapped = any(key.startswith("base_model.") for key in header.tensors)
    notes = _notes(modules, config, wrapped)
    return ParsedLoRA(name, _layout(layouts), modules, _triggers(header.metadata), notes), refusals


@lru_cache(KEYS)  # the LoRAs of a grid share their names: thousands of files, one or two vocabularies
def _factor(key: str) -> tuple[Located, str, str, str] | None:
    """(module, role, layout, PEFT adapter name) of a key, or None."""
    for pattern, spelling in _FACTORS:
        if (match := pattern.fullmatch(key)) and (located := locate(match["module"])):
            layout = spelling
            if spelling == "kohya":
                layout = "kohya" if located.blocks == "text" else f"kohya-{located.blocks}"
                layout = "comfyui" if located.joined == "." else layout
            return located, _ROLES[match["role"]], layout, match.groupdict().get("adapter") or ""
    return None


def _layout(layouts: set[str]) -> str:
    """kohya's text encoders and alphas go with any layout, so they name it only if nothing else does."""
    telling = layouts - {"alpha"}
    if len(telling) > 1:
        telling -= {"kohya"}
    return " + ".join(sorted(telling)) or "none"


def _module(
    header: Header, name: str, path: str, keys: Mapping[str, list[str]], config: AdapterConfig | None, limits: Limits
) -> ModuleKeys:
    for role, same in keys.items():
        if len(same) > 1:
            raise FormatError(f"{name} holds {role} of {path} {len(same)} times ({few(same)}): which one is meant?")
    if "down" not in keys or "up" not in keys:
        lacking = " and ".join(role for role in ("down", "up") if role not in keys)
        raise FormatError(f"{name}: {path} has {few([k for same in keys.values() for k in same])} but no {lacking}")
    down, up = header.tensors[keys["down"][0]], header.tensors[keys["up"][0]]
    for role in ("down", "up"):
        if (dtype := header.tensors[keys[role][0]].dtype) not in _WEIGHT_DTYPES:
            readable = ", ".join(_WEIGHT_DTYPES)
            raise FormatError(f"{name}: {shown(keys[role][0])} has dtype {dtype}; only {readable} are read")
    linear = len(down.shape) == 2 and len(up.shape) == 2
    convolution = len(down.shape) == 4 and len(up.shape) == 4 and up.shape[2:] == (1, 1)
    if not (linear or convolution) or down.shape[0] != up.shape[1] or 0 in (*down.shape, *up.shape):
        raise FormatError(f"{name}: down {list(down.shape)} and up {list(up.shape)} of {path} make no LoRA layer")
    rank = down.shape[0]
    if rank > limits.max_rank:
        raise FormatError(f"{name}: {path} has rank {rank}; the limit is {limits.max_rank}")
    alpha = keys["alpha"][0] if "alpha" in keys else None
    if alpha is not None:
        tensor = header.tensors[alpha]
        if math.prod(tensor.shape) != 1 or tensor.dtype not in (*_SCALARS, "BF16"):
            raise FormatError(f"{name}: {shown(alpha)} is {tensor.dtype}{list(tensor.shape)}; one number is expected")
    scale = config.scale(path, rank, name) if config and alpha is None else 1.0
    return ModuleKeys(keys["down"][0], keys["up"][0], alpha, scale, rank, down.shape[1], up.shape[0], down.shape[2:])


def _scalar(content: bytes, dtype: str) -> float:
    if dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + content)[0])
    return float(struct.unpack(_SCALARS[dtype], content)[0])


def _notes(modules: Mapping[str, ModuleKeys], config: AdapterConfig | None, wrapped: bool) -> tuple[str, ...]:
    lacking = [path for path, keys in modules.items() if keys.alpha is None]
    if not lacking or config:
        return ()
    where = "" if len(lacking) == len(modules) else f" of {len(lacking)} of {len(modules)} modules"
    note = f"The file does not give the alpha{where}: alpha = rank, scale 1, was assumed."
    return (note, "PEFT writes alpha to adapter_config.json beside the file; that is not read.") if wrapped else (note,)


def _triggers(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Words for the concept: the stated phrase, then the names of kohya's training folders (`10_sks dog`)."""
    words = [metadata[key] for key in ("modelspec.trigger_phrase", "trigger_phrase", "trigger_word") if key in metadata]
    for key in ("ss_dataset_dirs", "ss_tag_frequency"):
        try:
            folders = json.loads(metadata.get(key, "{}"))
        except (ValueError, RecursionError):
            continue
        if isinstance(folders, dict):
            words += [re.sub(r"^\d+_", "", folder).strip() for folder in folders]
    return tuple(dict.fromkeys(shown(word.strip(), 200) for word in words if word.strip()))


def _kind_of_module(path: str) -> str:
    owner = component(path)
    if owner != "unet":
        return owner
    if ".ff.net." in path:
        return "unet feed-forward"
    if path.endswith((".proj_in", ".proj_out")):
        return "unet projections"
    return "unet embeddings" if "embedding" in path else "unet resnets and convolutions"


def _first(metadata: Mapping[str, str], keys: Iterable[str]) -> str | None:
    return next((shown(metadata[key]) for key in keys if metadata.get(key)), None)


def _counted(values: Iterable[_T]) -> dict[_T, int]:
    """value → how often, the commonest first."""
    return dict(Counter(values).most_common())
