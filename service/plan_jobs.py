"""The jobs of a manifest: the grid × methods × seeds, each with everything that changes its result."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from service.base_files import BaseFiles
from service.best import sampled_by
from service.choose import BEST
from service.jobs import Architecture, BaseRef, Concept, Job, SampleSettings, Scorers
from service.lora_checks import CheckedLoRA, trigger_of
from service.manifest import Manifest
from service.manifest_specs import MergeSpec
from service.method_facts import masked, trains
from service.plan_adapters import OwnBases, adapted, adapter, job_knobs, own_samples

GUIDANCE: dict[Architecture, float] = {"sdxl": 5.0, "sd15": 7.5}  # the defaults of diffusers' pipelines


def jobs_of(
    manifest: Manifest,
    base: BaseRef,
    loras: Iterable[CheckedLoRA],
    samples: SampleSettings,
    scorers: Scorers,
    own: OwnBases,
) -> Iterator[Job]:
    """Method by method and seed by seed, the grid in its order; pairs with a LoRA that cannot be used are left out, and
    methods whose own base cannot."""
    sound = [lora for lora in loras if not lora.problems]
    concepts = {(lora.spec.role, lora.spec.id): _concepts(lora, manifest.output) for lora in sound}
    priorities = {(lora.role, lora.id): lora.priority for lora in (*manifest.subjects, *manifest.styles)}
    for merge in manifest.merges:
        way = _way(merge, base, samples, own)
        if way is None:
            continue
        for seed in merge.seeds:
            if masked(merge.method):
                seen = {}
                for lora in sound:
                    training = adapter(lora, merge, seed, way.base, scorers)
                    seen[lora.spec.role, lora.spec.id] = adapted(lora, training, manifest.output)
            else:
                seen = {key: both.of(merge.method) for key, both in concepts.items()}
            for subject_id, style_id in manifest.pairs:
                subject, style = seen.get(("subject", subject_id)), seen.get(("style", style_id))
                if subject and style:
                    priority = priorities["subject", subject_id] + priorities["style", style_id]
                    yield Job(
                        way.base, subject, style, merge.method, way.knobs, seed, way.samples, manifest.outputs, scorers,
                        priority,
                    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Way:
    """What the jobs of a merge have in common."""

    base: BaseRef
    knobs: Mapping[str, Any]
    samples: SampleSettings


def _way(merge: MergeSpec, base: BaseRef, samples: SampleSettings, own: OwnBases) -> _Way | None:
    if not masked(merge.method):
        return _Way(base, merge.knobs, samples if merge.method == BEST else sampled_by(merge.method, samples))
    files = own.of(merge)
    if files is None:
        return None
    return _Way(files.ref, job_knobs(merge, files.ref), own_samples(merge, sampled_by(merge.method, samples), files))


@dataclass(frozen=True, slots=True)
class _Concepts:
    """One subject or style, as the methods see it: with its LoRA, and with no more than its pictures."""

    merged: Concept
    pictured: Concept

    def of(self, method: str) -> Concept:
        return self.pictured if trains(method) else self.merged


def _concepts(lora: CheckedLoRA, output: str) -> _Concepts:
    spec, trained = lora.spec, lora.training is not None
    trigger, _ = trigger_of(lora)
    location = f"{output}/loras/{lora.sha256}" if trained else spec.lora
    return _Concepts(
        Concept(
            spec.id, spec.role, location, lora.sha256, spec.prompt, trigger, lora.images, spec.weight, trained=trained
        ),
        Concept(spec.id, spec.role, "", "", spec.prompt, trigger, lora.images, captions=lora.captions),
    )


def sample_settings(manifest: Manifest, base: BaseFiles) -> SampleSettings:
    spec = manifest.samples
    width, height = spec.size or (base.default_size, base.default_size)
    return SampleSettings(
        prompts=spec.prompts,
        seeds=spec.seeds,
        steps=spec.steps,
        guidance=GUIDANCE[base.architecture] if spec.guidance is None else spec.guidance,
        width=width,
        height=height,
        scheduler=spec.scheduler,
        negative=spec.negative,
        style_strengths=spec.style_strengths,
    )
