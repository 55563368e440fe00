"""One worker: a resident base model, caches, and a job from its LoRA files to a committed entry.

Runs the same in this process and as a Ray actor. What a job yields depends on the job alone, not on what the worker
did before: every random number comes from the job's own seeds, and the slots hold nothing over from the last pair.
"""

import json
import os
import resource
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from pydantic import TypeAdapter

from service.base_files import read_base
from service.catalog import Catalog
from service.errors import AlreadyCommitted, BadInput, Corrupted, ManifestError, NotFound, OutOfMemory, ServiceError
from service.inputs import LocalCache, user_cache
from service.jobs import ALGORITHM, Concept, Job, Role, identity, render
from service.scoring import Judges, alignments_of, scored
from service.storage import open_store
from ziplora import formats
from ziplora.base import Base, load_base
from ziplora.calibrate import Calibration, calibrate
from ziplora.errors import LoRAError
from ziplora.lora import LoRA, n_bytes, restyled, scaled
from ziplora.merged import Merged, Pair
from ziplora.methods import METHODS, CalibrationSettings
from ziplora.sample import sample_images

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Where the worker reads and writes, and what it runs on. `device` "auto" takes a GPU if there is one.

    `threads` is fixed so that results do not depend on the machine's core count: sums of floats do.
    """

    catalog: str
    base: str
    base_revision: str | None
    base_digest: str | None = None  # what the jobs were planned with; None: whatever is there
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 1
    cache_dir: str = ""
    cache_bytes: int = 50 * 2**30
    memory_cache_bytes: int = 4 * 2**30


@dataclass(frozen=True, slots=True)
class JobResult:
    """What came of one attempt. `kind` and `reason` are None unless it failed; `stages` in seconds."""

    job_id: str
    status: str  # committed | already | failed
    kind: str | None = None
    reason: str | None = None
    traceback: str | None = None
    stages: Mapping[str, float] = field(default_factory=dict)
    n_bytes: int = 0
    peak_bytes: int = 0
    alignments: Mapping[str, float] = field(default_factory=dict)  # style, subject, text → mean cosine, if there is one


class Worker:
    """Holds the base between jobs. Raises BadInput from the constructor when the base cannot be loaded."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        torch.set_num_threads(settings.threads)
        self.device = settings.device if settings.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.startswith("cuda"):
            repeatable()
            if not torch.cuda.is_available():
                raise BadInput(f"device {self.device}: this machine has no GPU that torch can use: take --device cpu")
        started = time.monotonic()
        self.base: Base = self._load_base()
        self.load_s = time.monotonic() - started
        self.catalog = Catalog(open_store(settings.catalog))
        self.judges = Judges(self.device)
        self.files = LocalCache(Path(settings.cache_dir) if settings.cache_dir else user_cache(), settings.cache_bytes)
        self.loras: Cache[LoRA] = Cache(settings.memory_cache_bytes, n_bytes)
        # beside the model in the GPU's memory, unlike the LoRAs
        self.calibrations: Cache[Calibration] = Cache(
            settings.memory_cache_bytes // 4, lambda calibration: calibration.n_bytes
        )

    def _load_base(self) -> Base:
        settings = self.settings
        try:
            files = read_base(settings.base, settings.base_revision)
            if settings.base_digest not in (None, files.digest):
                raise BadInput(
                    f"base {settings.base} on this machine has digest {files.digest[:12]}, the run was planned with"
                    f" {str(settings.base_digest)[:12]}: put the same files on every machine"
                )
            dtype = _dtype(settings.dtype, self.device)
            return load_base(files.directory, device=self.device, dtype=dtype, variant=files.variant)
        except (ManifestError, OSError, ValueError) as error:
            raise BadInput(f"base {settings.base} does not load: {error}") from error

    def is_sound(self) -> bool:
        """False after an error that a GPU does not recover from within a process: every later job would fail too."""
        try:
            if self.device.startswith("cuda"):
                torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def run(self, job: Job) -> JobResult:
        """Merge, sample, commit. Every failure that belongs to the job comes back as a value."""
        stages: dict[str, float] = {}
        try:
            if self.device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats()
            if self._is_committed(job):
                return JobResult(job.job_id, "already")
            with translated(job):
                files, report = self._make(job, stages)
            with timed(stages, "commit"):
                entry = self.catalog.commit(job.job_id, identity(job), files, {**report, "stages": dict(stages)})
            size = sum(object.size for object in entry.objects.values())
            return JobResult(
                job.job_id,
                "committed",
                stages=stages,
                n_bytes=size,
                peak_bytes=self._peak_bytes(),
                alignments=alignments_of(report),
            )
        except AlreadyCommitted:
            return JobResult(job.job_id, "already", stages=stages)
        except ServiceError as error:
            return failed(job, error, stages)
        except Exception as error:  # a defect of ours, or of a library: the job fails, the worker lives
            return failed(job, error, stages)

    def _is_committed(self, job: Job) -> bool:
        """Before any work: another run on the same catalog may have been here since this one was planned."""
        try:
            self.catalog.entry(job.job_id)
        except NotFound:
            return False
        return True

    def _make(self, job: Job, stages: dict[str, float]) -> tuple[dict[str, bytes], dict[str, Any]]:
        method = METHODS[job.method]
        knobs: Any = TypeAdapter(method.knobs).validate_python(dict(job.knobs))
        if job.scorers:
            with timed(stages, "score"):  # a judge that does not load shall not cost a merge
                self.judges.load(job.scorers)
        with timed(stages, "fetch"):
            subject, style = self._lora(job.subject), self._lora(job.style)
        observe = method.calibration(knobs, job.seed)
        with timed(stages, "calibrate"):
            calibrations = [
                self._calibration(concept, lora, observe) if observe else None
                for concept, lora in ((job.subject, subject), (job.style, style))
            ]
        with timed(stages, "merge"):
            merged = method.load()(self.base, [Pair(subject, style, *calibrations)], knobs)[0]
        with timed(stages, "write"):
            files = written(job, merged, self._circumstances(calibrations))
        with timed(stages, "sample"):
            pictures = self._samples(job, files["merged.safetensors"], merged)
            files |= pictures
            if pictures:
                files["merged.png"] = next(iter(pictures.values()))
        report = self._report(job, merged, calibrations, (subject, style))
        if job.scorers:
            with timed(stages, "score"):
                references: dict[Role, list[Image.Image]] = {
                    concept.role: self._images(concept) for concept in (job.subject, job.style)
                }
                report["scores"] = scored(job, report["samples"], files, references, self.judges)
        return files, report

    def _circumstances(self, calibrations: Sequence[Calibration | None]) -> dict[str, str]:
        """What the job does not say and the file's header shall."""
        sources = {calibration.source for calibration in calibrations if calibration is not None}
        return {
            "ziplora.version": version("ziplora"),
            "ziplora.algorithm": str(ALGORITHM),
            "ziplora.dtype": str(self.base.dtype).removeprefix("torch."),
            "ziplora.calibrated_on": ", ".join(sorted(sources)) or "nothing",
        }

    def _lora(self, concept: Concept) -> LoRA:
        def load() -> LoRA:
            with self.files.hold(concept.lora, concept.lora_sha256) as path:
                return formats.read_lora(path, name=concept.lora).lora

        lora = self.loras.get(concept.lora_sha256, load)
        return lora if concept.weight == 1.0 else scaled(lora, concept.weight)

    def _calibration(self, concept: Concept, lora: LoRA, settings: CalibrationSettings) -> Calibration:
        images = tuple(image.sha256 for image in concept.images)
        key = (concept.lora_sha256, concept.weight, concept.prompt, images, settings)
        return self.calibrations.get(
            key,
            lambda: calibrate(self.base, lora, concept.prompt, self._images(concept), settings, concept.lora_sha256),
        )

    def _images(self, concept: Concept) -> list[Image.Image]:
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

    def _samples(self, job: Job, merged_file: bytes, merged: Merged) -> dict[str, bytes]:
        """Pictures of the file that is published, its rounding included, by object name."""
        settings, files = job.samples, {}
        if settings.n_images == 0:
            return {}
        published = formats.read_lora(merged_file, name="merged.safetensors").lora
        for strength in settings.style_strengths:
            lora = published if strength == 1.0 else restyled(published, merged.subject_rank, strength)
            samples = [sample for sample in sample_list(job) if sample["style_strength"] == strength]
            with self.base.slots.loaded([[lora]]):
                images = sample_images(
                    self.base,
                    [sample["prompt"] for sample in samples],
                    [sample["seed"] for sample in samples],
                    steps=settings.steps,
                    guidance=settings.guidance,
                    width=settings.width,
                    height=settings.height,
                    negative=settings.negative,
                    scheduler=settings.scheduler,
                )
            for sample, image in zip(samples, images, strict=True):
                text = {key: sample[key] for key in ("prompt", "seed", "style_strength")} | {"job": job.job_id}
                files[sample["object"]] = png(image, text)
        return dict(sorted(files.items()))

    def _report(self, job: Job, merged: Merged, calibrations: list[Any], loras: tuple[LoRA, LoRA]) -> dict[str, Any]:
        report: dict[str, Any] = {
            "merge": dict(merged.report),
            "device": self._device_name(),
            "dtype": str(self.base.dtype).removeprefix("torch."),
        }
        for concept, calibration, lora in zip((job.subject, job.style), calibrations, loras, strict=True):
            carried = [path for path in lora.layers if path not in self.base.slots.targets]
            report[concept.role] = {
                "calibrated_on": calibration.source if calibration else None,
                "merged_modules": len(lora.layers) - len(carried),
                "carried_modules": len(carried),
            }
        report["samples"] = sample_list(job)
        report["peak_bytes"] = self._peak_bytes()
        return report

    def _peak_bytes(self) -> int:
        """Peak GPU memory of this job; on the CPU the process' peak so far."""
        if self.device.startswith("cuda"):
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _device_name(self) -> str:
        return torch.cuda.get_device_name() if self.device.startswith("cuda") else "cpu"


