"""What a masked-token base will take, from its weight shapes as in cost.py: adapters trained, and pictures sampled."""

from collections.abc import Iterable, Mapping
from math import prod

from service.base_files import BaseFiles
from service.cost import BACKWARD, DEVICE_FLOPS, TOKENS
from service.jobs import Job, TrainJob


def call_flop(base: BaseFiles) -> float:
    """Operations of one call of the transformer on one picture, every layer taken as one on all of its tokens."""
    tokens = (base.default_size // base.size_step) ** 2
    total = 0.0
    for path, shape in base.shapes.items():
        if not path.startswith("transformer.") or path.endswith(".embeddings"):
            continue
        if path.endswith(("attn1.to_q", "attn2.to_q")):
            total += 4.0 * tokens * (tokens if "attn1" in path else TOKENS) * shape[0]
        total += 2.0 * prod(shape) * _applied_to(path, tokens)
    return total


def adapters_s(trainings: Iterable[TrainJob], bases: Mapping[str, BaseFiles]) -> float:
    """Seconds of the adapters among these trainings, one after another; `bases` by digest."""
    total = 0.0
    for job in trainings:
        if job.is_adapter:
            calls = job.settings["steps"] * job.settings["batch"] * BACKWARD
            if feedback := job.settings.get("feedback"):
                pictures = len(feedback["prompts"]) * feedback["per_prompt"]
                rows = 2 + bool(feedback["text"])  # the base and the adapter; with guidance the base without prompt too
                calls = 2 * calls + pictures * feedback["sample_steps"] * rows
            total += calls * call_flop(bases[job.base.digest])
    return total / DEVICE_FLOPS


def pictures_s(jobs: Iterable[Job], bases: Mapping[str, BaseFiles]) -> float:
    """Seconds of sampling those of the jobs that are on one of `bases`: in each step the base, with the prompt and
    without, and either adapter."""
    calls = {digest: call_flop(base) for digest, base in bases.items()}
    total = 0.0
    for job in jobs if calls else ():
        if job.base.digest in calls:
            weights = ("subject_weight", "style_weight", "text")
            rows = 1 + sum(bool(job.knobs[name]) for name in weights)
            total += job.samples.n_images * job.samples.steps * rows * calls[job.base.digest]
    return total / DEVICE_FLOPS


def _applied_to(path: str, tokens: int) -> int:
    if path.endswith(("attn2.to_k", "attn2.to_v", "encoder_proj")):
        return TOKENS
    return 1 if "cond_embed" in path or ".norm" in path else tokens
