"""What happens during a run, as values. Observers (progress, metrics, log) are functions of one event; they decide
nothing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from service.jobs import Job, TrainJob, Work
from service.messages import TileDone


@dataclass(frozen=True, slots=True)
class RunStarted:
    """`jobs` are all of the manifest's, `committed` those that were in the catalog before; `workers` asked for."""

    run_id: str
    catalog: str
    jobs: int
    committed: int
    workers: int


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker has its base model in memory. `model` of its GPU, whose memory it may use `n_bytes` of."""

    worker: str
    device: str
    load_s: float
    model: str = ""
    n_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class WorkerGone:
    """A worker died or was ended; `returns` says whether another takes its place."""

    worker: str
    reason: str
    returns: bool


@dataclass(frozen=True, slots=True)
class WorkerStalled:
    """A worker is well and waits for something outside, such as a store that does not answer."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class TileStarted:
    """`jobs` were given to a worker; none to let it finish its uploads."""

    worker: str
    jobs: int


@dataclass(frozen=True, slots=True)
class TileFinished:
    """The worker is free again; `done` says how it spent its time."""

    worker: str
    done: TileDone


@dataclass(frozen=True, slots=True)
class Outlook:
    """Every few seconds: jobs left, workers at hand, and seconds until the last job is done, None while nobody knows;
    `stages` are mean seconds."""

    left: int
    workers: int
    seconds: float | None
    stages: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class JobStarted:
    job: Job
    worker: str
    attempt: int


@dataclass(frozen=True, slots=True)
class JobCommitted:
    """`already`: another attempt had committed it first. `stages` in seconds; `n_bytes` written to the store;
    `alignments` by kind (style, subject, text), where the samples were scored."""

    job: Job
    worker: str
    already: bool
    stages: Mapping[str, float] = field(default_factory=dict)
    n_bytes: int = 0
    peak_bytes: int = 0
    alignments: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class JobFailed:
    """One attempt ended without a commit; `kind` is the name of an error of service/errors.py. `counts`: it used up one
    of the job's attempts, because nothing but the job can be to blame."""

    job: Job
    worker: str
    attempt: int
    kind: str
    reason: str
    retry: bool
    counts: bool = True


@dataclass(frozen=True, slots=True)
class JobGivenUp:
    """No attempt is left, or none would help. The reason is recorded in the catalog under `failures/`."""

    job: Job
    kind: str
    reason: str
    attempts: int


@dataclass(frozen=True, slots=True)
class TrainingStarted:
    """A LoRA is being trained, that pairs wait for."""

    training: TrainJob
    worker: str
    attempt: int


@dataclass(frozen=True, slots=True)
class TrainingAt:
    """Where a training is, of a LoRA or of a pair whose method trains: now and then, and first where it goes on from.
    `loss` is the mean since the last time, None at first."""

    job: Work
    worker: str
    step: int
    steps: int
    loss: float | None


@dataclass(frozen=True, slots=True)
class TrainingDone:
    """The LoRA is in the catalog; `already`: another attempt had put it there first."""

    training: TrainJob
    worker: str
    already: bool
    stages: Mapping[str, float] = field(default_factory=dict)
    n_bytes: int = 0
    peak_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TrainingFailed:
    """As JobFailed, of a training."""

    training: TrainJob
    worker: str
    attempt: int
    kind: str
    reason: str
    retry: bool
    counts: bool = True


@dataclass(frozen=True, slots=True)
class RunFinished:
    """`interrupted`: ended by a signal; what is committed stays, and the same command goes on from there."""

    committed: int
    given_up: int
    left: int
    seconds: float
    interrupted: bool


Event = (
    RunStarted
    | WorkerReady
    | WorkerGone
    | WorkerStalled
    | TileStarted
    | TileFinished
    | Outlook
    | JobStarted
    | JobCommitted
    | JobFailed
    | JobGivenUp
    | TrainingStarted
    | TrainingAt
    | TrainingDone
    | TrainingFailed
    | RunFinished
)
Observer = Callable[[Event], None]
