"""Headers of safetensors files, read with bounds and without trust, from files or over ranged requests; no torch.

The format (https://github.com/huggingface/safetensors): 8 bytes of little-endian header length, a JSON object
{tensor name: {dtype, shape, data_offsets}} with an optional `__metadata__` of strings, then the values, without holes.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ziplora.errors import FormatError


@dataclass(frozen=True, slots=True)
class Limits:
    """What a reader accepts; a merge of two rank-1024 LoRAs of all attention modules of SDXL is still read."""

    max_header_bytes: int = (
        32 * 2**20
    )  # the format allows 100 MB; 2,400 tensors with names and metadata need under 1 MB
    max_tensors: int = 20_000
    max_rank: int = 2048  # what a merge of two rank-1024 LoRAs has
    max_bytes: int = 8 * 2**30


LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class TensorInfo:
    dtype: str  # as the format spells it: F16, BF16, F32 …
    shape: tuple[int, ...]
    start: int  # byte offsets behind `Header.data_start`
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    n_bytes: int  # of the whole file
    data_start: int  # where the values begin


Read = Callable[[int, int], bytes]  # (start, stop) → the bytes [start, stop) of the file

DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}

MAGIC = (
    (b"PK\x03\x04", "a zip archive, as PyTorch's .ckpt, .pt and .bin files are"),
    (b"\x80\x02", "a Python pickle, as old PyTorch .ckpt and .pt files are"),
    (b"\x80\x03", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"version https://git-lfs", "a Git LFS pointer instead of the file itself (run `git lfs pull`)"),
    (b"<!DOCTYPE", "a web page instead of the file itself (did the download need a login?)"),
    (b"<!doctype", "a web page instead of the file itself (did the download need a login?)"),
    (b"<html", "a web page instead of the file itself (did the download need a login?)"),
    (b"GGUF", "a GGUF file"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip archive"),
)


def read_header(read: Read, size: int, name: str, limits: Limits = LIMITS) -> Header:
    """The header of a safetensors file of `size` bytes, after at most two reads, every entry checked against the rest.

    Raises FormatError, naming the file as `name`, for everything that is no whole, sound safetensors file: empty,
    truncated, another format (pickle, zip …), beyond the limits, doubled names, unknown dtypes, offsets that overlap,
    leave holes or disagree with the shape or the file's size.
    """
    if size == 0:
        raise FormatError(f"{name} is empty: 0 bytes; was the upload or download cut short?")
    if size > limits.max_bytes:
        raise FormatError(f"{name} has {size:,} bytes, more than the limit of {limits.max_bytes:,}: is it a LoRA?")
    opening = read(0, min(size, 64))
    n_header = int.from_bytes(opening[:8], "little")
    if opening[8:9] != b"{" or n_header > size - 8:
        raise FormatError(_not_safetensors(opening, n_header, size, name))
    if n_header > limits.max_header_bytes:
        raise FormatError(f"{name} has a header of {n_header:,} bytes; the limit is {limits.max_header_bytes:,}")
    text = read(8, 8 + n_header)
    if len(text) != n_header:
        raise FormatError(f"{name} gave {len(text):,} of the {n_header:,} bytes of its header: did it change just now?")
    entries = _json_object(text, name)
    metadata = _metadata(entries.pop("__metadata__", {}), name)
    if len(entries) > limits.max_tensors:
        raise FormatError(f"{name} has {len(entries):,} tensors; the limit is {limits.max_tensors:,}: is it a LoRA?")
    tensors = {key: _tensor_info(key, entry, name) for key, entry in entries.items()}
    _check_offsets(tensors, size - 8 - n_header, name)
    return Header(tensors, metadata, size, 8 + n_header)


def read_header_file(path: Path | str, limits: Limits = LIMITS, *, name: str | None = None) -> Header:
    """`read_header` of a local file; FormatError also where there is none, or a directory."""
    path = Path(path)
    name = name or str(path)
    if path.is_dir():
        raise FormatError(f"{name} is a directory: name the .safetensors file in it")
    try:
        with path.open("rb") as file:
            return read_header(_reader(file), path.stat().st_size, name, limits)
    except OSError as error:
        raise FormatError(f"{name} cannot be read: {error.strerror or error}") from error


def read_header_bytes(content: bytes, name: str, limits: Limits = LIMITS) -> Header:
    return read_header(lambda start, stop: content[start:stop], len(content), name, limits)


def shown(text: str, length: int = 120) -> str:
    """Text from a file, made fit for a message: one line, printable, not too long."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if len(line) <= length else line[: length - 1] + "…"