class Cache(Generic[T]):
    """Least recently used values of at most `limit_bytes` in all; one that is larger by itself is made, returned
    and not kept."""

    def __init__(self, limit_bytes: int, size: Callable[[T], int]) -> None:
        self.limit_bytes, self.size = limit_bytes, size
        self.values: OrderedDict[Hashable, T] = OrderedDict()
        self.n_bytes = 0

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        if key in self.values:
            self.values.move_to_end(key)
            return self.values[key]
        value = make()
        self.values[key] = value
        self.n_bytes += self.size(value)
        while self.n_bytes > self.limit_bytes:
            _, oldest = self.values.popitem(last=False)
            self.n_bytes -= self.size(oldest)
        return value


def written(job: Job, merged: Merged, circumstances: Mapping[str, str]) -> dict[str, bytes]:
    """The files of a merge: the LoRA for every tool, its sidecar, the mergers, and the PEFT twin if the manifest
    asks for one."""
    title = f"{job.subject.id} × {job.style.id} ({job.method})"
    trigger = f"{job.subject.trigger}, {job.style.trigger}"
    metadata = {**merge_metadata(job, merged), **circumstances}
    files = {
        "merged.safetensors": formats.write_kohya(
            merged.lora(), metadata=metadata, architecture=job.base.architecture, title=title, trigger=trigger
        ),
        "merged.json": formats.sidecar(
            trigger=trigger,
            description=f"{title}: ZipLoRA catalog, job {job.job_id[:12]}",
            architecture=job.base.architecture,
        ),
    }
    if merged.mergers is not None:
        files["mergers.safetensors"] = formats.write_mergers(merged.mergers, metadata)
    if "peft" in job.outputs:
        files["peft.safetensors"] = formats.write_peft(merged.lora(), metadata=metadata)
    return files


