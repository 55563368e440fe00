"""`lora_adapter_metadata`: the PEFT configuration that diffusers saves in a header, and the scale it gives a module."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ziplora.errors import FormatError, LoRAError, UnsupportedAdapter
from ziplora.headers import few, shown
from ziplora.other_adapters import ADVICE

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
MAX_WILD_PATTERNS = 100


@dataclass(frozen=True, slots=True)
class Patterns:
    """PEFT's rank_pattern or alpha_pattern: the first that matches a module's name counts, `(.*\\.)?(pattern)$`.

    PEFT runs them as regular expressions. A file from anywhere gets no such power: names, `^` and `.*` are read.
    """

    plain: Mapping[str, tuple[int, float]]  # a name, or the end of one → (place, value)
    whole: Mapping[str, tuple[int, float]]  # begins with ^
    wild: tuple[tuple[int, bool, list[str], float], ...]  # (place, begins with ^, the pieces between `.*`, value)

    def get(self, inner: str, default: float) -> float:
        names = dict.fromkeys((inner, inner.removeprefix("text_model.")))
        ends = [name[i:] for name in names for i in (0, *(i + 1 for i, c in enumerate(name) if c == "."))]
        hits = [self.plain[end] for end in ends if end in self.plain]
        hits += [self.whole[name] for name in names if name in self.whole]
        for place, anchored, pieces, value in self.wild:
            if any(_in_order(pieces, end) for end in (names if anchored else ends)):
                hits.append((place, value))
        return min(hits)[1] if hits else default


@dataclass(frozen=True, slots=True)
class ComponentConfig:
    """What decides the scale in one component's LoraConfig."""

    r: float | None
    lora_alpha: float | None
    rank_pattern: Patterns
    alpha_pattern: Patterns
    use_rslora: bool


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    components: Mapping[str, ComponentConfig]

    def scale(self, path: str, rank: int, name: str) -> float:
        """alpha/rank, or alpha/√rank with use_rslora (arXiv 2312.03732); 1 where nothing is said of the component.

        Raises FormatError if the stated rank is not that of the tensors.
        """
        owner, _, inner = path.partition(".")
        config = self.components.get(owner)
        if config is None:
            return 1.0
        stated = config.rank_pattern.get(inner, config.r if config.r is not None else rank)
        if stated != rank:
            raise FormatError(f"{name}: its header says rank {stated:g} for {path}, its tensors have rank {rank}")
        alpha = config.alpha_pattern.get(inner, config.lora_alpha if config.lora_alpha is not None else rank)
        return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def read_config(metadata: Mapping[str, str], name: str) -> tuple[AdapterConfig | None, list[LoRAError]]:
    """The configuration in a header's metadata, or None, and all that in it which is refused."""
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return None, []
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        return None, [FormatError(f"{name}: lora_adapter_metadata in its header is no JSON object")]
    refusals = _other_kinds(config, name)
    try:
        return AdapterConfig(_components(config, name)), refusals
    except FormatError as error:
        return None, [*refusals, error]


def _other_kinds(config: Mapping[str, Any], name: str) -> list[LoRAError]:
    refusals: list[LoRAError] = []
    for option, kind in (("use_dora", "DoRA"), ("lora_bias", "LoRA bias")):
        if keys := [key for key, value in config.items() if key.rpartition(".")[2] == option and value]:
            what = f"{name} is not a plain LoRA: its header says {few(keys)} ({kind})"
            refusals.append(UnsupportedAdapter(f"{what}; {ADVICE}"))
    for key, value in config.items():
        start = value.partition("_")[0].lower() if isinstance(value, str) else ""
        if key.rpartition(".")[2] == "init_lora_weights" and start in ("pissa", "olora", "corda", "loftq"):
            what = f"{name} is not a plain LoRA: it began with {shown(value)}, which changes the base model"
            refusals.append(UnsupportedAdapter(f"{what}; {ADVICE}"))
    return refusals


def _components(config: Mapping[str, Any], name: str) -> dict[str, ComponentConfig]:
    """One configuration per component; one without component names holds for all."""
    prefixes = tuple(f"{owner}." for owner in COMPONENTS)
    common = {key: value for key, value in config.items() if not key.startswith(prefixes)}
    components = {}
    for owner in COMPONENTS:
        own = {key.removeprefix(f"{owner}."): v for key, v in config.items() if key.startswith(f"{owner}.")} or common
        if "r" in own or "lora_alpha" in own:
            components[owner] = ComponentConfig(
                _number(own["r"], name) if "r" in own else None,
                _number(own["lora_alpha"], name) if "lora_alpha" in own else None,
                _patterns(own.get("rank_pattern"), name),
                _patterns(own.get("alpha_pattern"), name),
                bool(own.get("use_rslora")),
            )
    return components


def _number(value: object, name: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and -1e9 < value < 1e9:
        return value
    raise FormatError(f"{name}: its header gives {shown(str(value))} as a rank or alpha; a number is expected")


def _patterns(entries: object, name: str) -> Patterns:
    if entries is None:
        entries = {}
    if not isinstance(entries, dict):
        raise FormatError(f"{name}: rank_pattern and alpha_pattern in its header must be maps")
    plain: dict[str, tuple[int, float]] = {}
    whole: dict[str, tuple[int, float]] = {}
    wild: list[tuple[int, bool, list[str], float]] = []
    for place, (pattern, value) in enumerate(entries.items()):
        number = _number(value, name)
        anchored = pattern.startswith("^")
        text = pattern.removeprefix("^").removesuffix("$").replace(r"\.", ".")
        pieces = text.split(".*")
        if not re.fullmatch(r"[\w.]*", "".join(pieces)) or len(wild) > MAX_WILD_PATTERNS:
            raise FormatError(
                f"{name}: the pattern {shown(pattern)} in its header is more than a module name with `.*`"
            )
        if len(pieces) > 1:
            wild.append((place, anchored, pieces, number))
        else:
            (whole if anchored else plain).setdefault(text, (place, number))
    return Patterns(plain, whole, tuple(wild))


def _in_order(pieces: list[str], text: str) -> bool:
    """Whether the text is these pieces, two or more, with anything between them."""
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
