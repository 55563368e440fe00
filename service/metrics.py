"""Prometheus metrics of a run: an observer in the coordinator, the only place where they are counted.

Workers send their timings with each result, so a restarted worker starts no new series. No label names a pair or a
job: their number has no bound. A short run is over before it is scraped, so the last values are also written beside
the results.
"""

from collections.abc import Mapping
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest, start_http_server

from service import events
from service.errors import ServiceError

ALIGNMENT_BUCKETS = tuple(n / 20 for n in range(-10, 21))  # cosines; what lies below −0.5 goes into the first
STAGE_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)


class Metrics:
    """`observe` takes events; `serve` answers scrapes; `text` is the exposition format."""

    def __init__(self, version: str) -> None:
        self.registry = registry = CollectorRegistry()
        self.jobs = Gauge("ziplora_jobs", "Jobs of this run's manifest, by state.", ["state"], registry=registry)
        self.attempts = Counter(
            "ziplora_attempts",
            "Attempts at a job that ended, by outcome: committed, already, or the kind of failure.",
            ["outcome"],
            registry=registry,
        )
        self.stages = Histogram(
            "ziplora_stage_seconds",
            "Seconds that a committed job spent in a stage.",
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
        self.busy = Counter(
            "ziplora_worker_busy_seconds", "Seconds that workers spent on jobs that were committed.", registry=registry
        )
        self.written = Counter("ziplora_written_bytes", "Bytes of committed objects.", registry=registry)
        self.workers = Gauge("ziplora_workers", "Workers with their base model in memory.", registry=registry)
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
        self._states: dict[str, int] = dict.fromkeys(("left", "running", "committed", "given_up"), 0)
        self._ready: set[str] = set()
        self._peak = 0

    def observe(self, event: events.Event) -> None:
        match event:
            case events.RunStarted():
                self.started.set_to_current_time()
                self._states.update(left=event.jobs - event.committed, committed=event.committed)
            case events.WorkerReady():
                self._ready.add(event.worker)
                self.load.observe(event.load_s)
            case events.WorkerGone():
                self._ready.discard(event.worker)
                self.lost.inc()
            case events.JobStarted():
                self._move("left", "running")
            case events.JobCommitted():
                self._move("running", "committed")
                self.attempts.labels("already" if event.already else "committed").inc()
                self._time(event.stages)
                for kind, cosine in event.alignments.items():
                    self.alignments.labels(kind).observe(cosine)
                self.written.inc(event.n_bytes)
                self._peak = max(self._peak, event.peak_bytes)
                self.peak.set(self._peak)
            case events.JobFailed():
                self._move("running", "left" if event.retry else "given_up")
                self.attempts.labels(event.kind).inc()
            case events.JobGivenUp() | events.RunFinished():
                pass
        for state, number in self._states.items():
            self.jobs.labels(state).set(number)
        self.workers.set(len(self._ready))

    def _move(self, source: str, target: str) -> None:
        self._states[source] -= 1
        self._states[target] += 1

    def _time(self, stages: Mapping[str, float]) -> None:
        for stage, seconds in stages.items():
            self.stages.labels(stage).observe(seconds)
        self.busy.inc(sum(stages.values()))

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
