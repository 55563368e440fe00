"""What a plan will write and take: bytes, mostly exact, and time, a stated guess until finished entries tell better.

Operations are counted from the base's weight shapes: a layer applied to n positions costs 2·n·(weights) FLOP, attention
of n queries to k keys of width d costs 4·n·k·d. For SDXL that is 6.76 TFLOP per UNet call at 1024², 1.59 at 512².
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

from service.jobs import Concept, Job, SampleSettings
from ziplora.layouts import ModuleKeys, is_target
from ziplora.methods import METHODS, SELF_IMAGES, SELF_STEPS, CalibrationSettings

TOKENS = 77  # CLIP's prompt length
DEVICE_FLOPS = 0.4 * 989e12  # 40 % of an H100's dense bf16 rate, as reached by diffusion models in practice
DEVICE = "one H100 at 40 % of its bf16 rate"
BACKWARD = 2.18  # merged forward and backward to the mergers only, in base forwards: 14.73 / 6.76 TFLOP at 1024²
SELF_CALLS = SELF_IMAGES * SELF_STEPS * 2  # UNet calls where a LoRA has no images: with and without the prompt
HEADER_BYTES = 140  # of a safetensors header per tensor: its name, shape and offsets
PNG_BYTES_PER_PIXEL = 1.6  # sampled photographs; drawings take less

Modules = Mapping[str, ModuleKeys]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Bytes:
    """What will be written, in bytes. Values are exact, headers nearly; samples are a guess."""

    merged: int
    mergers: int
    peft: int
    samples: int

    @property
    def total(self) -> int:
        return self.merged + self.mergers + self.peft + self.samples


@dataclass(frozen=True, slots=True)
class Duration:
    """Seconds on one device, all jobs after another, and what the figure rests on."""

    calibrate_s: float
    merge_s: float
    sample_s: float
    basis: str

    @property
    def total_s(self) -> float:
        return self.calibrate_s + self.merge_s + self.sample_s


# Bytes


def merged_bytes(subject: Modules, style: Modules) -> int:
    """The published file: fp16, one rank in every module (both LoRAs' largest, added), alphas, and the header."""
    joined = dict(subject) | dict(style)
    rank = sum(max(keys.rank for keys in side.values()) for side in (subject, style))
    per_rank = (keys.in_features * prod(keys.kernel) + keys.out_features for keys in joined.values())
    return sum(2 * rank * values + 2 for values in per_rank) + 3 * len(joined) * HEADER_BYTES


def merger_bytes(subject: Modules, style: Modules) -> int:
    """One fp32 coefficient for each column of every target, for either LoRA where it has the target."""
    return sum(4 * keys.in_features for side in (subject, style) for path, keys in side.items() if is_target(path))


def bytes_of(jobs: Sequence[Job], modules: Mapping[str, Modules]) -> Bytes:
    """Of all jobs; `modules` by sha256 of the LoRA. Pairs of equal structure are counted once and multiplied."""
    structures = {digest: hash(frozenset((p, k.rank) for p, k in lora.items())) for digest, lora in modules.items()}
    known: dict[tuple[int, int], tuple[int, int]] = {}
    merged = mergers = peft = samples = 0
    for job in jobs:
        pair = (structures[job.subject.lora_sha256], structures[job.style.lora_sha256])
        if pair not in known:
            both = (modules[job.subject.lora_sha256], modules[job.style.lora_sha256])
            known[pair] = (merged_bytes(*both), merger_bytes(*both))
        sizes = known[pair]
        merged += sizes[0]
        mergers += sizes[1] if METHODS[job.method].mergers else 0
        peft += sizes[0] if "peft" in job.outputs else 0
        samples += sample_bytes(job.samples)
    return Bytes(merged, mergers, peft, samples)


def sample_bytes(samples: SampleSettings) -> int:
    """PNG files, one of them twice: as the merged LoRA's preview."""
    n_images = samples.n_images + bool(samples.n_images)
    return int(n_images * samples.width * samples.height * PNG_BYTES_PER_PIXEL)


# Time


def forward_flop(shapes: Shapes, height: int, width: int) -> float:
    """Floating-point operations of one UNet call on one latent. `shapes`: canonical path → weight shape."""
    levels = 1 + max(int(number) for path in shapes for number in re.findall(r"^unet\.down_blocks\.(\d+)\.", path))
    total = 0.0
    for path, shape in shapes.items():
        if not path.startswith("unet."):
            continue
        scale = 2 ** _level(path, levels)
        positions = (height // scale) * (width // scale)
        if path.endswith(("attn1.to_q", "attn2.to_q")):
            total += 4.0 * positions * (positions if "attn1" in path else TOKENS) * shape[0]
        total += 2.0 * prod(shape) * _applied_to(path, positions)
    return total


def _level(path: str, levels: int) -> int:
    """How often the latent has been halved where the layer works."""
    down = re.match(r"unet\.down_blocks\.(\d+)\.(downsamplers)?", path)
    if down:
        return int(down[1]) + bool(down[2])
    up = re.match(r"unet\.up_blocks\.(\d+)\.(upsamplers)?", path)
    if up:
        return levels - 1 - int(up[1]) - bool(up[2])
    return levels - 1 if path.startswith("unet.mid_block.") else 0


def _applied_to(path: str, positions: int) -> int:
    if path.endswith(("attn2.to_k", "attn2.to_v")):
        return TOKENS
    return 1 if "time_emb" in path or "add_embedding" in path else positions


def time_of(jobs: Iterable[Job], shapes: Shapes, default_size: int, factor: int) -> Duration:
    """A guess from operation counts: calibration once per LoRA, then merge and samples of each job.

    `default_size` in pixels, `factor` pixels per latent.
    """

    @cache
    def flop(width: int, height: int) -> float:
        return forward_flop(shapes, height // factor, width // factor)

    observed: dict[tuple[Concept, CalibrationSettings], float] = {}
    settings_of: dict[tuple[str, int, int], CalibrationSettings | None] = {}  # jobs of one merge share their knobs
    merge = sample = 0.0
    for job in jobs:
        key = (job.method, id(job.knobs), job.seed)
        if key not in settings_of:
            settings_of[key] = calibration_of(job)
        settings = settings_of[key]
        if settings:
            side = settings.size or default_size
            for concept in (job.subject, job.style):
                own = 0.0 if concept.images else SELF_CALLS * flop(side, side)
                observed[concept, settings] = settings.draws * flop(side, side) + own
            updates = int(job.knobs.get("steps", 0)) * int(job.knobs.get("batch", 1))
            merge += 2 * updates * BACKWARD * flop(side, side)
        calls = job.samples.steps * (2 if job.samples.guidance > 1 else 1)
        sample += job.samples.n_images * calls * flop(job.samples.width, job.samples.height)
    return Duration(
        sum(observed.values()) / DEVICE_FLOPS,
        merge / DEVICE_FLOPS,
        sample / DEVICE_FLOPS,
        f"a guess from operation counts, on {DEVICE}, without loading and uploading",
    )


def time_from(stages: Sequence[Mapping[str, float]], n_jobs: int) -> Duration:
    """From what finished entries took, wherever they ran; `stages` in seconds, as their reports have them."""

    def mean(*names: str) -> float:
        return sum(entry.get(name, 0.0) for entry in stages for name in names) / len(stages)

    return Duration(
        n_jobs * mean("calibrate"),
        n_jobs * (mean("merge") + mean("fetch", "write", "commit")),
        n_jobs * mean("sample", "score"),
        f"the mean of {len(stages)} finished entries of this catalog, on one device like theirs",
    )


def calibration_of(job: Job) -> CalibrationSettings | None:
    """What the job's method must observe of each LoRA; None if nothing."""
    method = METHODS[job.method]
    return method.calibration(method.knobs(**job.knobs), job.seed)
