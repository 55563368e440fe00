"""What a plan will write and take: bytes, mostly exact, and time, a stated guess until finished entries tell better.

Operations are counted from the base's weight shapes: a layer applied to n positions costs 2·n·(weights) FLOP, attention
of n queries to k keys of width d costs 4·n·k·d. For SDXL that is 6.76 TFLOP per UNet call at 1024², 1.59 at 512².
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod

from service.best import candidates
from service.jobs import Concept, Job, SampleSettings, TrainJob
from service.method_facts import method_names, trains
from ziplora.calibration_settings import SELF_IMAGES, SELF_STEPS, CalibrationSettings
from ziplora.layouts import ModuleKeys, is_target
from ziplora.merge_flop import Ranks
from ziplora.methods import METHODS
from ziplora.module_names import input_of

TOKENS = 77  # CLIP's prompt length
DEVICE_FLOPS = 0.4 * 989e12  # 40 % of an H100's dense bf16 rate, as reached by diffusion models in practice
DEVICE = "one H100 at 40 % of its bf16 rate"
BACKWARD = 2.18  # merged forward and backward to the mergers only, in base forwards: 14.73 / 6.76 TFLOP at 1024²
SOLVER_FLOPS = 10e12  # of a merge's own algebra: fp32, without its tensor cores
WEIGHT_CALLS = 6 * 2.2  # UNet calls' worth of the backward passes from ziplora.calibrate.WEIGHT_ROWS predictions
SELF_CALLS = SELF_IMAGES * SELF_STEPS * 2  # UNet calls where a LoRA has no images: with and without the prompt
PRIOR_CALLS = 25 * 2  # UNet calls for a picture of ziplora.train.sample_prior
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
    train_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.pairs_s + self.train_s

    @property
    def pairs_s(self) -> float:
        """Without the LoRAs that are trained first."""
        return self.calibrate_s + self.merge_s + self.sample_s


# Bytes


def merged_bytes(subject: Modules, style: Modules) -> int:
    """The published file: fp16, one rank in every module (both LoRAs' largest, added), alphas, and the header."""
    joined = dict(subject) | dict(style)
    rank = sum(max((keys.rank for keys in side.values()), default=0) for side in (subject, style))
    per_rank = (keys.in_features * prod(keys.kernel) + keys.out_features for keys in joined.values())
    return sum(2 * rank * values + 2 for values in per_rank) + 3 * len(joined) * HEADER_BYTES


def merger_bytes(subject: Modules, style: Modules) -> int:
    """One fp32 coefficient for each column of every target, for either LoRA where it has the target."""
    return sum(4 * keys.in_features for side in (subject, style) for path, keys in side.items() if is_target(path))


def bytes_of(jobs: Sequence[Job], modules: Mapping[str, Modules], targets: Modules | None = None) -> Bytes:
    """Of all jobs; `modules` by sha256 of the LoRA. Pairs of equal structure are counted once and multiplied.

    `targets`: the base's merge targets, which a method that trains writes at a rank of its own.
    """

    @cache
    def trained_bytes(rank: int) -> int:
        return merged_bytes({path: replace(keys, rank=rank) for path, keys in (targets or {}).items()}, {})

    structures = {digest: hash(frozenset((p, k.rank) for p, k in lora.items())) for digest, lora in modules.items()}
    known: dict[tuple[int, int], tuple[int, int]] = {}
    merged = mergers = peft = samples = 0
    for job in jobs:
        samples += sample_bytes(job.samples)
        if trains(job.method):
            trained = trained_bytes(job.knobs["rank"]) if METHODS[job.method].file else 0
            merged += trained
            peft += trained if "peft" in job.outputs else 0
            continue
        pair = (structures[job.subject.lora_sha256], structures[job.style.lora_sha256])
        if pair not in known:
            both = (modules[job.subject.lora_sha256], modules[job.style.lora_sha256])
            known[pair] = (merged_bytes(*both), merger_bytes(*both))
        methods = [METHODS[name] for name in method_names(job.method, job.knobs)]
        sizes = known[pair] if any(method.file for method in methods) else (0, 0)
        merged += sizes[0]
        mergers += sizes[1] if any(method.mergers for method in methods) else 0
        peft += sizes[0] if "peft" in job.outputs else 0
    return Bytes(merged, mergers, peft, samples)


def sample_bytes(samples: SampleSettings) -> int:
    """PNG files, one of them twice: as the merged LoRA's preview."""
    n_images = samples.n_images + bool(samples.n_images)
    return int(n_images * samples.width * samples.height * PNG_BYTES_PER_PIXEL)


# Time


def forward_flop(shapes: Shapes, height: int, width: int) -> float:
    """Floating-point operations of one UNet call on one latent. `shapes`: canonical path → weight shape."""
    levels, total = levels_of(shapes), 0.0
    for path, shape in shapes.items():
        if not path.startswith("unet."):
            continue
        scale = 2 ** level_of(path, levels)
        positions = (height // scale) * (width // scale)
        if path.endswith(("attn1.to_q", "attn2.to_q")):
            total += 4.0 * positions * (positions if "attn1" in path else TOKENS) * shape[0]
        total += 2.0 * prod(shape) * applied_to(path, positions)
    return total


def levels_of(shapes: Shapes) -> int:
    return 1 + max(int(number) for path in shapes for number in re.findall(r"^unet\.down_blocks\.(\d+)\.", path))


def moments_flop(shapes: Shapes, height: int, width: int) -> float:
    """Operations of recording x·xᵀ of every distinct input of the merge targets in one UNet call: 2·n·in² for n
    positions, at half of the rate of other operations."""
    levels = levels_of(shapes)
    inputs = {input_of(path): path for path in shapes if is_target(path)}
    return sum(
        2 * 2.0 * shapes[path][1] ** 2 * applied_to(path, (height * width) // 4 ** level_of(path, levels))
        for path in inputs.values()
    )


def text_flop(shapes: Shapes) -> float:
    """Operations of one prompt through all text encoders."""
    total = 0.0
    for path, shape in shapes.items():
        if path.startswith("text_encoder") and "embedding" not in path:
            total += 2.0 * prod(shape) * TOKENS + (4.0 * TOKENS**2 * shape[0] if path.endswith("q_proj") else 0.0)
    return total


def merge_flop(job: Job, shapes: Shapes, ranks: Ranks) -> float:
    """Operations of a pair's merge beside model passes; `ranks` of both LoRAs."""
    method = METHODS[job.method]
    if method.flop is None:
        return 0.0
    targets = {path: (shape[0], shape[1]) for path, shape in shapes.items() if is_target(path)}
    return method.flop(targets, ranks, method.knobs(**job.knobs))


def level_of(path: str, levels: int) -> int:
    """How often the latent has been halved where the layer works."""
    down = re.match(r"unet\.down_blocks\.(\d+)\.(downsamplers)?", path)
    if down:
        return int(down[1]) + bool(down[2])
    up = re.match(r"unet\.up_blocks\.(\d+)\.(upsamplers)?", path)
    if up:
        return levels - 1 - int(up[1]) - bool(up[2])
    return levels - 1 if path.startswith("unet.mid_block.") else 0


def applied_to(path: str, positions: int) -> int:
    if path.endswith(("attn2.to_k", "attn2.to_v")):
        return TOKENS
    return 1 if "time_emb" in path or "add_embedding" in path else positions


def time_of(
    jobs: Iterable[Job], modules: Mapping[str, Modules], shapes: Shapes, default_size: int, factor: int
) -> Duration:
    """A guess from operation counts: calibration once per LoRA, then merge and samples of each job.

    `modules` by sha256 of the LoRA, `default_size` in pixels, `factor` pixels per latent.
    """
    known_ranks = {digest: max((keys.rank for keys in lora.values()), default=0) for digest, lora in modules.items()}

    @cache
    def flop(width: int, height: int) -> float:
        return forward_flop(shapes, height // factor, width // factor)

    @cache
    def observing(settings: CalibrationSettings, own_images: bool) -> float:
        side = settings.size or default_size
        call = flop(side, side)
        total = settings.draws * call + (0.0 if own_images else SELF_CALLS * call)
        if settings.moments != "none":
            total += settings.draws * moments_flop(shapes, side // factor, side // factor)
        return total + (WEIGHT_CALLS * call if settings.moments == "inputs+outputs" else 0.0)

    observed: dict[tuple[Concept, CalibrationSettings], float] = {}
    captions: dict[tuple[str, int], int] = {}  # jobs of a merge share knobs
    merging: dict[tuple[str, int, int, Ranks], tuple[CalibrationSettings | None, float]] = {}
    merge = sample = 0.0
    for job in (candidate for one in jobs for candidate in candidates(one)):
        ranks = known_ranks.get(job.subject.lora_sha256, 0), known_ranks.get(job.style.lora_sha256, 0)
        key = (job.method, id(job.knobs), job.seed, ranks)
        if key not in merging:
            settings = calibration_of(job)
            side = (settings and settings.size) or job.knobs.get("size") or default_size
            merging[key] = settings, _merge_s(job, flop(side, side), shapes, ranks)
            captions[key[:2]] = METHODS[job.method].captions(METHODS[job.method].knobs(**job.knobs))
        settings, merge_s = merging[key]
        merge += merge_s
        if settings:
            for concept in (job.subject, job.style):
                observed[concept, settings] = observing(settings, bool(concept.images))
        calls = job.samples.steps * (2 if job.samples.guidance > 1 else 1)
        sample += job.samples.n_images * calls * flop(job.samples.width, job.samples.height)
    return Duration(
        (sum(observed.values()) + sum(captions.values()) * text_flop(shapes)) / DEVICE_FLOPS,
        merge,
        sample / DEVICE_FLOPS,
        f"a guess from operation counts, on {DEVICE}, without loading and uploading",
    )


def training_s(trainings: Iterable[TrainJob], shapes: Shapes, default_size: int, factor: int) -> float:
    """Seconds of these trainings, one after another, as in `time_of`: of each step, its pictures forward and backward;
    with prior preservation as many again of the class, which the base has to make first."""
    total = 0.0
    for job in trainings:
        settings = job.settings
        side = (settings["size"] or default_size) // factor
        prior = settings["prior_prompt"] is not None
        passes = settings["steps"] * settings["batch"] * (2 if prior else 1)
        backward = BACKWARD + 1 if settings["gradient_checkpointing"] else BACKWARD
        samples = settings["prior_images"] * PRIOR_CALLS if prior else 0
        total += (passes * backward + samples) * forward_flop(shapes, side, side)
    return total / DEVICE_FLOPS


def _merge_s(job: Job, call: float, shapes: Shapes, ranks: Ranks) -> float:
    """Seconds of one pair's merge; `call` in operations of a UNet call at its size."""
    method = METHODS[job.method]
    passes = method.passes(method.knobs(**job.knobs))
    model = (passes.backward * BACKWARD + passes.forward) * call
    return model / DEVICE_FLOPS + merge_flop(job, shapes, ranks) / SOLVER_FLOPS


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
