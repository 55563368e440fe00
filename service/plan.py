"""What a manifest comes to: every job with its identity, what is committed already, what is left and what it costs.

Everything that needs no GPU is checked here: files exist, headers are sound, shapes fit the base, images decode, the
catalog can be listed. A problem of one LoRA does not hide those of another. Neither torch nor Ray is imported.

The jobs are made in plan_jobs.py; what cannot be is found in lora_checks.py and plan_problems.py, what is taken where
nothing was given in plan_defaults.py. plan_text.py and plan_json.py tell people and programs.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from service.base_files import BaseFiles, read_base
from service.catalog import Catalog
from service.cost import Bytes, Duration, Modules, bytes_of, time_from, time_of, training_s
from service.errors import Corrupted, ManifestError, NotFound, ServiceError, StorageError
from service.inputs import DigestCache
from service.jobs import Job, ScorerRef, Scorers, TrainJob
from service.lora_checks import CheckedLoRA, check_loras, trained_modules
from service.manifest import Manifest
from service.manifest_specs import LoRASpec
from service.masked_cost import adapters_s, pictures_s
from service.memory import memory_of
from service.plan_adapters import OwnBases, adapters_of, feedback_problems, own_bases
from service.plan_defaults import lora_defaults, own_sample_defaults, sample_defaults, unscored, unused
from service.plan_jobs import jobs_of, sample_settings
from service.plan_problems import best_problems, caption_problems, size_problems
from service.scorer_files import read_scorer
from service.steps import Steps
from service.storage import open_store
from service.trained import TrainedLoRAs

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
    own_bases: tuple[BaseFiles, ...] = ()  # of methods that do not work on `base`

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
        beside = {base.digest: base.n_bytes for base in self.own_bases}
        return memory_of(self.base.shapes, self.base.default_size, self.base.size_step, beside=beside)

    def check(self) -> None:
        """ManifestError with every problem, one line each, if there is any."""
        if self.problems:
            raise ManifestError("\n".join(self.problems))


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
    own = own_bases(manifest, digests, download)
    problems += own.problems
    scorers, unfit = _scorers(manifest, digests, download)
    problems += unfit
    used = _used(manifest)
    loras = tuple(watch(check_loras(manifest, used, base, digests, threads)))
    problems += [problem for lora in loras for problem in lora.problems]
    samples = sample_settings(manifest, base) if base else None
    problems += size_problems(manifest, base, samples) if base and samples else []
    problems += caption_problems(manifest, base) if base else []
    problems += [] if unfit else feedback_problems(manifest, scorers)
    problems += best_problems(manifest, scorers, samples, loras) if samples and not unfit else []
    jobs: tuple[Job, ...] = ()
    defaulted = list(manifest.defaulted)
    if base and samples and not unfit:
        jobs = tuple(jobs_of(manifest, base.ref, loras, samples, scorers, own))
        defaulted += sample_defaults(manifest, samples)
        defaulted += own_sample_defaults(jobs) if own.found else ()
        defaulted += unscored(scorers, samples, loras)
    defaulted += lora_defaults(loras, jobs)
    defaulted += unused(manifest, used)
    committed, stages, unlisted = _catalog(manifest, jobs)
    left = [job for job in jobs if job.job_id not in committed]
    trainings = _once([*(lora.training for lora in loras), *adapters_of(manifest, own, loras, scorers)])
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
        duration=_duration(left, modules, stages, base, own, _needed(trainings, trained, left)),
        trainings=trainings,
        trained=trained,
        own_bases=tuple(own.by_digest.values()),
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
    modules: Mapping[str, Modules],
    stages: Sequence[Mapping[str, float]],
    base: BaseFiles | None,
    own: OwnBases,
    trainings: Sequence[TrainJob],
) -> Duration:
    if not left or base is None:
        return Duration(0.0, 0.0, 0.0, "nothing is left to do")
    train_s = adapters_s(trainings, own.by_digest) + training_s(
        [one for one in trainings if not one.is_adapter], base.shapes, base.default_size, base.size_step
    )
    if stages:
        return replace(time_from(stages, len(left)), train_s=train_s)
    here = [job for job in left if job.base.digest == base.digest]
    found = time_of(here, modules, base.shapes, base.default_size, base.size_step)
    return replace(found, sample_s=found.sample_s + pictures_s(left, own.by_digest), train_s=train_s)
