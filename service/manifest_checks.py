"""A manifest file's values against its fields: each check answers with the value, or None, and all faults, in our words
in place of pydantic's."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from service.manifest_file import (
    BaseSection,
    BestSection,
    LoRASection,
    ManifestFile,
    SamplesSection,
    ScorerSection,
    ScoresSection,
    Seeds,
    Text,
    TrainingSection,
)
from service.wording import Fault, FieldPath, shown, unknown
from ziplora.methods import METHODS


def check_file(raw: Mapping[str, Any]) -> tuple[ManifestFile | None, list[Fault]]:
    try:
        return ManifestFile.model_validate(raw), []
    except ValidationError as error:
        return None, [_file_fault(raw, one) for one in error.errors()]


def check_lora(raw: Mapping[str, Any]) -> LoRASection | None:
    """None if it has any fault: `check_file` tells which."""
    try:
        return LoRASection.model_validate(raw)
    except ValidationError:
        return None


def check_training(raw: Any) -> TrainingSection | None:
    """None if it has any fault: `check_file` tells which."""
    try:
        return TrainingSection.model_validate(raw)
    except ValidationError:
        return None


def check_seeds(value: Any, field: FieldPath) -> tuple[list[int] | None, list[Fault]]:
    seeds, faults = _checked(Seeds, value, field)
    if seeds is not None and (not seeds or len(set(seeds)) < len(seeds)):
        return None, [Fault(field, "expected at least one seed, each once")]
    return seeds, faults


def check_text(value: Any, field: FieldPath) -> tuple[str | None, list[Fault]]:
    return _checked(Text, value, field)


def check_knobs(method: str, given: Mapping[str, Any], field: FieldPath) -> tuple[dict[str, Any] | None, list[Fault]]:
    """Every knob of the method, defaults filled in, as JSON values."""
    known = list(METHODS[method].knob_names)
    faults = []
    for key, value in given.items():
        if key not in known:
            faults.append(Fault((*field, key), unknown(f"{method} has no such knob", [*known, "seed"], key)))
        elif isinstance(value, float) and not math.isfinite(value):
            faults.append(Fault((*field, key), f"expected a finite number, given {value}"))
    wrong = {fault.field[-1] for fault in faults}
    usable = {key: value for key, value in given.items() if key not in wrong}
    try:
        # by way of JSON: strict in types, yet a mapping becomes the dataclass and a list a tuple
        knobs: Any = TypeAdapter(METHODS[method].knobs).validate_json(json.dumps(usable), strict=True)
    except ValidationError as error:
        faults += [Fault((*field, *one["loc"][:1]), _text_of(one)) for one in error.errors()]
        return None, faults
    return (None if faults else json.loads(json.dumps(asdict(knobs)))), faults


def check_best(given: Mapping[str, Any], field: FieldPath) -> tuple[BestSection | None, list[Fault]]:
    """The fields of `method: best`; what its list of methods holds is for the caller to check."""
    try:
        return BestSection.model_validate(given), []
    except ValidationError as error:
        return None, [_best_fault(one, field) for one in error.errors()]


def _best_fault(error: Any, field: FieldPath) -> Fault:
    known = BestSection.model_fields
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return Fault((*field, name), unknown("best has no such field", [*known, "seed"], name))
    if error["type"] == "missing":
        return Fault(field, f"best has no {name}; expected a list of {known[name].description}, the cheapest first")
    return Fault((*field, name), _text_of(error))


def _checked(kind: Any, value: Any, field: FieldPath) -> tuple[Any, list[Fault]]:
    try:
        return TypeAdapter(kind).validate_python(value, strict=True), []
    except ValidationError as error:
        return None, [Fault((*field, *_written(value, one["loc"])), _text_of(one)) for one in error.errors()]


# pydantic's errors in our words


def _file_fault(raw: Mapping[str, Any], error: Any) -> Fault:
    field = _written(raw, error["loc"], missing=error["type"] == "missing")
    known = _model_of(field).model_fields
    name = str(field[-1])
    if error["type"] == "extra_forbidden":
        return Fault(field, unknown("unknown field", list(known), name))
    if error["type"] == "missing":
        return Fault(field, f"missing; expected {known[name].description}")
    if error["type"] == "too_short" and name in ("subjects", "styles"):
        return Fault(field, f"empty; expected {known[name].description}")
    return Fault(field, _text_of(error))


def _written(value: Any, loc: tuple[str | int, ...], *, missing: bool = False) -> FieldPath:
    """pydantic's location as the user wrote the field: `images: dog.png` is not images[0]."""
    field: FieldPath = ()
    for i, part in enumerate(loc):
        if isinstance(value, dict) and (part in value or (missing and i == len(loc) - 1)):
            field, value = (*field, part), value.get(str(part))
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            field, value = (*field, part), value[part]
    return field


def _model_of(field: FieldPath) -> type[BaseModel]:
    """The model whose field the last part of `field` is."""
    match field:
        case ("subjects" | "styles", _, "training", _, *_) | ("training", _, *_):
            return TrainingSection
        case ("subjects" | "styles", _, _, *_):
            return LoRASection
        case ("samples", _, *_):
            return SamplesSection
        case ("base", _, *_):
            return BaseSection
        case ("scores", _, _, *_):
            return ScorerSection
        case ("scores", _, *_):
            return ScoresSection
    return ManifestFile


EXPECTED = {
    "string_type": "text",
    "string_too_short": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping of fields",
    "model_type": "a mapping of fields",
}
BOUNDS = {
    "greater_than_equal": ("ge", "at least {:g}"),
    "greater_than": ("gt", "more than {:g}"),
    "less_than_equal": ("le", "at most {:g}"),
    "less_than": ("lt", "less than {:g}"),
    "too_short": ("min_length", "a list of at least {}"),
    "too_long": ("max_length", "a list of at most {}"),
    "string_too_long": ("max_length", "at most {} characters"),
}


def _text_of(error: Any) -> str:
    """What was expected, what was given."""
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind in BOUNDS:
        key, text = BOUNDS[kind]
        expected = text.format(context[key])
    elif kind == "literal_error":
        expected = "one of " + context["expected"].replace("'", "").replace(" or ", ", ")
    else:
        expected = EXPECTED.get(kind) or str(error["msg"]).removeprefix("Input should be ")
    quoted = "; put it in quotes" if kind == "string_type" and isinstance(given, int | float) else ""
    return f"expected {expected}, given {shown(given)}{quoted}"
