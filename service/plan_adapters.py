"""What a method on a masked-token base of its own needs before its pairs: that base, and an adapter for each subject
and each style, trained once for all of their partners as LoRAs are that a manifest gives by images alone."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from service.base_files import MASKED, BaseFiles, read_base
from service.errors import ServiceError
from service.inputs import DigestCache
from service.jobs import BaseRef, Concept, SampleSettings, Scorers, TrainJob
from service.lora_checks import CheckedLoRA, trigger_of
from service.manifest import Manifest
from service.manifest_specs import MergeSpec
from service.method_facts import masked
from ziplora.methods import METHODS


@dataclass(frozen=True, slots=True)
class OwnBases:
    """Those that are there, by location and revision as the manifest names them; what is wrong with the others."""

    found: Mapping[tuple[str, str | None], BaseFiles]
    problems: tuple[str, ...]

    def of(self, merge: MergeSpec) -> BaseFiles | None:
        return self.found.get((merge.knobs["base"], merge.knobs["revision"]))

    @property
    def by_digest(self) -> dict[str, BaseFiles]:
        return {base.digest: base for base in self.found.values()}


def own_bases(manifest: Manifest, digests: DigestCache, download: bool) -> OwnBases:
    found: dict[tuple[str, str | None], BaseFiles] = {}
    problems: list[str] = []
    for merge in manifest.merges:
        if not masked(merge.method):
            continue
        location, revision = merge.knobs["base"], merge.knobs["revision"]
        try:
            found[location, revision] = read_base(location, revision, digests=digests, download=download, family=MASKED)
        except ServiceError as error:
            problems += [f"{manifest.where(*merge.field, 'base')}: {line}" for line in str(error).splitlines()]
    return OwnBases(found, tuple(problems))


def job_knobs(merge: MergeSpec, base: BaseRef) -> dict[str, Any]:
    """The knobs as a job has them: the same wherever the base lies."""
    return {**merge.knobs, "base": base.digest, "revision": None}


def own_samples(merge: MergeSpec, samples: SampleSettings, base: BaseFiles) -> SampleSettings:
    """What is sampled, in the way of the method's own base: its size, its steps, its guidance."""
    knobs = METHODS[merge.method].knobs(**merge.knobs)
    return replace(
        samples,
        steps=knobs.sample_steps,
        guidance=1 + knobs.text,
        width=base.default_size,
        height=base.default_size,
        scheduler=None,
        negative="",
    )


def feedback_problems(manifest: Manifest, scorers: Scorers) -> Iterator[str]:
    for merge in manifest.merges:
        if masked(merge.method) and merge.knobs["feedback"] and scorers.clip is None:
            yield f"{manifest.where(*merge.field, 'feedback')}: a CLIP picks the pictures: name it under scores"


def adapter(lora: CheckedLoRA, merge: MergeSpec, seed: int, base: BaseRef, scorers: Scorers) -> TrainJob:
    """The training of a concept's adapter, whatever its partner; of a style in two rounds where it is to have them."""
    knobs = METHODS[merge.method].knobs(**merge.knobs)
    job = TrainJob(base, lora.spec.id, lora.spec.role, lora.images, lora.captions, asdict(knobs.settings(seed)))
    second = knobs.second_round(trigger_of(lora)[0]) if job.role == "style" else None
    if second is None or scorers.clip is None:
        return job
    feedback = {**asdict(second), "prompts": list(second.prompts), "clip": scorers.clip.digest}
    return replace(job, settings={**job.settings, "feedback": feedback}, clip=scorers.clip)


def adapters_of(
    manifest: Manifest, own: OwnBases, loras: Iterable[CheckedLoRA], scorers: Scorers
) -> Iterator[TrainJob]:
    """All that the manifest's pairs need."""
    usable = [lora for lora in loras if not lora.problems and lora.captions]
    for merge in manifest.merges:
        base = own.of(merge) if masked(merge.method) else None
        if base is not None:
            for seed in merge.seeds:
                yield from (adapter(lora, merge, seed, base.ref, scorers) for lora in usable)


def adapted(lora: CheckedLoRA, training: TrainJob, output: str) -> Concept:
    """The concept as a job sees it, whose adapter a run trains."""
    spec, (trigger, _) = lora.spec, trigger_of(lora)
    location = f"{output}/loras/{training.job_id}"
    return Concept(spec.id, spec.role, location, training.job_id, spec.prompt, trigger, lora.images, trained=True)
