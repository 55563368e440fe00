"""Prometheus metrics of a run: an observer in the coordinator, the only place where they are counted.

Workers send their timings with each result, so a restarted worker starts no new series. No label names a pair or a
job: their number has no bound. A short run is over before it is scraped, so the last values are also written beside
the results.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest, start_http_server

from service import events
from service.errors import ServiceError

ALIGNMENT_BUCKETS = tuple(n / 20 for n in range(-10, 21))  # cosines; what lies below −0.5 goes into the first
RATE_S = 300.0  # window of the rate of pairs
# kinds, as in service/errors.py
FAILURES = (
    *("Unavailable", "AccessDenied", "StoreFull", "NotFound", "Corrupted"),
    *("BadInput", "OutOfMemory", "WorkerLost", "DeadlineExceeded"),
)
STAGE_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)


class Metrics:
    """`observe` takes events; `serve` answers scrapes; `text` is the exposition format. deploy/METRICS.md lists all.

    clock: seconds that never go back, for rates and shares of this run.
    """

    def __init__(self, version: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = registry = CollectorRegistry()
        self._clock = clock
        self.jobs = Gauge("ziplora_jobs", "Jobs of this run's manifest, by state.", ["state"], registry=registry)
        self.attempts = Counter(
            "ziplora_attempts",
            "Attempts at a job that ended, by outcome: committed, already, or the kind of failure.",
            ["outcome"],
            registry=registry,
        )
        self.returns = Counter(
            "ziplora_returns",
            "Jobs that came back from a worker through no fault of theirs, by what ended it; no attempt is used up.",
            ["reason"],
            registry=registry,
        )
        self.given_up = Counter(
            "ziplora_given_up", "Jobs that were given up, by the kind of failure.", ["reason"], registry=registry
        )
        self.trainings = Counter(
            "ziplora_trainings",
            "Attempts at training a LoRA that ended, by outcome: trained, already, or the kind of failure.",
            ["outcome"],
            registry=registry,
        )
        self.tiles = Counter("ziplora_tiles", "Tiles of jobs given to workers.", registry=registry)
        self.tile_seconds = Histogram(
            "ziplora_tile_seconds",
            "Seconds that a worker was occupied with a tile.",
            buckets=STAGE_BUCKETS,
            registry=registry,
        )
        self.stages = Histogram(
            "ziplora_stage_seconds",
            "Seconds that a committed job, or a LoRA's training, spent in a stage.",
            ["stage"],
            buckets=STAGE_BUCKETS,
            registry=registry,
        )
        self.alignments = Histogram(
            "ziplora_alignment",
            "Alignments of the samples of a committed job, by kind: style, subject, text.",
            ["kind"],
            buckets=ALIGNMENT_BUCKETS,
            registry=registry,
        )
        self.busy = Counter("ziplora_worker_busy_seconds", "Seconds that workers spent computing.", registry=registry)
        self.present = Counter(
            "ziplora_worker_present_seconds",
            "Seconds that workers with their base in memory were there, summed over them.",
            registry=registry,
        )
        self.busy_share = Gauge(
            "ziplora_busy_ratio", "Share of the workers' time in this run that they spent computing.", registry=registry
        )
        self.rate = Gauge(
            "ziplora_pairs_per_second", f"Jobs committed in the last {RATE_S:.0f} s, by second.", registry=registry
        )
        self.eta = Gauge(
            "ziplora_eta_seconds", "Seconds until the last job is done; NaN while nobody knows.", registry=registry
        )
        self.cache = Counter(
            "ziplora_cache_requests",
            "Look-ups of workers in their caches (lora, calibration, calibration_file), by result (hit, miss).",
            ["cache", "result"],
            registry=registry,
        )
        self.read = Counter("ziplora_read_bytes", "Bytes of inputs fetched by workers.", registry=registry)
        self.written = Counter("ziplora_written_bytes", "Bytes of committed objects.", registry=registry)
        self.workers = Gauge("ziplora_workers", "Workers with their base model in memory.", registry=registry)
        self.up = Gauge("ziplora_worker_up", "1 while the worker is there, 0 when gone.", ["worker"], registry=registry)
        self.seen = Gauge(
            "ziplora_worker_last_seen_time_seconds",
            "Unix time at which the worker was last heard of.",
            ["worker"],
            registry=registry,
        )
        self.stalls = Counter(
            "ziplora_worker_stalls", "Signs of life from workers that wait for the store.", registry=registry
        )
        self.lost = Counter("ziplora_workers_lost", "Workers that ended before the run did.", registry=registry)
        self.load = Histogram(
            "ziplora_base_load_seconds",
            "Seconds that a worker took to load the base.",
            buckets=STAGE_BUCKETS,
            registry=registry,
        )
        self.peak = Gauge(
            "ziplora_peak_memory_bytes", "Largest memory that a job needed on a worker.", registry=registry
        )
        self.started = Gauge("ziplora_run_start_time_seconds", "Unix time at which the run started.", registry=registry)
        Info("ziplora_build", "Version of this program.", registry=registry).info({"version": version})
        for kind in FAILURES:  # from the start: in a series that begins at 1, queries see no increase
            self.attempts.labels(kind)
            self.returns.labels(kind)
            self.given_up.labels(kind)
        self._states: dict[str, int] = dict.fromkeys(("left", "running", "committed", "given_up"), 0)
        for state in self._states:
            self.jobs.labels(state).set_function(lambda state=state: self._states[state])  # type: ignore[misc]
        self.workers.set_function(lambda: len(self._ready))
        self.rate.set_function(self._rate)
        self.eta.set(math.nan)
        self._ready: set[str] = set()
        self._present_since = clock()
        self._commits: deque[float] = deque()  # times of the last RATE_S seconds
        self._began: float | None = None
        self._peak = self._busy_s = self._present_s = 0.0
        self._labelled: dict[tuple[str, ...], Any] = {}

    def observe(self, event: events.Event) -> None:
        match event:
            case events.RunStarted():
                self.started.set_to_current_time()
                self._began = self._clock()
                self._states.update(left=event.jobs - event.committed, committed=event.committed)
            case events.WorkerReady():
                self._count_presence()
                self._ready.add(event.worker)
                self.load.observe(event.load_s)
                self._see(event.worker, 1)
            case events.WorkerGone():
                self._count_presence()
                self._ready.discard(event.worker)
                self.lost.inc()
                self._see(event.worker, 0)
            case events.WorkerStalled():
                self.stalls.inc()
                self._see(event.worker, 1)
            case events.TileStarted():
                if event.jobs:
                    self.tiles.inc()
            case events.TileFinished(worker, done):
                self._see(worker, 1)
                self.tile_seconds.observe(done.seconds)
                self.busy.inc(done.busy_s)
                self._busy_s += done.busy_s
                self.read.inc(done.bytes_in)
                for result, counts in (("hit", done.hits), ("miss", done.misses)):
                    for name, number in counts.items():
                        self._of(self.cache, name, result).inc(number)
            case events.Outlook():
                self._count_presence()
                self.eta.set(math.nan if event.seconds is None else event.seconds)
            case events.JobStarted():
                self._move("left", "running")
            case events.JobCommitted():
                self._move("running", "committed")
                self._of(self.attempts, "already" if event.already else "committed").inc()
                for stage, seconds in event.stages.items():
                    self._of(self.stages, stage).observe(seconds)
                for kind, cosine in event.alignments.items():
                    self._of(self.alignments, kind).observe(cosine)
                self.written.inc(event.n_bytes)
                self._note_peak(event.peak_bytes)
                self._commits.append(self._clock())
                self._forget()
            case events.JobFailed():
                self._move("running", "left")
                self._of(self.attempts if event.counts else self.returns, event.kind).inc()
            case events.JobGivenUp():
                self._move("left", "given_up")
                self._of(self.given_up, event.kind).inc()
            case events.TrainingAt():
                self._see(event.worker, 1)
            case events.TrainingDone():
                for stage, seconds in event.stages.items():
                    self._of(self.stages, stage).observe(seconds)
                self._of(self.trainings, "already" if event.already else "trained").inc()
                self.written.inc(event.n_bytes)
                self._note_peak(event.peak_bytes)
            case events.TrainingFailed():
                self._of(self.trainings, event.kind).inc()
            case events.RunFinished():
                self._count_presence()
                self.eta.set(0 if not event.left else math.nan)

    def _of(self, metric: Any, *labels: str) -> Any:
        """`metric.labels(…)`, which is slow, once for each."""
        key = (metric._name, *labels)
        if key not in self._labelled:
            self._labelled[key] = metric.labels(*labels)
        return self._labelled[key]

    def _note_peak(self, n_bytes: int) -> None:
        if n_bytes > self._peak:
            self._peak = n_bytes
            self.peak.set(n_bytes)

    def _move(self, source: str, target: str) -> None:
        self._states[source] -= 1
        self._states[target] += 1

    def _see(self, worker: str, up: int) -> None:
        self._of(self.up, worker).set(up)
        self._of(self.seen, worker).set_to_current_time()

    def _count_presence(self) -> None:
        now = self._clock()
        seconds = (now - self._present_since) * len(self._ready)
        self._present_since = now
        self.present.inc(seconds)
        self._present_s += seconds
        if self._present_s:
            self.busy_share.set(self._busy_s / self._present_s)

    def _forget(self) -> None:
        limit = self._clock() - RATE_S
        while self._commits and self._commits[0] < limit:
            self._commits.popleft()

    def _rate(self) -> float:
        self._forget()
        passed = RATE_S if self._began is None else min(RATE_S, self._clock() - self._began)
        return len(self._commits) / passed if passed > 0 else 0.0

    def serve(self, port: int, address: str = "0.0.0.0") -> WSGIServer:
        """Answer scrapes on `port` from a thread. ServiceError when the port is taken."""
        try:
            server, _ = start_http_server(port, address, self.registry)
        except OSError as error:
            raise PortInUse(
                f"--metrics-port {port} cannot be used ({error.strerror}): choose another port, or 0 for none"
            ) from error
        return server

    def text(self) -> bytes:
        return generate_latest(self.registry)


class PortInUse(ServiceError):
    exit_code = 2
