"""A job: one pair, one method, one seed, with everything that changes its result. Values only; sent to workers as JSON.

Identity is content: digests of the base, of both LoRAs and of the reference images, ids, prompts, triggers, weights,
method with its knobs, seed and sample settings. Locations are left out, so that a catalog stays valid when files move.
job_id = sha256 of the identity.
"""

import hashlib
import json
import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

Role = Literal["subject", "style"]
Architecture = Literal["sdxl", "sd15", "amused"]
MASKED_ARCHITECTURES: tuple[Architecture, ...] = ("amused",)  # masked-token models, on which no LoRAs are merged

ALGORITHM = 2  # raised whenever the same inputs would give another result: old entries are then no longer taken as done
TRAINING_ALGORITHM = 1  # the same, for LoRAs that a run trains
TRAINING = "train"  # what the work of a TrainJob is called, among the methods
TEMPLATE_FIELDS = ("subject", "style")
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One reference image: where it lies (absolute path or s3 URL) and the sha256 of its bytes."""

    location: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Concept:
    """One LoRA with what a merge must know of it. `weight` scales its whole update; `images` may be empty.

    `trained`: the run trains the LoRA itself, so that its bytes are not known before: `lora_sha256` is then the id of
    its TrainJob, under which the catalog keeps it. A method that looks at no LoRA has concepts without one, '' and ''.
    """

    id: str
    role: Role
    lora: str  # absolute path or s3 URL
    lora_sha256: str
    prompt: str  # the prompt that the LoRA was trained with
    trigger: str  # the words that stand for it in sample prompts
    images: tuple[ImageRef, ...] = ()
    weight: float = 1.0
    trained: bool = False
    captions: tuple[str, ...] = ()  # of each image, for a method that trains on them


@dataclass(frozen=True, slots=True)
class BaseRef:
    """The base model: an absolute directory or a hub id; `digest` is over the files that determine results."""

    location: str
    revision: str | None
    digest: str
    architecture: Architecture


@dataclass(frozen=True, slots=True)
class SamplePrompt:
    """A named template: `{subject}` and `{style}` stand for the trigger words."""

    name: str
    template: str


@dataclass(frozen=True, slots=True)
class SampleSettings:
    """Which images are sampled from each merge: prompts × seeds × style strengths; none when one of them is empty."""

    prompts: tuple[SamplePrompt, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance: float
    width: int  # pixels
    height: int  # pixels
    scheduler: str | None = None  # a diffusers class name; None = the base's own
    negative: str = ""
    style_strengths: tuple[float, ...] = (1.0,)

    @property
    def n_images(self) -> int:
        return len(self.prompts) * len(self.seeds) * len(self.style_strengths)


@dataclass(frozen=True, slots=True)
class ScorerRef:
    """A model that judges samples: an absolute directory or a hub id; `digest` as that of a base."""

    location: str
    revision: str | None
    digest: str


@dataclass(frozen=True, slots=True)
class Scorers:
    """Who judges the samples: a CLIP the style and the text, a self-supervised model the subject; None: nobody does."""

    clip: ScorerRef | None = None
    dino: ScorerRef | None = None

    def __bool__(self) -> bool:
        return self.clip is not None or self.dino is not None


NO_SCORERS = Scorers()
SCORED_STRENGTH = 1.0  # samples of other style strengths are there to show what the strength does


@dataclass(frozen=True, slots=True)
class Job:
    """A pair with everything that changes its result, and when it comes. `job_id` is computed, never given."""

    base: BaseRef
    subject: Concept
    style: Concept
    method: str
    knobs: Mapping[str, Any]  # every knob of the method, defaults filled in; JSON values
    seed: int
    samples: SampleSettings
    outputs: tuple[str, ...] = ()  # objects on request: "peft" = the merged file's PEFT-layout twin
    scorers: Scorers = NO_SCORERS
    priority: int = 0  # higher goes first; changes nothing about the result, so it is no part of the identity
    job_id: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "job_id", hashlib.sha256(_identity_json(self).encode()).hexdigest())

    def __hash__(self) -> int:
        return hash(self.job_id)

    @property
    def pair(self) -> str:
        return f"{self.subject.id}/{self.style.id}"

    @property
    def loras(self) -> tuple[str, ...]:
        """Digests of the LoRAs that it needs."""
        return tuple(concept.lora_sha256 for concept in (self.subject, self.style) if concept.lora_sha256)

    @property
    def trainings(self) -> tuple[str, ...]:
        """Ids of the TrainJobs that have to be done before."""
        return tuple(concept.lora_sha256 for concept in (self.subject, self.style) if concept.trained)


@dataclass(frozen=True, slots=True)
class TrainJob:
    """A LoRA to be trained from pictures, with everything that changes it; for as many pairs as need it. Its id stands
    for the LoRA where a file's sha256 otherwise does.

    On a masked-token base it is an adapter, with the settings of one, and of its second round under `feedback`."""

    base: BaseRef
    id: str  # the concept's, for people: no part of its identity
    role: Role
    images: tuple[ImageRef, ...]
    captions: tuple[str, ...]  # of each image
    settings: Mapping[str, Any]  # of TrainSettings, or of AdapterSettings on a masked base: all of them; JSON values
    clip: ScorerRef | None = None  # picks the pictures of a second round; settings["feedback"] has its digest
    job_id: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "job_id", job_id(identity(self)))

    def __hash__(self) -> int:
        return hash(self.job_id)

    @property
    def pair(self) -> str:
        """What messages call it, where they name the pair of a job."""
        return f"{self.role}s.{self.name}"

    @property
    def name(self) -> str:
        """The concept's id, told apart from that of its LoRA where it is an adapter."""
        return f"{self.id}-{self.base.architecture}" if self.is_adapter else self.id

    @property
    def is_adapter(self) -> bool:
        return self.base.architecture in MASKED_ARCHITECTURES

    @property
    def method(self) -> str:
        return TRAINING

    @property
    def loras(self) -> tuple[str, ...]:
        return ()


