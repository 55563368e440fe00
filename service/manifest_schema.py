"""The manifest as JSON Schema, so that an editor completes and checks what a user writes."""

from typing import Any

from pydantic import TypeAdapter

from service.choose import BEST
from service.manifest_file import DEFAULT_METHOD, BestSection, ManifestFile, Seeds
from ziplora.methods import METHODS


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
