"""`lora_adapter_metadata`: the PEFT configuration that diffusers saves in a header, and the scale it gives a module."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from ziplora.errors import FormatError, LoRAError, UnsupportedAdapter
from ziplora.headers import few, shown
from ziplora.other_adapters import ADVICE


def read_config(metadata: Mapping[str, str], name: str) -> tuple[Mapping[str, Any], list[LoRAError]]:
    """The configuration, its keys prefixed with the component, or {} if there is none; and what in it is refused."""
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return {}, []
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        return {}, [FormatError(f"{name}: lora_adapter_metadata in its header is no JSON object")]
    refusals: list[LoRAError] = []
    for option, kind in (("use_dora", "DoRA"), ("lora_bias", "LoRA bias")):
        if keys := [key for key, value in config.items() if key.rpartition(".")[2] == option and value]:
            what = f"{name} is not a plain LoRA: its header says {few(keys)} ({kind})"
            refusals.append(UnsupportedAdapter(f"{what}; {ADVICE}"))
    for key, value in config.items():
        start = str(value).partition("_")[0].lower()
        if key.rpartition(".")[2] == "init_lora_weights" and start in ("pissa", "olora", "corda", "loftq"):
            what = f"{name} is not a plain LoRA: it began with {shown(str(value))}, which changes the base model"
            refusals.append(UnsupportedAdapter(f"{what}; {ADVICE}"))
    return config, refusals


def scale_of(config: Mapping[str, Any], path: str, rank: int, name: str) -> float:
    """alpha/rank, or alpha/√rank with use_rslora (arXiv 2312.03732), as PEFT resolves them for this module."""
    owner, _, inner = path.partition(".")
    prefixes = ("unet.", "text_encoder.", "text_encoder_2.")
    own = {key.removeprefix(f"{owner}."): value for key, value in config.items() if key.startswith(f"{owner}.")}
    own = own or {key: value for key, value in config.items() if not key.startswith(prefixes)}
    if "r" not in own and "lora_alpha" not in own:
        return 1.0
    stated = _resolve(own.get("rank_pattern"), inner, own.get("r", rank), name)
    if stated != rank:
        raise FormatError(f"{name}: its header says rank {stated:g} for {path}, its tensors have rank {rank}")
    alpha = _resolve(own.get("alpha_pattern"), inner, own.get("lora_alpha", rank), name)
    return alpha / math.sqrt(rank) if own.get("use_rslora") else alpha / rank


def _resolve(patterns: object, inner: str, default: object, name: str) -> float:
    """The value of the first pattern that names this module, as PEFT's get_pattern_key: `(.*\\.)?(pattern)$`."""
    if patterns is not None and not isinstance(patterns, dict):
        raise FormatError(f"{name}: rank_pattern and alpha_pattern in its header must be maps")
    names = (inner, inner.removeprefix("text_model."))
    value = next((v for key, v in (patterns or {}).items() if any(_names(key, each, name) for each in names)), default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise FormatError(f"{name}: its header gives {shown(str(value))} as a rank or alpha; a number is expected")
    return value


def _names(pattern: str, inner: str, name: str) -> bool:
    """PEFT matches patterns as regular expressions. Those of a file from anywhere are not run: names and `.*` only."""
    plain = pattern.removeprefix("^").removesuffix("$").replace(r"\.", ".")
    pieces = plain.split(".*")
    if not re.fullmatch(r"[\w.]*", "".join(pieces)):
        raise FormatError(f"{name}: the pattern {shown(pattern)} in its header is more than a module name with `.*`")
    starts = [0, *(i + 1 for i, c in enumerate(inner) if c == "." and not pattern.startswith("^"))]
    return any(_in_order(pieces, inner[start:]) for start in starts)


def _in_order(pieces: list[str], text: str) -> bool:
    """Whether the text is these pieces with anything between them."""
    if len(pieces) == 1:
        return text == pieces[0]
    first, *middle, last = pieces
    if not text.startswith(first):
        return False
    position = len(first)
    for piece in middle:
        position = text.find(piece, position)
        if position < 0:
            return False
        position += len(piece)
    return text.endswith(last) and len(text) - len(last) >= position
