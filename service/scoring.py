"""Scores of a job's samples: which pictures are held against what, and the models that judge, loaded once and kept.

Style and subject alignment look at the samples of style strength 1.0 whose prompt template has both {subject} and
{style}; text alignment looks at all samples of that strength, each against its own prompt.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from service.entry import ALIGNMENTS
from service.errors import BadInput, ManifestError
from service.jobs import SCORED_STRENGTH, Job, Role, ScorerRef, Scorers, shows_pair
from service.scorer_files import Kind, read_scorer
from ziplora.score import Judge, load_clip, load_dino, score


class Judges:
    """Scorers by what they are, each loaded when it is first asked for.

    BadInput when one does not load, or is not on this machine what it was when the job was planned.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.loaded: dict[tuple[Kind, str], Judge] = {}  # by kind and digest of the files

    def load(self, scorers: Scorers) -> tuple[Judge | None, Judge | None]:
        """The CLIP and the DINO."""
        return self._get("clip", scorers.clip, load_clip), self._get("dino", scorers.dino, load_dino)

    def _get(self, kind: Kind, ref: ScorerRef | None, load: Callable[..., Judge]) -> Judge | None:
        if ref is None:
            return None
        key = (kind, ref.digest)
        if key not in self.loaded:
            directory = _directory(kind, ref)
            try:
                self.loaded[key] = load(directory, device=self.device)
            except torch.OutOfMemoryError:
                raise
            except (OSError, ValueError, RuntimeError) as error:
                raise BadInput(f"{kind} scorer {ref.location} does not load: {error}") from error
        return self.loaded[key]


def _directory(kind: Kind, ref: ScorerRef) -> Path:
    """Where it lies on this machine."""
    try:
        found = read_scorer(kind, ref.location, ref.revision)
    except ManifestError as error:
        raise BadInput(f"on this machine, {error}") from error
    if found.ref.digest != ref.digest:
        raise BadInput(
            f"{kind} scorer {ref.location} on this machine has digest {found.ref.digest[:12]}, the run was planned with"
            f" {ref.digest[:12]}: put the same files on every machine"
        )
    return found.directory


def scored(
    job: Job,
    samples: Sequence[Mapping[str, Any]],
    files: Mapping[str, bytes],
    references: Mapping[Role, Sequence[Image.Image]],
    judges: Judges,
) -> dict[str, Any]:
    """The report's `scores`: three mean cosines or null, why one is null, and who judged.

    samples: as the report lists them; files: their PNG bytes by name; references: pictures by role.
    """
    clip, dino = judges.load(job.scorers)
    own = [sample for sample in samples if sample["style_strength"] == SCORED_STRENGTH]
    with_both = {prompt.name for prompt in job.samples.prompts if shows_pair(prompt.template)}
    pictures = {sample["object"]: Image.open(BytesIO(files[sample["object"]])) for sample in own}
    pair = [pictures[sample["object"]] for sample in own if sample["name"] in with_both]
    found: dict[str, float | None] = dict.fromkeys(ALIGNMENTS)
    if pair:
        both = score(pair, style_images=references["style"], subject_images=references["subject"], clip=clip, dino=dino)
        found |= {"style_alignment": both.style, "subject_alignment": both.subject}
    if own:
        prompts = [sample["prompt"] for sample in own]
        found["text_alignment"] = score(list(pictures.values()), prompts=prompts, clip=clip).text
    reasons = {name: _why_not(name, job, pair, own, value) for name, value in found.items()}
    return {
        **{name: value if reasons[name] is None else None for name, value in found.items()},
        "missing": {name: reason for name, reason in reasons.items() if reason},
        "pair_samples": len(pair),
        "text_samples": len(own),
        "clip": _judge_report(job.scorers.clip, clip),
        "dino": _judge_report(job.scorers.dino, dino),
    }


def alignments_of(report: Mapping[str, Any]) -> dict[str, float]:
    """By kind (style, subject, text), without those that are null."""
    scores = report.get("scores") or {}
    found = {name.removesuffix("_alignment"): scores.get(name) for name in ALIGNMENTS}
    return {kind: value for kind, value in found.items() if value is not None}


def _why_not(name: str, job: Job, pair: Sequence[Any], own: Sequence[Any], value: float | None) -> str | None:
    """Why an alignment is null, or None if it is not."""
    role = name.removesuffix("_alignment")
    kind = "dino" if role == "subject" else "clip"
    if getattr(job.scorers, kind) is None:
        return f"the manifest names no {kind} scorer"
    if not own:
        return "there are no samples of style strength 1.0"
    if role != "text":
        if not pair:
            return "no sample prompt has both {subject} and {style}"
        if not getattr(job, role).images:
            return f"{role} {getattr(job, role).id} has no reference images"
    if value is None or not math.isfinite(value):
        return f"the scorer gave {value}"
    return None


def _judge_report(ref: ScorerRef | None, judge: Judge | None) -> dict[str, Any] | None:
    if ref is None or judge is None:
        return None
    return {"scorer": ref.location, "revision": ref.revision, "digest": ref.digest, "weights_digest": judge.digest}
