"""A miniature of SDXL, trained on a synthetic world whose truth is known: the demo, and every claim testable on a CPU.

`path()` is a `StableDiffusionXLPipeline` directory; `SUBJECTS` and `STYLES` are LoRAs for it, with their pictures and
prompts; `scorer("clip" | "dino" | "recogniser")` are its judges. Importing this loads no weights and no torch.
"""

import json
from dataclasses import dataclass
from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True, slots=True)
class Concept:
    """A trained subject or style. `name` is its name in `ziplora.pocket.world`, where its true pictures can be
    rendered."""

    name: str
    prompt: str  # its pictures' caption, as trained
    trigger: str  # the words that stand for it in a prompt
    lora: Path
    images: tuple[Path, ...]
    layout: str  # how the LoRA file names its keys


def path() -> Path:
    """The base model's directory."""
    return WEIGHTS / "base"


def scorer(name: str) -> Path:
    """Directory of a judge: `clip` (CLIPModel), `dino` (ResNetModel) or `recogniser`
    (ResNetForImageClassification)."""
    return WEIGHTS / "scorers" / name


def _concepts(role: str) -> tuple[Concept, ...]:
    index = WEIGHTS / "loras.json"
    entries = json.loads(index.read_text())[role] if index.exists() else []
    return tuple(
        Concept(
            entry["name"],
            entry["prompt"],
            entry["trigger"],
            WEIGHTS / entry["lora"],
            tuple(WEIGHTS / image for image in entry["images"]),
            entry["layout"],
        )
        for entry in entries
    )


SUBJECTS = _concepts("subjects")
STYLES = _concepts("styles")
