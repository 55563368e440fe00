"""What a LoRA is trained with and on, as values. Nothing heavy is imported: a command line reads its defaults here."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ziplora.calibration_settings import Passes

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """`prompt` describes the pictures and contains `trigger`. With `prior_prompt`, the base's own pictures of it are
    learned too, so that the class keeps its variety (prior preservation)."""

    prompt: str
    trigger: str
    rank: int = 64
    alpha: float | None = None  # None: as rank, scale 1
    steps: int = 1000
    batch: int = 1
    lr: float = 5e-5
    lr_schedule: Literal["constant", "cosine"] = "constant"
    seed: int = 0
    size: int | None = None  # pixels; None: what the base was trained at
    prior_prompt: str | None = None
    prior_images: int = 32
    prior_weight: float = 1.0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_trigger(self.prompt, self.trigger)
        for name in ("rank", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}; it must be a finite number above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class JointSettings(TrainSettings):
    """Of one LoRA for two concepts; `prompt` and `trigger` are the subject's, the style has its own."""

    style_prompt: str
    style_trigger: str

    def __post_init__(self) -> None:
        TrainSettings.__post_init__(self)
        check_trigger(self.style_prompt, self.style_trigger)


@dataclass(frozen=True, slots=True)
class JointKnobs:
    """Settings of joint training, the paper's by default. rank, and the rest of it: as for `ziplora train`. steps: of
    which half the pictures are the subject's and half the style's. batch: pictures per step. lr: Adam's learning rate.
    size: pixels of the pictures; None for what the base was trained at."""

    rank: int = 64
    steps: int = 1000
    batch: int = 1
    lr: float = 5e-5
    lr_schedule: Literal["constant", "cosine"] = "constant"
    size: int | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        TrainSettings("x", "x", **asdict(self))  # has the same bounds
        if self.size is not None and self.size < 8:
            raise ValueError(f"size is {self.size}; at least 8")

    def settings(self, subject: tuple[str, str], style: tuple[str, str], seed: int) -> JointSettings:
        """With (prompt, trigger) of both."""
        return JointSettings(*subject, style_prompt=style[0], style_trigger=style[1], seed=seed, **asdict(self))

    def passes(self) -> Passes:
        return Passes(backward=self.steps * self.batch)


def image_paths(location: str | Path) -> list[Path]:
    """The pictures of a directory in name order, or one picture file. ValueError when there are none."""
    place = Path(location)
    if not place.is_dir():
        return [place]
    paths = sorted(path for path in place.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"no pictures in {place}: expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return paths


def read_captions(paths: Sequence[Path], settings: TrainSettings) -> list[str]:
    """What each picture shows: the text of `dog.txt` beside `dog.png`, as kohya's trainer reads it, else the prompt.

    Captions that name what else is seen ("a sks dog in watercolour style", "a sks dog on a beach") keep it out of what
    the trigger stands for. ValueError for one that cannot be read or lacks the trigger.
    """
    return [_read_caption(path.with_suffix(".txt"), settings.prompt, settings.trigger) for path in paths]


def _read_caption(file: Path, prompt: str, trigger: str) -> str:
    try:
        return caption_of(file.read_bytes() if file.is_file() else None, prompt, trigger, str(file))
    except OSError as error:
        raise ValueError(f"the caption {file} cannot be read as text: {error}") from error


def caption_of(content: bytes | None, prompt: str, trigger: str, name: str) -> str:
    """The caption in a file's bytes, the prompt where there is no file. ValueError naming the file."""
    if content is None:
        return prompt
    try:
        caption = content.decode().strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"the caption {name} cannot be read as text: {error}") from error
    if trigger not in caption:
        raise ValueError(f"the caption {name}, {caption!r}, does not contain the trigger {trigger!r}")
    return caption


def check_trigger(prompt: str, trigger: str) -> None:
    """ValueError unless the words that stand for the concept are in its prompt."""
    if not trigger.strip() or trigger not in prompt:
        raise ValueError(f"the prompt {prompt!r} does not contain the trigger {trigger!r}")
