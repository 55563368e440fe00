"""What a manifest comes to: every job with its identity, what is committed already, what is left and what it costs.

Everything that needs no GPU is checked here: files exist, headers are sound, shapes fit the base, images decode, the
catalog can be listed. A problem of one LoRA does not hide those of another. Neither torch nor Ray is imported.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from service.base_files import BaseFiles, read_base
from service.best import candidates, sampled_by, trains
from service.best import problems as best_problems
from service.catalog import Catalog
from service.choose import BEST
from service.cost import Bytes, Duration, bytes_of, calibration_of, time_from, time_of, training_s
from service.errors import Corrupted, ManifestError, NotFound, ServiceError, StorageError
from service.inputs import DigestCache
from service.jobs import (
    SCORED_STRENGTH,
    Architecture,
    BaseRef,
    Concept,
    Job,
    SampleSettings,
    ScorerRef,
    Scorers,
    TrainJob,
    shows_pair,
)
from service.lora_checks import CheckedLoRA, check_loras, trained_modules, trigger_of
from service.manifest import Manifest
from service.manifest_specs import LoRASpec
from service.memory import memory_of
from service.scorer_files import read_scorer
from service.steps import Steps
from service.storage import open_store
from service.trained import TrainedLoRAs
from service.wording import field_name, plain, some

GUIDANCE: dict[Architecture, float] = {"sdxl": 5.0, "sd15": 7.5}  # the defaults of diffusers' pipelines
NO_IMAGES = "no reference images, so images that the LoRA itself generates take their place"
MAX_TOKENS = 75  # of a prompt that CLIP reads, without its start and end
N_TIMED = 20  # finished entries that the time estimate looks at

Watch = Callable[[Steps[Any]], Iterable[Any]]  # hands long work through, as a progress bar does


@dataclass(frozen=True, slots=True)
class Plan:
    """`jobs` are all that can be run; those in `committed` are done. `problems` are to be mended first."""

    manifest: str
    manifest_digest: str
    output: str
    base: BaseFiles | None
    scorers: Scorers
    loras: tuple[CheckedLoRA, ...]
    jobs: tuple[Job, ...]
    committed: frozenset[str]  # job ids, of these jobs only
    problems: tuple[str, ...]
    defaulted: tuple[str, ...]
    n_bytes: Bytes  # of the jobs left
    duration: Duration  # of the jobs and trainings left
    trainings: tuple[TrainJob, ...] = ()  # each LoRA that is not given but trained, once
    trained: frozenset[str] = frozenset()  # ids of those of them that the catalog has

    @property
    def trainings_left(self) -> tuple[TrainJob, ...]:
        """Those that a job which is left needs."""
        return _needed(self.trainings, self.trained, self.left)

    @property
    def left(self) -> tuple[Job, ...]:
        return tuple(job for job in self.jobs if job.job_id not in self.committed)

    @property
    def need(self) -> Callable[[Job], int] | None:
        """Bytes of a GPU's memory that a job is thought to need."""
        if self.base is None:
            return None
        return memory_of(self.base.shapes, self.base.default_size, self.base.size_step)

    def check(self) -> None:
        """ManifestError with every problem, one line each, if there is any."""
        if self.problems:
            raise ManifestError("\n".join(self.problems))

    def to_json(self) -> dict[str, Any]:
        """JSON values; jobs by pair, method, seed and id, without their settings."""
        return {
            "manifest": {"name": self.manifest, "sha256": self.manifest_digest},
            "output": self.output,
            "base": _base_json(self.base) if self.base else None,
            "scorers": asdict(self.scorers),
            "loras": [_lora_json(lora) for lora in self.loras],
            "counts": {"jobs": len(self.jobs), "committed": len(self.committed), "left": len(self.left)},
            "trainings": [
                {
                    "training_id": training.job_id,
                    "role": training.role,
                    "id": training.id,
                    "images": len(training.images),
                    "settings": dict(training.settings),
                    "trained": training.job_id in self.trained,
                }
                for training in self.trainings
            ],
            "images_per_job": max((job.samples.n_images for job in self.jobs), default=0),
            "bytes": {**asdict(self.n_bytes), "total": self.n_bytes.total},
            "seconds": {**asdict(self.duration), "total_s": self.duration.total_s},
            "defaulted": list(self.defaulted),
            "problems": list(self.problems),
            "jobs": [
                {
                    "job_id": job.job_id,
                    "subject": job.subject.id,
                    "style": job.style.id,
                    "method": job.method,
                    "seed": job.seed,
                    "committed": job.job_id in self.committed,
                }
                for job in self.jobs
            ],
        }