def few(names: list[str], count: int = 3) -> str:
    """The first few names and how many more: `a, b, c and 9 more`."""
    first = ", ".join(shown(name) for name in names[:count])
    return first if len(names) <= count else f"{first} and {len(names) - count} more"


def _reader(file: Any) -> Read:
    def read(start: int, stop: int) -> bytes:
        file.seek(start)
        return file.read(stop - start)

    return read


def _not_safetensors(opening: bytes, n_header: int, size: int, name: str) -> str:
    kind = next((kind for magic, kind in MAGIC if opening.startswith(magic)), None)
    if kind and "archive" not in kind and "pickle" not in kind:
        return f"{name} is {kind}; a LoRA in the safetensors format is expected"
    if kind:
        return (
            f"{name} is {kind}; only safetensors is read, because loading the other formats can run code:"
            " convert it to safetensors first"
        )
    if opening[8:9] == b"{":
        return f"{name} is truncated: its header alone takes {n_header:,} bytes, the file has {size:,}; fetch it again"
    return f"{name} is no safetensors file: it does not begin with a header length and a JSON header"


def _json_object(text: bytes, name: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            doubled = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise FormatError(f"{name} names {shown(doubled)!r} twice in its header")
        return entries

    try:
        entries = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name} has a header that is no JSON ({shown(str(error))}): is the file damaged?") from error
    if not isinstance(entries, dict):
        raise FormatError(f"{name} has a header that is no JSON object")
    return entries


def _metadata(entries: object, name: str) -> dict[str, str]:
    if not isinstance(entries, dict) or not all(isinstance(value, str) for value in entries.values()):
        raise FormatError(f"{name} has a __metadata__ entry that is no map of strings to strings")
    return entries


def _tensor_info(key: str, entry: Any, name: str) -> TensorInfo:
    if not key.isprintable() or len(key) > 500:
        raise FormatError(f"{name} has a tensor whose name is no sensible text: {shown(repr(key))}")
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, stop]} if len(entry) == 3:
            if not all(type(n) is int and 0 <= n <= 2**40 for n in (*shape, start, stop)) or len(shape) > 8:
                raise FormatError(f"{name}: tensor {shown(key)} has an impossible shape or offsets")
        case _:
            raise FormatError(f"{name}: tensor {shown(key)} is not described by dtype, shape and data_offsets")
    if dtype not in DTYPE_BYTES:
        raise FormatError(f"{name}: tensor {shown(key)} has the unknown dtype {shown(dtype)}")
    if stop - start != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise FormatError(
            f"{name}: tensor {shown(key)} of shape {list(shape)} and dtype {dtype} cannot lie in {stop - start} bytes"
        )
    return TensorInfo(dtype, tuple(shape), start, stop)


def _check_offsets(tensors: Mapping[str, TensorInfo], n_values: int, name: str) -> None:
    """The values tile the rest of the file: in order, without overlap or hole, to its end."""
    position = 0
    for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != position:
            fault = "overlaps the tensor before it" if tensor.start < position else "leaves a hole before it"
            raise FormatError(f"{name}: tensor {shown(key)} {fault}: its header does not describe the file")
        position = tensor.stop
    if position > n_values:
        raise FormatError(
            f"{name} is truncated: its header describes {position:,} bytes of values, the file holds {n_values:,};"
            " fetch it again"
        )
    if position < n_values:
        raise FormatError(f"{name} has {n_values - position:,} bytes behind its last tensor: is the file damaged?")
