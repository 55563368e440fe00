"""What a LoRA is trained with and on, as values. Nothing heavy is imported: a command line reads its defaults here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
        if not self.trigger.strip() or self.trigger not in self.prompt:
            raise ValueError(f"the prompt {self.prompt!r} does not contain the trigger {self.trigger!r}")
        for name in ("rank", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}; it must be a finite number above 0")


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
    captions = []
    for path in paths:
        file = path.with_suffix(".txt")
        try:
            caption = file.read_text(encoding="utf-8").strip() if file.is_file() else settings.prompt
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the caption {file} cannot be read as text: {error}") from error
        if settings.trigger not in caption:
            raise ValueError(f"the caption {file}, {caption!r}, does not contain the trigger {settings.trigger!r}")
        captions.append(caption)
    return captions
