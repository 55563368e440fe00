"""The control loop: jobs out to workers, results in, until each is committed or given up. Everything else is policy
(tiles.py) or a pool."""

import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from service import events
from service.catalog import Catalog
from service.errors import NotFound, ServiceError, StorageError, WorkerLost
from service.events import Event, Observer
from service.jobs import Job, identity
from service.pool import Done, Lost, Pool, Ready
from service.tiles import Limits, backoff_s, choose, cut, gives_up
from service.worker import JobResult

POLL_S = 0.5
ELSEWHERE_S = 60.0  # how long a failed job waits for another worker than the one it failed on


@dataclass(frozen=True, slots=True)
class Retry:
    """A job that failed on `worker`: not before `due`, and until `elsewhere_until` only on another worker."""

    job: Job
    worker: str
    due: float
    elsewhere_until: float


@dataclass(slots=True)
class Progress:
    """Where every job of a run stands. `waiting` are those that failed and will be tried again."""

    tiles: dict[int, list[Job]]
    owners: dict[str, int] = field(default_factory=dict)  # worker → tile
    held: dict[str, set[str]] = field(default_factory=dict)  # worker → LoRAs in its cache
    waiting: list["Retry"] = field(default_factory=list)
    running: dict[str, Job] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    committed: list[Job] = field(default_factory=list)
    given_up: list[tuple[Job, str]] = field(default_factory=list)

    def left(self) -> int:
        return sum(map(len, self.tiles.values())) + len(self.waiting) + len(self.running)


def run(
    jobs: Sequence[Job],
    pool: Pool,
    catalog: Catalog,
    *,
    run_id: str,
    already: int = 0,
    limits: Limits | None = None,
    observers: Iterable[Observer] = (),
) -> Progress:
    """Do `jobs`; every one ends committed, or given up with a reason that is recorded in the catalog.

    KeyboardInterrupt ends the run at once: what is committed stays, the rest is as if it had not been started.
    Raises what ended the last worker when none is left: BadInput if the base loads nowhere.
    """
    loop = _Loop(jobs, pool, catalog, limits or Limits(), tuple(observers))
    started = time.monotonic()
    loop.tell(events.RunStarted(run_id, catalog.store.url, len(jobs) + already, already, pool.size))
    interrupted = False
    try:
        loop.drive()
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        progress = loop.progress
        loop.tell(
            events.RunFinished(
                len(progress.committed),
                len(progress.given_up),
                progress.left(),
                time.monotonic() - started,
                interrupted,
            )
        )
    return progress


class _Loop:
    def __init__(
        self, jobs: Sequence[Job], pool: Pool, catalog: Catalog, limits: Limits, observers: Sequence[Observer]
    ) -> None:
        self.pool, self.catalog, self.limits, self.observers = pool, catalog, limits, observers
        self.progress = Progress({i: list(tile) for i, tile in enumerate(cut(jobs, pool.size))})
        self.random = random.Random(0)  # jitter only
        self.last_loss: ServiceError | None = None
        self.clock: Callable[[], float] = time.monotonic

    def tell(self, event: Event) -> None:
        for observer in self.observers:
            observer(event)

    def drive(self) -> None:
        while self.progress.left():
            if self.pool.size == 0:
                raise self.last_loss or WorkerLost("no worker could be started")
            for worker in self.pool.idle():
                self._feed(worker)
            for report in self.pool.wait(POLL_S):
                self._take(report)
            self.pool.shrink(self.progress.left())

    def _feed(self, worker: str) -> None:
        job = self._next(worker)
        if job is None:
            return
        progress = self.progress
        progress.attempts[job.job_id] = progress.attempts.get(job.job_id, 0) + 1
        progress.running[worker] = job
        progress.held.setdefault(worker, set()).update((job.subject.lora_sha256, job.style.lora_sha256))
        self.pool.start(worker, job, self.limits.deadline_s)
        self.tell(events.JobStarted(job, worker, progress.attempts[job.job_id]))

    def _next(self, worker: str) -> Job | None:
        progress, now = self.progress, self.clock()
        for retry in progress.waiting:
            if retry.due <= now and (retry.worker != worker or retry.elsewhere_until <= now or self.pool.size == 1):
                progress.waiting.remove(retry)
                return retry.job
        tile = progress.owners.get(worker)
        if tile is None or not progress.tiles[tile]:
            taken = frozenset(number for owner, number in progress.owners.items() if owner != worker)
            tile = choose(progress.tiles, frozenset(progress.held.get(worker, ())), taken)
            if tile is None:
                return None
            progress.owners[worker] = tile
        return progress.tiles[tile].pop(0)

    def _take(self, report: Ready | Done | Lost) -> None:
        if isinstance(report, Ready):
            self.tell(events.WorkerReady(report.worker, report.device, report.load_s))
        elif isinstance(report, Done):
            self.progress.running.pop(report.worker)
            self._settle(report.job, report.worker, report.result)
        else:
            self.progress.held.pop(report.worker, None)
            self.progress.owners.pop(report.worker, None)
            self.tell(events.WorkerGone(report.worker, str(report.error), report.returns))
            self.last_loss = report.error
            if report.job is not None:
                self.progress.running.pop(report.worker)
                # it may have died after the commit
                kind = type(report.error).__name__
                result = JobResult(report.job.job_id, "failed", kind, str(report.error))
                self._settle(report.job, report.worker, self._unless_committed(report.job, result))

    def _unless_committed(self, job: Job, result: JobResult) -> JobResult:
        try:
            self.catalog.entry(job.job_id)
        except NotFound:
            return result
        except StorageError:
            return result
        return JobResult(job.job_id, "already")

    def _settle(self, job: Job, worker: str, result: JobResult) -> None:
        if result.status != "failed":
            self.progress.committed.append(job)
            self.tell(
                events.JobCommitted(
                    job,
                    worker,
                    result.status == "already",
                    result.stages,
                    result.n_bytes,
                    result.peak_bytes,
                    result.alignments,
                )
            )
            self._forget_failure(job)
            return
        kind, reason, attempts = result.kind or "Defect", result.reason or "", self.progress.attempts[job.job_id]
        final = gives_up(kind, attempts, self.limits)
        self.tell(events.JobFailed(job, worker, attempts, kind, reason, retry=not final))
        if final:
            self._give_up(job, kind, reason, attempts, result.traceback or "")
        else:
            due = self.clock() + backoff_s(attempts, self.random.random())
            self.progress.waiting.append(Retry(job, worker, due, due + ELSEWHERE_S))

    def _give_up(self, job: Job, kind: str, reason: str, attempts: int, traceback: str) -> None:
        self.progress.given_up.append((job, reason))
        inputs = {"subject": job.subject.lora, "style": job.style.lora, "base": job.base.location}
        try:
            self.catalog.record_failure(job.job_id, identity(job), reason, kind, traceback, attempts, inputs)
        except ServiceError as error:
            reason = f"{reason} (not recorded in the catalog: {error})"
        self.tell(events.JobGivenUp(job, kind, reason, attempts))

    def _forget_failure(self, job: Job) -> None:
        with suppress(StorageError):  # readers leave out failures of committed jobs
            self.catalog.clear_failure(job.job_id)