def plan(
    manifest: Manifest,
    *,
    digests: DigestCache | None = None,
    download: bool = False,
    threads: int = 8,
    watch: Watch = iter,
) -> Plan:
    """The plan of a manifest. Nothing is raised for what is wrong with the user's files: see `Plan.problems`.

    digests: where sha256 sums are remembered; this user's cache if not given. download: fetch a base that is a hub id.
    watch: is given the checks of all LoRAs and of the catalog as iterables with a length.
    """
    digests = digests or DigestCache()
    base, problems = _base(manifest, digests, download)
    scorers, unfit = _scorers(manifest, digests, download)
    problems += unfit
    used = _used(manifest)
    loras = tuple(watch(check_loras(manifest, used, base, digests, threads)))
    problems += [problem for lora in loras for problem in lora.problems]
    samples = _samples(manifest, base) if base else None
    problems += _size_problems(manifest, base, samples) if base and samples else []
    problems += _caption_problems(manifest, base) if base else []
    problems += _best_problems(manifest, scorers, samples, loras) if samples and not unfit else []
    jobs: tuple[Job, ...] = ()
    defaulted = list(manifest.defaulted)
    if base and samples and not unfit:
        concepts = {
            (lora.spec.role, lora.spec.id): _concept(lora, manifest.output) for lora in loras if not lora.problems
        }
        jobs = tuple(_jobs(manifest, base.ref, concepts, samples, scorers))
        defaulted += _sample_defaults(manifest, samples)
        defaulted += _unscored(scorers, samples, loras)
    defaulted += _lora_defaults(loras, jobs)
    defaulted += _unused(manifest, used)
    committed, stages, unlisted = _catalog(manifest, jobs)
    left = [job for job in jobs if job.job_id not in committed]
    trainings = _once(lora.training for lora in loras)
    trained = _trained(manifest) if trainings and not unlisted else frozenset()
    modules = {lora.sha256: lora.modules for lora in loras if not lora.problems}
    targets = trained_modules(base.shapes, 1) if base and manifest.takes_captions else None
    return Plan(
        manifest=manifest.name,
        manifest_digest=manifest.digest,
        output=manifest.output,
        base=base,
        scorers=scorers,
        loras=loras,
        jobs=jobs,
        committed=frozenset(committed),
        problems=(*problems, *unlisted),
        defaulted=tuple(defaulted),
        n_bytes=bytes_of(left, modules, targets),
        duration=_duration(left, stages, base, _needed(trainings, trained, left)),
        trainings=trainings,
        trained=trained,
    )


# The parts


def _base(manifest: Manifest, digests: DigestCache, download: bool) -> tuple[BaseFiles | None, list[str]]:
    try:
        return read_base(manifest.base, manifest.revision, digests=digests, download=download), []
    except ServiceError as error:
        return None, [f"{manifest.where('base')}: {line}" for line in str(error).splitlines()]


def _scorers(manifest: Manifest, digests: DigestCache, download: bool) -> tuple[Scorers, list[str]]:
    found: dict[str, ScorerRef] = {}
    problems: list[str] = []
    for spec in manifest.scorers:
        try:
            found[spec.kind] = read_scorer(
                spec.kind, spec.location, spec.revision, digests=digests, download=download
            ).ref
        except ServiceError as error:
            problems += [f"{manifest.where('scores', spec.kind)}: {line}" for line in str(error).splitlines()]
    return Scorers(**found), problems


def _used(manifest: Manifest) -> list[LoRASpec]:
    """The LoRAs that some pair takes."""
    subjects, styles = {subject for subject, _ in manifest.pairs}, {style for _, style in manifest.pairs}
    return [lora for lora in manifest.subjects if lora.id in subjects] + [s for s in manifest.styles if s.id in styles]


