"""What the sections of a manifest come to, checked and resolved: LoRAs, merges, samples, scorers. Values only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.jobs import Role, SamplePrompt
from service.scorer_files import Kind
from service.wording import FieldPath


@dataclass(frozen=True, slots=True)
class LoRASpec:
    """A subject or style with resolved locations: absolute paths or s3 URLs, patterns expanded.

    `lora` is '' where there are only images. `training`: how a LoRA is then trained on them, fields of TrainSettings
    but the prompt and the trigger, as JSON values.
    """

    id: str
    role: Role
    lora: str
    prompt: str
    trigger: str | None
    images: tuple[str, ...]
    weight: float
    training: Mapping[str, Any]
    priority: int = 0

    @property
    def field(self) -> FieldPath:
        return (f"{self.role}s", self.id)


@dataclass(frozen=True, slots=True)
class MergeSpec:
    """A method with all its knobs, as JSON values, and its seeds; `given`: the knobs that the file sets."""

    method: str
    knobs: Mapping[str, Any]
    seeds: tuple[int, ...]
    given: frozenset[str]
    candidates: tuple["MergeSpec", ...] = ()  # of `best`, in the order in which they are tried; its knobs hold them too
    field: FieldPath = ("merge",)  # where it stands


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """Sample settings as far as the file gives them: None is left to the base. No image when an axis is empty."""

    prompts: tuple[SamplePrompt, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance: float | None
    size: tuple[int, int] | None  # width, height
    scheduler: str | None
    negative: str
    style_strengths: tuple[float, ...]

    @property
    def n_images(self) -> int:
        return len(self.prompts) * len(self.seeds) * len(self.style_strengths)


@dataclass(frozen=True, slots=True)
class ScorerSpec:
    """A model that judges samples: absolute directory or hub id."""

    kind: Kind
    location: str
    revision: str | None