def merge_metadata(job: Job, merged: Merged) -> dict[str, str]:
    """What makes the file describe itself: base, method, knobs, seed and both sources by digest."""
    return {
        "modelspec.merged_from": f"{job.subject.id}, {job.style.id}",
        "ziplora.job_id": job.job_id,
        "ziplora.base": job.base.digest,
        "ziplora.method": job.method,
        "ziplora.knobs": json.dumps(dict(job.knobs), sort_keys=True),
        "ziplora.seed": str(job.seed),
        "ziplora.subject": job.subject.lora_sha256,
        "ziplora.style": job.style.lora_sha256,
        "ziplora.subject_weight": repr(job.subject.weight),
        "ziplora.style_weight": repr(job.style.weight),
        # in every module the first rows are the subject's: enough to change the style's strength later
        "ziplora.subject_rank": str(merged.subject_rank),
    }


def sample_list(job: Job) -> list[dict[str, Any]]:
    """What each sample shows, in the order of their numbers."""
    return [
        {
            "object": f"samples/{number:03}.png",
            "prompt": render(prompt.template, job.subject, job.style),
            "name": prompt.name,
            "style_strength": strength,
            "seed": seed,
        }
        for number, (prompt, strength, seed) in enumerate(
            (prompt, strength, seed)
            for prompt in job.samples.prompts
            for strength in job.samples.style_strengths
            for seed in job.samples.seeds
        )
    ]


def png(image: Image.Image, text: Mapping[str, Any]) -> bytes:
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, str(value))
    out = BytesIO()
    image.save(out, "PNG", pnginfo=info)
    return out.getvalue()


def failed(job: Job, error: Exception, stages: Mapping[str, float]) -> JobResult:
    kind = type(error).__name__ if isinstance(error, ServiceError) else "Defect"
    reason = str(error) if isinstance(error, ServiceError) else f"{type(error).__name__}: {error}"
    return JobResult(job.job_id, "failed", kind, reason, traceback.format_exc(), stages)


@contextmanager
def translated(job: Job) -> Iterator[None]:
    """Errors of `ziplora`, torch and the machine in the service's own words; the only place that does so."""
    try:
        yield
    except (NotFound, Corrupted, LoRAError) as error:
        raise BadInput(f"{job.pair}: {error}") from error
    except ServiceError:
        raise
    except (ValueError, ArithmeticError) as error:
        raise BadInput(f"{job.pair}: {error}") from error
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(f"{job.pair}: {error}: use a GPU with more memory, or a smaller sample size") from error


@contextmanager
def timed(stages: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # or the GPU's work would be billed to a later stage
        stages[name] = stages.get(name, 0.0) + time.monotonic() - started


def repeatable() -> None:
    """A seed decides the result on a GPU too: attention's backward pass and cuBLAS otherwise sum in any order."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True, warn_only=True)


def _dtype(name: str, device: str) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.startswith("cuda") and torch.cuda.is_bf16_supported() else torch.float32
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise BadInput(f"dtype {name} is unknown; one of float32, bfloat16")
    return dtype