Work = Job | TrainJob  # what a worker is given


def as_candidate(job: Job, method: str, knobs: Mapping[str, Any], samples: SampleSettings) -> Job:
    """The job by another method under its own id: what it writes names the job whose result it may become."""
    other = replace(job, method=method, knobs=knobs, samples=samples)
    object.__setattr__(other, "job_id", job.job_id)
    return other


def identity(job: Work) -> dict[str, Any]:
    """Everything that changes the job's result, as JSON values; nothing that does not."""
    if isinstance(job, TrainJob):
        return {
            "training": TRAINING_ALGORITHM,
            "base": _base_identity(job.base),
            "images": [image.sha256 for image in job.images],
            "captions": list(job.captions),
            "settings": dict(job.settings),
        }
    return {
        "algorithm": ALGORITHM,
        "base": _base_identity(job.base),
        "subject": _concept_identity(job.subject),
        "style": _concept_identity(job.style),
        "method": job.method,
        "knobs": dict(job.knobs),
        "seed": job.seed,
        "samples": asdict(job.samples),
        "outputs": sorted(job.outputs),
    } | ({"scorers": _scorers_identity(job.scorers)} if job.scorers else {})


def _identity_json(job: Job) -> str:
    """canonical_json(identity(job)), from parts that the jobs of a grid share: a million pairs, two thousand LoRAs."""
    # ids from before there were scores stay valid: without scorers the identity has no such field
    scorers = f'"scorers":{_scorers_json(job.scorers)},' if job.scorers else ""
    return (
        f'{{"algorithm":{ALGORITHM},"base":{_base_json(job.base)},"knobs":{canonical_json(dict(job.knobs))},'
        f'"method":{canonical_json(job.method)},"outputs":{_outputs_json(job.outputs)},'
        f'"samples":{_samples_json(job.samples)},{scorers}"seed":{job.seed},'
        f'"style":{_concept_json(job.style)},"subject":{_concept_json(job.subject)}}}'
    )


@lru_cache(64)
def _base_json(base: BaseRef) -> str:
    return canonical_json(_base_identity(base))


@lru_cache(64)
def _outputs_json(outputs: tuple[str, ...]) -> str:
    return canonical_json(sorted(outputs))


@lru_cache(64)
def _samples_json(samples: SampleSettings) -> str:
    return canonical_json(asdict(samples))


@lru_cache(64)
def _scorers_json(scorers: Scorers) -> str:
    return canonical_json(_scorers_identity(scorers))


def _concept_json(concept: Concept) -> str:
    """By the object, not by its value: hashing a concept with its images costs as much as writing it out."""
    known = _concepts.get(id(concept))
    if known is None or known[0] is not concept:
        if len(_concepts) >= 16384:
            _concepts.clear()
        known = _concepts[id(concept)] = (concept, canonical_json(_concept_identity(concept)))
    return known[1]