@dataclass(frozen=True, slots=True)
class _Concepts:
    """One subject or style, as the methods see it: with its LoRA, and with no more than its pictures."""

    merged: Concept
    pictured: Concept

    def of(self, method: str) -> Concept:
        return self.pictured if trains(method) else self.merged


def _concept(lora: CheckedLoRA, output: str) -> _Concepts:
    spec, trained = lora.spec, lora.training is not None
    trigger, _ = trigger_of(lora)
    location = f"{output}/loras/{lora.sha256}" if trained else spec.lora
    return _Concepts(
        Concept(
            spec.id, spec.role, location, lora.sha256, spec.prompt, trigger, lora.images, spec.weight, trained=trained
        ),
        Concept(spec.id, spec.role, "", "", spec.prompt, trigger, lora.images, captions=lora.captions),
    )


def _trained(manifest: Manifest) -> frozenset[str]:
    """Ids of the trainings whose LoRA the catalog has; those that it has and does not answer for are done again."""
    with suppress(StorageError):
        return frozenset(TrainedLoRAs(open_store(manifest.output)).ids())
    return frozenset()


def _once(trainings: Iterable[TrainJob | None]) -> tuple[TrainJob, ...]:
    """Each LoRA to be trained, under the first of its names."""
    found: dict[str, TrainJob] = {}
    for training in trainings:
        if training is not None:
            found.setdefault(training.job_id, training)
    return tuple(found.values())


def _needed(trainings: Iterable[TrainJob], trained: Collection[str], left: Iterable[Job]) -> tuple[TrainJob, ...]:
    needed = {training_id for job in left for training_id in job.trainings}
    return tuple(job for job in trainings if job.job_id in needed and job.job_id not in trained)


def _samples(manifest: Manifest, base: BaseFiles) -> SampleSettings:
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


def _size_problems(manifest: Manifest, base: BaseFiles, samples: SampleSettings) -> list[str]:
    step = base.size_step
    expected = f"pixels do not fit the base; expected multiples of {step}"
    problems = []
    if samples.width % step or samples.height % step:
        problems.append(f"{manifest.where('samples', 'size')}: {samples.width}×{samples.height} {expected}")
    merges = [one for merge in manifest.merges for one in (merge, *merge.candidates)]
    for size in (merge.knobs.get("size") for merge in merges):
        if size is not None and size % step:
            problems.append(f"{manifest.where('merge')}: size {size} {expected}")
    return problems


def _caption_problems(manifest: Manifest, base: BaseFiles) -> Iterator[str]:
    """Captions that are certainly too few, whatever the tokenizer makes of them: see ziplora.custom_diffusion."""
    width = max((shape[1] for path, shape in base.shapes.items() if path.endswith(".attn2.to_k")), default=0)
    for merge in (own for one in manifest.merges for own in (one, *one.candidates)):
        captions = merge.knobs.get("captions")
        if isinstance(captions, list) and sum(min(MAX_TOKENS, len(caption)) + 1 for caption in captions) < width:
            yield (
                f"{manifest.where('merge')}: missing captions: {len(captions)} cannot have {width} words in different"
                f" contexts, which {merge.method} needs for this base; give more, or captions: built-in"
            )


def _best_problems(
    manifest: Manifest, scorers: Scorers, samples: SampleSettings, loras: Iterable[CheckedLoRA]
) -> list[str]:
    bare: dict[str, list[str]] = {"subject": [], "style": []}
    for lora in loras:
        if not lora.spec.images:
            bare[lora.spec.role].append(f"{lora.spec.role}s.{lora.spec.id}")
    chosen = dict.fromkeys(merge.knobs["by"] for merge in manifest.merges if merge.method == BEST)
    found = (text for by in chosen for text in best_problems(by, scorers, samples, bare))
    return [f"{manifest.where('merge')}: {text}" for text in found]


