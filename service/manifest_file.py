"""The fields of a manifest file: names, types, bounds, descriptions. Checked in manifest_checks.py, shown to editors in
manifest_schema.py; the fields of `merge` are those of METHODS and of `best`."""

import unicodedata
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

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