_concepts: dict[int, tuple[Concept, str]] = {}  # frozen values, kept alive here so that no id is used again


def _base_identity(base: BaseRef) -> dict[str, Any]:
    return {"digest": base.digest, "architecture": base.architecture}


def _concept_identity(concept: Concept) -> dict[str, Any]:
    return {
        "id": concept.id,
        "lora": concept.lora_sha256,
        "prompt": concept.prompt,
        "trigger": concept.trigger,
        "images": [image.sha256 for image in concept.images],
        "weight": concept.weight,
    } | ({"captions": list(concept.captions)} if concept.captions else {})


def _scorers_identity(scorers: Scorers) -> dict[str, str]:
    return {kind: ref.digest for kind, ref in (("clip", scorers.clip), ("dino", scorers.dino)) if ref}


def canonical_json(value: Any) -> str:
    """One text per value: keys sorted, no spaces, ASCII. ValueError for NaN and infinities, TypeError for non-JSON."""
    return _ENCODER.encode(value)


def job_id(identity: Mapping[str, Any]) -> str:
    """sha256 of the identity's canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()


def to_json(job: Work) -> str:
    """The job with its locations, for a worker."""
    return canonical_json(asdict(job))


def from_json(text: str) -> Work:
    """The job that `to_json` wrote. ValueError when this version of the code would write other fields or another id."""
    try:
        fields = json.loads(text)
        claimed = fields.pop("job_id")
        job = _train_job(fields) if "subject" not in fields else _job(fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a job as this version writes it ({error}): run the same version everywhere") from error
    if job.job_id != claimed:
        raise ValueError(
            f"job {claimed[:12]} has identity {job.job_id[:12]} here (algorithm {ALGORITHM}): "
            "was it altered, or sent by another version?"
        )
    return job


def _job(fields: dict[str, Any]) -> Job:
    return Job(
        base=BaseRef(**fields.pop("base")),
        subject=_concept(fields.pop("subject")),
        style=_concept(fields.pop("style")),
        samples=_samples(fields.pop("samples")),
        outputs=tuple(fields.pop("outputs")),
        scorers=_scorers(fields.pop("scorers")),
        **fields,
    )


def _train_job(fields: dict[str, Any]) -> TrainJob:
    clip = fields.pop("clip")
    return TrainJob(base=BaseRef(**fields.pop("base")), clip=clip and ScorerRef(**clip), **_tuples(fields))


def _concept(fields: dict[str, Any]) -> Concept:
    return Concept(**_tuples(fields))


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """The pictures with their captions as values again."""
    images = tuple(ImageRef(**image) for image in fields["images"])
    return {**fields, "images": images, "captions": tuple(fields["captions"])}


def _samples(fields: dict[str, Any]) -> SampleSettings:
    return SampleSettings(
        **{
            **fields,
            "prompts": tuple(SamplePrompt(**prompt) for prompt in fields["prompts"]),
            "seeds": tuple(fields["seeds"]),
            "style_strengths": tuple(fields["style_strengths"]),
        }
    )


def _scorers(fields: dict[str, Any]) -> Scorers:
    return Scorers(**{kind: ref and ScorerRef(**ref) for kind, ref in fields.items()})


def template_problem(template: str) -> str | None:
    """Why a prompt template cannot be rendered, or None. `{{` and `}}` are literal braces."""
    try:
        for _, name, spec, conversion in string.Formatter().parse(template):
            if name is None:
                continue
            if name not in TEMPLATE_FIELDS:
                return f"unknown field {{{name}}}: a template knows {{subject}} and {{style}}"
            if spec or conversion:
                return f"{{{name}}} takes no format: write it without ':' and '!'"
    except ValueError:
        return "unbalanced braces: write {{ and }} for literal ones"
    return None


def shows_pair(template: str) -> bool:
    """Whether its pictures are of the subject in the style."""
    return {name for _, name, _, _ in string.Formatter().parse(template)} >= set(TEMPLATE_FIELDS)


def render(template: str, subject: Concept, style: Concept) -> str:
    """The prompt: `{subject}` and `{style}` replaced by the trigger words."""
    return template.format(subject=subject.trigger, style=style.trigger)