def _jobs(
    manifest: Manifest,
    base: BaseRef,
    concepts: Mapping[tuple[str, str], _Concepts],
    samples: SampleSettings,
    scorers: Scorers,
) -> Iterator[Job]:
    """Method by method and seed by seed, the grid in its order; pairs with a LoRA that cannot be used are left out."""
    priorities = {(lora.role, lora.id): lora.priority for lora in (*manifest.subjects, *manifest.styles)}
    for merge in manifest.merges:
        own = samples if merge.method == BEST else sampled_by(merge.method, samples)
        for seed in merge.seeds:
            for subject_id, style_id in manifest.pairs:
                subject, style = concepts.get(("subject", subject_id)), concepts.get(("style", style_id))
                if subject and style:
                    both = subject.of(merge.method), style.of(merge.method)
                    priority = priorities["subject", subject_id] + priorities["style", style_id]
                    yield Job(base, *both, merge.method, merge.knobs, seed, own, manifest.outputs, scorers, priority)


def _sample_defaults(manifest: Manifest, samples: SampleSettings) -> Iterator[str]:
    if not samples.n_images:
        yield "samples: none asked for, so the catalog will hold no images"
        return
    if manifest.samples.guidance is None:
        yield f"samples.guidance: {plain(samples.guidance)}, as diffusers has it for this base"
    if manifest.samples.size is None:
        yield f"samples.size: {samples.width}×{samples.height}, what the base was trained at"
    if manifest.samples.scheduler is None:
        yield "samples.scheduler: the base's own"


def _unscored(scorers: Scorers, samples: SampleSettings, loras: Iterable[CheckedLoRA]) -> Iterator[str]:
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


def _lora_defaults(loras: Iterable[CheckedLoRA], jobs: Sequence[Job]) -> Iterator[str]:
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


def _unused(manifest: Manifest, used: Iterable[LoRASpec]) -> Iterator[str]:
    names = {lora.field for lora in used}
    unused = [field_name(lora.field) for lora in (*manifest.subjects, *manifest.styles) if lora.field not in names]
    if unused:
        yield f"{some(unused)}: in no pair, so not looked at"


def _catalog(manifest: Manifest, jobs: Sequence[Job]) -> tuple[set[str], list[Mapping[str, float]], list[str]]:
    """Which of the jobs are committed, by one listing; what some of them took, by stage; why it cannot be listed."""
    stages: list[Mapping[str, float]] = []
    try:
        catalog = Catalog(open_store(manifest.output))
        committed = catalog.committed() & {job.job_id for job in jobs}
        for job_id in sorted(committed)[:N_TIMED] if len(committed) < len(jobs) else ():
            with suppress(NotFound, Corrupted):
                stages.append(catalog.entry(job_id).report.get("stages") or {})
    except StorageError as error:
        return set(), [], [f"{manifest.where('output')}: {error}"]
    return committed, [one for one in stages if one], []


def _duration(
    left: Sequence[Job],
    stages: Sequence[Mapping[str, float]],
    base: BaseFiles | None,
    trainings: Sequence[TrainJob],
) -> Duration:
    if not left or base is None:
        return Duration(0.0, 0.0, 0.0, "nothing is left to do")
    train_s = training_s(trainings, base.shapes, base.default_size, base.size_step)
    if stages:
        return replace(time_from(stages, len(left)), train_s=train_s)
    return replace(time_of(left, base.shapes, base.default_size, base.size_step), train_s=train_s)


# What a program reads


def _base_json(base: BaseFiles) -> dict[str, Any]:
    return {
        "location": base.location,
        "revision": base.revision,
        "architecture": base.architecture,
        "variant": base.variant,
        "digest": base.digest,
        "default_size": base.default_size,
        "scheduler": base.scheduler,
        "prediction_type": base.prediction_type,
        "bytes": base.n_bytes,
    }


def _lora_json(lora: CheckedLoRA) -> dict[str, Any]:
    trigger, source = trigger_of(lora)
    return {
        "id": lora.spec.id,
        "role": lora.spec.role,
        "location": lora.spec.lora,
        "sha256": lora.sha256,
        "bytes": lora.n_bytes,
        "layout": lora.layout,
        "ranks": list(lora.ranks),
        "modules": len(lora.modules),
        "carried": lora.carried,
        "trigger": trigger,
        "trigger_source": source,
        "images": [asdict(image) for image in lora.images],
        "weight": lora.spec.weight,
        "notes": list(lora.notes),
        "problems": list(lora.problems),
    }
