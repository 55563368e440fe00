"""A model card for one merged LoRA: README.md with the YAML front matter that the Hugging Face Hub reads.

Its texts come from an entry that somebody else may have written: front matter goes through the Hub's own writer, and in
the body they stand in code only, on one line, without backticks.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from service.entry import ALIGNMENTS, Entry, alignments

WEIGHTS = "pytorch_lora_weights.safetensors"  # what diffusers looks for in a directory or repository
TAGS = {
    "sdxl": ["stable-diffusion-xl", "stable-diffusion-xl-diffusers"],
    "sd15": ["stable-diffusion", "stable-diffusion-diffusers"],
}
MAX_TEXT = 500  # characters of any text that is quoted


@dataclass(frozen=True, slots=True)
class Picture:
    """A sample beside the card: its path there, and the prompt it was made with."""

    path: str
    prompt: str


def model_card(
    entry: Entry, pictures: Sequence[Picture], base_model: str | None = None, style_strength: float = 1.0
) -> str:
    """`base_model`: hub id of the base, which an entry knows by digest only; without it the front matter has none."""
    from huggingface_hub import ModelCardData  # a third of a second that other commands on catalogs need not wait for

    architecture = _text(entry.job.get("base"), "architecture")
    data = ModelCardData(
        base_model=base_model,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        instance_prompt=triggers(entry),
        tags=["text-to-image", "diffusers", "lora", "template:sd-lora", "ziplora", *TAGS.get(architecture, [])],
        widget=[{"text": picture.prompt, "output": {"url": picture.path}} for picture in pictures] or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_body(entry, pictures, base_model, architecture, style_strength)}"


def triggers(entry: Entry) -> str:
    """The trigger words of both LoRAs, as user interfaces show them."""
    found = (_text(entry.job.get(role), "trigger") for role in ("subject", "style"))
    return ", ".join(word for word in found if word)


def _body(
    entry: Entry, pictures: Sequence[Picture], base_model: str | None, architecture: str, style_strength: float
) -> str:
    title = f"{_plain(entry.subject)} × {_plain(entry.style)}"
    pipeline = "StableDiffusionPipeline" if architecture == "sd15" else "StableDiffusionXLPipeline"
    prompt = pictures[0].prompt if pictures else triggers(entry)
    base = _code(base_model) if base_model else f"the base with digest {_code(_text(entry.job.get('base'), 'digest'))}"
    rows = {
        "base": base,
        "method": f"{_code(entry.method)}, {_code(_json(entry.job.get('knobs')))}, seed {_code(entry.job.get('seed'))}",
        **{f"{role} LoRA": _source(entry, role) for role in ("subject", "style")},
        **({} if style_strength == 1.0 else {"style strength": f"{style_strength:g}"}),
        **{name.replace("_", " "): f"{value:.3f}" for name in ALIGNMENTS if (value := alignments(entry)[name])},
        "job": _code(entry.job_id),
        "made": f"{entry.created:%Y-%m-%d}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""# {title}

{"<Gallery />" if pictures else ""}

One LoRA that holds a subject and a style, merged from two with [ZipLoRA](https://arxiv.org/abs/2311.13600)'s batch
service. The same file loads in ComfyUI, A1111/Forge, InvokeAI and diffusers.

## Trigger words

{_code(triggers(entry)) or "none stated"}

## Use

```python
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained({json.dumps(base_model or "PATH/TO/THE/BASE")})
pipeline.load_lora_weights("PATH/TO/THIS/DIRECTORY")  # or this repository's id
image = pipeline({json.dumps(_plain(prompt), ensure_ascii=False)}).images[0]
```

## How it was made

| | |
|---|---|
{table}

Whether it may be shared depends on the licences of both LoRAs and of the base: state one here before you publish it.
"""


def _source(entry: Entry, role: str) -> str:
    sha256, prompt = _code(entry.lora_sha256(role)), _code(_text(entry.job[role], "prompt"))
    return f"sha256 {sha256}, trained with {prompt}" if sha256 else f"none: trained on its pictures, with {prompt}"


def _text(value: Any, name: str) -> str:
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, str) else ""


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _plain(value: Any) -> str:
    """On one line, without what Markdown, HTML or the code around it could read as its own."""
    text = " ".join(str(value).split())[:MAX_TEXT]
    return "".join(c for c in text if c.isprintable() and c not in "`<>|[]")


def _code(value: Any) -> str:
    plain = _plain(value)
    return f"`{plain}`" if plain else ""
