"""What a worker merges from: LoRAs, what was observed of them, and pictures, each read or made once and kept in caches.

A calibration is kept on the node's disk too, where its other workers find it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from service.caches import Cache, memory_share
from service.device import Device
from service.errors import BadInput
from service.inputs import LocalCache, user_cache
from service.jobs import Concept, Job, TrainJob
from service.messages import WorkerSettings
from service.node_cache import NodeCache
from service.translation import BrokenLoRA
from ziplora import formats
from ziplora.adapter_files import read_adapter
from ziplora.base import Base
from ziplora.calibrate import Calibration, calibrate
from ziplora.calibration_files import calibration_key, read_calibration, write_calibration
from ziplora.calibration_settings import CalibrationSettings
from ziplora.errors import FormatError, LoRAError
from ziplora.lora import LoRA, n_bytes, scaled
from ziplora.merged import Pictures


@dataclass(slots=True)
class Prepared:
    """A job with all that its merge needs; `stages` in seconds so far, `peak_bytes` while it was merged."""

    job: Job
    knobs: Any
    subject: LoRA
    style: LoRA
    calibrations: tuple[Calibration | None, Calibration | None]
    stages: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    neighbours: int = 0  # merged with it, side by side
    pictures: Pictures | None = None  # of a method that trains


@dataclass(frozen=True, slots=True)
class Used:
    """How often each cache had what was asked for and how often not, and what was downloaded, since last asked."""

    hits: dict[str, int]
    misses: dict[str, int]
    n_bytes: int


class Inputs:
    """`base_digest`: of the base's files; a calibration belongs to one base."""

    def __init__(self, settings: WorkerSettings, base: Base, base_digest: str, device: Device) -> None:
        self.base, self.base_digest = base, base_digest
        cache_dir = Path(settings.cache_dir) if settings.cache_dir else user_cache()
        self.files = LocalCache(cache_dir, settings.cache_bytes)
        self.observed = NodeCache(cache_dir / "calibrations", settings.cache_bytes // 2)
        memory = settings.memory_cache_bytes or memory_share(settings.workers_per_node)
        self.loras: Cache[LoRA] = Cache(memory, n_bytes)
        # beside the model in the GPU's memory, unlike the LoRAs
        room = (device.n_bytes or memory) // 4
        self.calibrations: Cache[Calibration] = Cache(room, lambda calibration: calibration.n_bytes)
        self._counted: dict[str, int] = {}

    def lora(self, concept: Concept) -> LoRA:
        """As the concept weighs it. BrokenLoRA where its file cannot be used with whatever partner."""

        def load() -> LoRA:
            with self.files.hold(concept.lora, concept.lora_sha256) as path:
                try:
                    return formats.read_lora(path, name=concept.lora).lora
                except LoRAError as error:
                    raise BrokenLoRA(f"{concept.role} {concept.id}: {error}", concept.lora_sha256) from error

        lora = self.loras.get(concept.lora_sha256, load)
        return lora if concept.weight == 1.0 else scaled(lora, concept.weight)

    def adapter(self, concept: Concept) -> LoRA:
        """Of a masked-token base. BrokenLoRA where its file cannot be used."""

        def load() -> LoRA:
            with self.files.hold(concept.lora, concept.lora_sha256) as path:
                try:
                    return read_adapter(path)[0]
                except FormatError as error:
                    raise BrokenLoRA(f"{concept.role} {concept.id}: {error}", concept.lora_sha256) from error

        return self.loras.get(concept.lora_sha256, load)

    def calibration(self, concept: Concept, lora: LoRA, settings: CalibrationSettings) -> Calibration:
        """What the method must know of the LoRA, observed by this worker or another of its node."""
        images = [image.sha256 for image in concept.images]
        key = calibration_key(
            concept.lora_sha256, concept.weight, concept.prompt, images, settings, self.base_digest, self.base.dtype
        )

        def observed() -> bytes:
            return write_calibration(
                calibrate(self.base, lora, concept.prompt, self.images(concept), settings, concept.lora_sha256)
            )

        def load() -> Calibration:
            # as read back even where it was just made: what is written is rounded, and a job's result shall not depend
            # on whether another was here before
            try:
                return read_calibration(self.observed.get(key, observed), self.base)
            except FormatError:  # not whole, or of another version
                self.observed.forget(key)
                return read_calibration(self.observed.get(key, observed), self.base)

        return self.calibrations.get(key, load)

    def images(self, concept: Concept | TrainJob) -> list[Image.Image]:
        """Its pictures as RGB. BadInput where one cannot be read."""
        pictures = []
        for image in concept.images:
            try:
                with self.files.hold(image.location, image.sha256) as path, Image.open(path) as picture:
                    pictures.append(ImageOps.exif_transpose(picture).convert("RGB"))
            except (UnidentifiedImageError, OSError) as error:
                raise BadInput(
                    f"{image.location} ({concept.role} {concept.id}) is no readable image: {error}"
                ) from error
        return pictures

    def used(self) -> Used:
        caches: dict[str, Cache[Any] | NodeCache] = {
            "lora": self.loras,
            "calibration": self.calibrations,
            "calibration_file": self.observed,
        }
        now = {"bytes": self.files.downloaded_bytes}
        for name, cache in caches.items():
            now |= {f"{name} hit": cache.hits, f"{name} miss": cache.misses}
        new = {name: n - self._counted.get(name, 0) for name, n in now.items()}
        self._counted = now
        hits = {name: new[f"{name} hit"] for name in caches}
        return Used(hits, {name: new[f"{name} miss"] for name in caches}, new["bytes"])
