"""What a plan takes where nothing was given, what is left out for it, and what is not looked at: stated, line by line.
manifest_defaults.py states what the file alone decides; this is what depends on the base, the LoRAs and the images."""

from collections.abc import Iterable, Iterator, Sequence

from service.best import candidates
from service.cost import calibration_of
from service.jobs import SCORED_STRENGTH, Job, SampleSettings, Scorers, shows_pair
from service.lora_checks import CheckedLoRA, trigger_of
from service.manifest import Manifest
from service.manifest_specs import LoRASpec
from service.method_facts import masked
from service.wording import field_name, plain, some

NO_IMAGES = "no reference images, so images that the LoRA itself generates take their place"


def sample_defaults(manifest: Manifest, samples: SampleSettings) -> Iterator[str]:
    if not samples.n_images:
        yield "samples: none asked for, so the catalog will hold no images"
        return
    if manifest.samples.guidance is None:
        yield f"samples.guidance: {plain(samples.guidance)}, as diffusers has it for this base"
    if manifest.samples.size is None:
        yield f"samples.size: {samples.width}×{samples.height}, what the base was trained at"
    if manifest.samples.scheduler is None:
        yield "samples.scheduler: the base's own"


def own_sample_defaults(jobs: Iterable[Job]) -> Iterator[str]:
    """How methods on a base of their own sample, whatever the manifest says of size, steps and guidance."""
    ways = {(job.method, job.base.location, id(job.samples)): job for job in jobs if masked(job.method)}
    for job in ways.values():
        if job.samples.n_images:
            own = job.samples
            yield (
                f"samples of {job.method}: {own.width}×{own.height}, {own.steps} steps, guidance"
                f" {plain(own.guidance)}: its own base's size, and its own settings"
            )


def unscored(scorers: Scorers, samples: SampleSettings, loras: Iterable[CheckedLoRA]) -> Iterator[str]:
    """What the scorers will have nothing to go by for."""
    if not scorers:
        return
    if samples.n_images == 0 or SCORED_STRENGTH not in samples.style_strengths:
        yield "scores: none, as there are no samples of style strength 1.0"
        return
    if not any(shows_pair(prompt.template) for prompt in samples.prompts):
        yield "scores: text alignment only, as no sample prompt has both {subject} and {style}"
        return
    for role, scorer, kind in (("subject", scorers.dino, "dino"), ("style", scorers.clip, "clip")):
        bare = [f"{role}s.{lora.spec.id}" for lora in loras if lora.spec.role == role and not lora.spec.images]
        if scorer is None:
            yield f"scores: no {role} alignment without a {kind} scorer"
        elif bare:
            yield f"scores: no {role} alignment for {some(bare)}, without reference images"


def lora_defaults(loras: Iterable[CheckedLoRA], jobs: Sequence[Job]) -> Iterator[str]:
    one_per_merge = {(job.method, id(job.knobs)): job for job in jobs}.values()
    observed = any(calibration_of(one) for job in one_per_merge for one in candidates(job))
    for lora in loras:
        name = f"{lora.spec.role}s.{lora.spec.id}"
        trigger, source = trigger_of(lora)
        if not lora.problems and source != "given":
            yield f"{name}.trigger: '{trigger}', {source}"
    notes = {f"{lora.spec.role}s.{lora.spec.id}": list(lora.notes) for lora in loras}
    for lora in loras if observed else ():
        if not lora.spec.images:
            notes[f"{lora.spec.role}s.{lora.spec.id}"].append(NO_IMAGES)
    for note in dict.fromkeys(note for own in notes.values() for note in own):
        yield f"{some([name for name, own in notes.items() if note in own])}: {note}"


def unused(manifest: Manifest, used: Iterable[LoRASpec]) -> Iterator[str]:
    names = {lora.field for lora in used}
    unused = [field_name(lora.field) for lora in (*manifest.subjects, *manifest.styles) if lora.field not in names]
    if unused:
        yield f"{some(unused)}: in no pair, so not looked at"
