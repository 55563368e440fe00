"""What the control loop and its workers say to each other. Values only; neither torch nor Ray."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from service.jobs import Job, Work


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Where the worker reads and writes, and what it runs on. `device` "auto" takes a GPU if there is one.

    `threads` is fixed so that results do not depend on the machine's core count: sums of floats do. `side_by_side` is
    how many pairs share a forward pass: 0 lets a GPU's free memory decide and is 1 on a CPU, where it gains nothing.
    """

    catalog: str
    base: str
    base_revision: str | None
    base_digest: str | None = None  # what the jobs were planned with; None: whatever is there
    device: str = "auto"
    dtype: str = "auto"
    compile: str | None = None  # a backend of torch.compile for the UNet
    threads: int = 1
    cache_dir: str = ""
    cache_bytes: int = 50 * 2**30
    memory_cache_bytes: int = 0  # of LoRAs; 0: a share of this machine's memory
    workers_per_node: int = 1  # that share it
    gpu_share: float = 1.0  # of the GPU's memory; the rest is other workers'
    side_by_side: int = 0
    overlap: bool = True  # fetch ahead and upload behind the merges; False: one thing after another
    checkpoint_s: float = 60.0  # between two checkpoints of a training
    store_patience_s: float = 600.0  # how long a worker waits for a store that does not answer, keeping what it made


@dataclass(frozen=True, slots=True)
class Tile:
    """Jobs for one worker, in the order in which it does them. `ahead` comes next for it, if all goes well: what it
    may fetch meanwhile. A tile without jobs asks for the end of what is still uploading. A training has a tile of its
    own."""

    jobs: tuple[Work, ...]
    ahead: tuple[Job, ...] = ()


# From a worker, while it works on a tile


@dataclass(frozen=True, slots=True)
class Began:
    """These jobs are being merged from now on, side by side: if the process dies, it was one of them."""

    job_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Learned:
    """A training, or a job whose method trains, is at `step` of `steps`; said first of where it goes on from. `loss`
    is the mean since the last word, None at first."""

    job_id: str
    step: int
    steps: int
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class Stalled:
    """The worker is well and waits for something outside, such as a store that does not answer."""

    reason: str


@dataclass(frozen=True, slots=True)
class JobResult:
    """What came of one attempt. `kind` and `reason` are None unless it failed; `stages` in seconds."""

    job_id: str
    status: str  # committed | already | failed
    kind: str | None = None
    reason: str | None = None
    traceback: str | None = None
    stages: Mapping[str, float] = field(default_factory=dict)
    n_bytes: int = 0
    peak_bytes: int = 0
    alignments: Mapping[str, float] = field(default_factory=dict)  # style, subject, text → mean cosine, if there is one
    broken_lora: str | None = None  # sha256 of the LoRA that cannot be used with any partner


@dataclass(frozen=True, slots=True)
class TileDone:
    """The last thing said of a tile: the worker is free. Jobs that have no result yet are uploading; their results
    come with the next tile.

    `seconds` of wall time, `busy_s` of it computing; hits and misses since the last tile, by cache (lora, calibration,
    calibration_file); `held`: sha256 of the LoRAs in memory.
    """

    held: frozenset[str] = frozenset()
    seconds: float = 0.0
    busy_s: float = 0.0
    hits: Mapping[str, int] = field(default_factory=dict)
    misses: Mapping[str, int] = field(default_factory=dict)
    bytes_in: int = 0
    side_by_side: int = 1


Message = Began | Learned | Stalled | JobResult | TileDone
