"""The fields of a manifest file: names, types, bounds, descriptions; checked, and as JSON Schema. Owns pydantic."""

import json
import math
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)

from service.choose import BEST
from service.wording import Fault, FieldPath, shown, unknown
from ziplora.methods import METHODS

DEFAULT_METHOD = "ziplora"
MAX_SEED = 2**63 - 1

SchedulerName = Literal["ddim", "ddpm", "euler", "euler-ancestral", "dpm++2m", "dpm++2m-karras", "unipc"]


def _no_control_characters(text: str) -> str:
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs"):
            raise ValueError(f"holds the control character {character!r}; remove it")
    return text


def _listed(value: Any) -> Any:
    """One value stands for a list of it."""
    return [value] if isinstance(value, str | int | float) and not isinstance(value, bool) else value


def _squared(value: Any) -> Any:
    return [value, value] if isinstance(value, int) and not isinstance(value, bool) else value


def _located(value: Any) -> Any:
    return {"location": value} if isinstance(value, str) else value


Location = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000)]
Text = Annotated[Location, AfterValidator(_no_control_characters)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Seeds = Annotated[list[Seed], BeforeValidator(_listed, json_schema_input_type=Seed | list[Seed])]
Images = Annotated[list[Location], BeforeValidator(_listed, json_schema_input_type=str | list[str])]
Pixels = Annotated[int, Field(ge=8, le=8192)]
Size = Annotated[
    list[Pixels],
    Field(min_length=2, max_length=2),
    BeforeValidator(_squared, json_schema_input_type=Pixels | list[Pixels]),
]
Strengths = Annotated[
    list[Annotated[float, Field(ge=0, le=2)]], BeforeValidator(_listed, json_schema_input_type=float | list[float])
]
Outputs = Annotated[
    list[Literal["peft"]], BeforeValidator(_listed, json_schema_input_type=Literal["peft"] | list[Literal["peft"]])
]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class BaseSection(Strict):
    location: Location = Field(
        description="a diffusers directory, s3://bucket/prefix, or a hub id such as"
        " stabilityai/stable-diffusion-xl-base-1.0"
    )
    revision: Text | None = Field(None, description="commit, branch or tag of a hub id")


class ScorerSection(Strict):
    location: Location = Field(description="a model's directory, or a hub id such as openai/clip-vit-base-patch32")
    revision: Text | None = Field(None, description="commit, branch or tag of a hub id")


Scorer = Annotated[ScorerSection | None, BeforeValidator(_located, json_schema_input_type=str | ScorerSection | None)]


class ScoresSection(Strict):
    """Who judges the samples; without it there are no scores."""

    clip: Scorer = Field(
        default=None, description="a CLIP: alignment of the samples with the style's images, and with their prompts"
    )
    dino: Scorer = Field(
        default=None,
        description="a self-supervised ViT or ResNet such as DINO: alignment of the samples with the subject's images",
    )


class TrainingSection(Strict):
    """How LoRAs are trained for subjects and styles that give images and no LoRA. Fields and defaults are those of
    TrainSettings: the paper's."""

    rank: int = Field(default=64, ge=1, le=1024, description="rank of the update of each layer")
    alpha: float | None = Field(
        default=None, gt=0, description="the update is scaled by alpha/rank; as rank if not given"
    )
    steps: int = Field(default=1000, ge=1, description="updates in all")
    batch: int = Field(default=1, ge=1, description="pictures per update")
    lr: float = Field(default=5e-5, gt=0, le=1, description="learning rate")
    lr_schedule: Literal["constant", "cosine"] = Field(default="constant", description="learning rate over the steps")
    seed: Seed = Field(default=0, description="decides noise and order")
    size: Pixels | None = Field(default=None, description="side of the pictures in pixels; as the base was trained")
    prior_prompt: Text | None = Field(
        default=None, description="prior preservation: keep what the base knows of, say, 'a photo of a dog'"
    )
    prior_images: int = Field(default=32, ge=1, description="pictures of it that the base makes first")
    prior_weight: float = Field(default=1.0, ge=0, description="its weight in the loss")
    gradient_checkpointing: bool = Field(default=False, description="less memory, more time")


class LoRASection(Strict):
    """One subject or style."""

    lora: Location | None = Field(
        None, description="the LoRA file: a path or s3://bucket/key; without it, one is trained on the images"
    )
    prompt: Text = Field(description="the prompt that the LoRA was trained with, such as 'a photo of sks dog'")
    trigger: Text | None = Field(None, description="the words that stand for it in sample prompts, such as 'sks dog'")
    images: Images = Field([], description="reference images: paths, s3://bucket/key, or patterns such as dog/*.png")
    weight: float = Field(1.0, ge=-10, le=10, description="scales the whole LoRA")
    training: TrainingSection = Field(
        TrainingSection(), description="what differs from the manifest's training, where its LoRA is trained"
    )
    priority: int = Field(
        0,
        ge=-1000,
        le=1000,
        description="pairs with a higher sum of both priorities are done first; no part of the result",
    )


class SamplesSection(Strict):
    """What is sampled from each merge: prompts × seeds × style_strengths."""

    prompts: Any = Field(
        default=None, description="templates with {subject} and {style}: a list, or a mapping of name: template"
    )
    seeds: Seeds = Field(default=[0], max_length=10_000, description="one image per seed")
    steps: int = Field(default=50, ge=1, le=1000, description="denoising steps")
    guidance: float | None = Field(default=None, ge=0, le=100, description="classifier-free guidance scale")
    size: Size | None = Field(default=None, description="pixels: one side, or [width, height]")
    scheduler: SchedulerName | None = Field(default=None, description="a scheduler's name; the base's own if not given")
    negative: Annotated[str, StringConstraints(strip_whitespace=True), AfterValidator(_no_control_characters)] = Field(
        default="", description="negative prompt"
    )
    style_strengths: Strengths = Field(default=[1.0], description="factors of the style half, such as [1.0, 0.7, 0.4]")


class BestSection(Strict):
    """`method: best`, beside its seeds."""

    of: list[Any] = Field(min_length=2, max_length=32, description="methods, or mappings of method and knobs")
    by: Literal["harmonic", "style", "subject", "text"] = Field(
        default="harmonic", description="the score that decides; harmonic: the mean of style and subject alignment"
    )
    good_enough: float | None = Field(default=None, ge=-1, le=1, description="a score with which no other is tried")


class ManifestFile(Strict):
    """The whole file. `pairs`, `merge` and `samples.prompts` have several spellings and are read apart."""

    base: Annotated[BaseSection, BeforeValidator(_located, json_schema_input_type=str | BaseSection)] = Field(
        description="the base model: a diffusers directory, s3://bucket/prefix or a hub id"
    )
    subjects: dict[str, LoRASection] = Field(min_length=1, description="at least one subject, id: {lora: …, prompt: …}")
    styles: dict[str, LoRASection] = Field(min_length=1, description="at least one style, id: {lora: …, prompt: …}")
    pairs: Any = Field(
        "all", description="all, {include: [subject/style patterns], exclude: […]}, or a list of [subject, style]"
    )
    merge: Any = Field(None, description="a method with its knobs, or a list of them")
    samples: SamplesSection = Field(SamplesSection(), description="what to sample from each merge; {} for nothing")
    training: TrainingSection = Field(
        TrainingSection(), description="how LoRAs are trained where there are images only; the paper's settings"
    )
    scores: ScoresSection = Field(ScoresSection(), description="models that judge the samples: {clip: …, dino: …}")
    outputs: Outputs = Field([], description="objects on request: peft, the merged LoRA in PEFT layout too")
    output: Location = Field(description="where the catalog goes: a directory or s3://bucket/prefix")


# Checks: the value or None, and all faults


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


# JSON Schema


def manifest_schema() -> dict[str, Any]:
    """The manifest's JSON Schema (2020-12), for editors that complete and check YAML; knobs as in METHODS."""
    schema = ManifestFile.model_json_schema(mode="validation")
    named = schema["properties"]
    text = {"type": "string"}
    texts = {"anyOf": [text, {"type": "array", "items": text}]}
    patterns = {"type": "object", "properties": {"include": texts, "exclude": texts}, "additionalProperties": False}
    pair = {"type": "array", "items": text, "minItems": 2, "maxItems": 2}
    named["pairs"]["anyOf"] = [{"const": "all"}, patterns, {"type": "array", "items": pair}]
    merges = [{"enum": list(METHODS)}, *map(_method_schema, METHODS)]
    every = [*merges, _best_schema(merges)]
    named["merge"]["anyOf"] = [*every, {"type": "array", "items": {"anyOf": every}, "minItems": 1}]
    prompts = schema["$defs"]["SamplesSection"]["properties"]["prompts"]
    prompts["anyOf"] = [*texts["anyOf"], {"type": "object", "additionalProperties": text}]
    for several_spellings in (named["merge"], prompts, named["samples"], named["scores"]):
        several_spellings.pop("default", None)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "ZipLoRA batch manifest",
        "patternProperties": {"^x-": {"description": "anchors for reuse; not looked at"}},
    }


def _method_schema(name: str) -> dict[str, Any]:
    seeds = TypeAdapter(Seeds).json_schema()
    knobs = TypeAdapter(METHODS[name].knobs).json_schema().get("properties", {})
    return {
        "type": "object",
        "description": METHODS[name].summary,
        "properties": {"method": {"const": name}, "seed": seeds, "seeds": seeds, **knobs},
        "required": [] if name == DEFAULT_METHOD else ["method"],
        "additionalProperties": False,
    }


def _best_schema(candidates: list[dict[str, Any]]) -> dict[str, Any]:
    seeds = TypeAdapter(Seeds).json_schema()
    fields = BestSection.model_json_schema()["properties"]
    fields["of"]["items"] = {"anyOf": candidates}
    return {
        "type": "object",
        "description": "of several methods, for each pair the one with the highest score",
        "properties": {"method": {"const": BEST}, "seed": seeds, "seeds": seeds, **fields},
        "required": ["method", "of"],
        "additionalProperties": False,
    }
