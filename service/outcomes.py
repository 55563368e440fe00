"""What becomes of jobs: started, committed, tried again, given up. Said to the observers, counted, and recorded in the
catalog where it is a failure."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from service import events
from service.backlog import Backlog
from service.errors import NotFound, RunStopped, StorageError
from service.events import Observer
from service.faults import Breaker, Fault, Limits, backoff_s
from service.hands import Hands
from service.jobs import Job, TrainJob, Work
from service.messages import JobResult
from service.pace import Pace
from service.pool import Pool
from service.records import FailureRecords

SICK_AFTER = 5  # jobs that fail one after another on a worker, before it rests
SICK_S = (30.0, 600.0)  # for how long, at first and at most


@dataclass(slots=True)
class Progress:
    """Where the jobs of a run stand. `attempts` by job id, those that count and the one that committed."""

    left: int
    attempts: dict[str, int] = field(default_factory=dict)
    committed: list[Job] = field(default_factory=list)
    given_up: list[tuple[Job, str]] = field(default_factory=list)


class Outcomes:
    """Of a run of `jobs`. What has to be done again goes back to the backlog."""

    def __init__(
        self,
        jobs: Sequence[Job],
        backlog: Backlog,
        hands: Hands,
        pool: Pool,
        pace: Pace,
        records: FailureRecords,
        limits: Limits,
        tell: Observer,
        clock: Callable[[], float],
    ) -> None:
        self.progress = Progress(len(jobs))
        self.left = Counter(job.method for job in jobs)  # not settled, by method
        self.backlog, self.hands, self.pool, self.pace = backlog, hands, pool, pace
        self.records, self.limits, self.tell, self.clock = records, limits, tell, clock
        self.breaker = Breaker()
        self.broken: set[str] = set()  # LoRAs that no partner can use
        self.random = random.Random(0)  # jitter only

    def started(self, job: Work, worker: str) -> None:
        attempt = self.backlog.retries.attempts(job.job_id) + 1
        self.progress.attempts[job.job_id] = attempt
        if isinstance(job, TrainJob):
            self.tell(events.TrainingStarted(job, worker, attempt))
        else:
            self.tell(events.JobStarted(job, worker, attempt))

    def is_committed(self, job: Work) -> bool:
        if isinstance(job, TrainJob):
            return False  # whoever takes it up again finds it trained
        try:
            self.records.catalog.entry(job.job_id)
        except (NotFound, StorageError):
            return False
        return True

    def settle(self, job: Work, worker: str, result: JobResult) -> None:
        if result.status == "failed":
            self.failed([job], worker, "its own", result)
            return
        self.breaker.note(None)
        if (hand := self.hands.of.get(worker)) is not None and hand.failures:
            hand.failures = 0
            self.hands.sick.pop(worker, None)
        already = result.status == "already"
        if not already:
            now = self.clock()
            self.pace.learn(job.method, worker, result.stages, now - hand.since if hand is not None else None)
            if hand is not None:
                hand.since = now
            self.backlog.board.slowness[worker] = self.pace.slowness(worker)
        if isinstance(job, TrainJob):
            self.backlog.retries.forget(job.job_id)
            self._add(self.backlog.trainings.done(job.job_id))
            self.tell(events.TrainingDone(job, worker, already, result.stages, result.n_bytes, result.peak_bytes))
            return
        self.progress.committed.append(job)
        self.progress.attempts[job.job_id] = self.backlog.retries.attempts(job.job_id) + 1
        self._end(job)
        self.tell(
            events.JobCommitted(
                job, worker, already, result.stages, result.n_bytes, result.peak_bytes, result.alignments
            )
        )
        self.records.clear(job)

    def failed(self, jobs: list[Work], worker: str, fault: Fault, result: JobResult) -> None:
        """`jobs` ended together; those that are tried again stay together unless the verdict says otherwise."""
        kind, reason, now = result.kind or "Defect", result.reason or "", self.clock()
        if kind == "OutOfMemory" and fault == "its own" and len(jobs) == 1 and self.backlog.too_large(jobs[0], worker):
            fault = "none of its"  # a larger worker will do it
        again: list[Work] = []
        for job in jobs:
            verdict = self.backlog.retries.judge(job, kind, fault, now, self.random.random())
            attempt = self.progress.attempts[job.job_id]
            twin = self.hands.twin(job.job_id, worker) if kind not in self.limits.no_retry else None
            retry = verdict.retry or twin is not None
            failed = events.TrainingFailed if isinstance(job, TrainJob) else events.JobFailed
            self.tell(failed(job, worker, attempt, kind, reason, retry, verdict.counts))  # type: ignore[arg-type]
            if twin is not None:  # which is at it still
                if job.job_id in self.hands.of[twin].begun:
                    self.started(job, twin)
            elif verdict.retry:
                again.append(job)
            else:
                self._give_up(job, kind, reason, result.traceback or "")
        if again:
            self.backlog.retries.add(again, worker, verdict, now)
        if result.broken_lora is not None and result.broken_lora not in self.broken:
            self._break(result.broken_lora, kind, reason)
        self._suspect(worker, kind, now)
        # lost workers and a store that is away are nobody's pattern until jobs are given up for it
        if kind not in ("WorkerLost", "Unavailable") or not again:
            tripped = self.breaker.note(kind, reason, worker, self.pool.size)
            if tripped:
                raise RunStopped(
                    f"{tripped}: stopped early, {self.progress.left} jobs are left as they were."
                    " Mend what it names and run the same command again"
                )

    def _add(self, jobs: Sequence[Job]) -> None:
        """Jobs that waited for a training and need not any more."""
        self.backlog.board.admit(jobs, self.pool.size)
        self.hands.wake()

    def _suspect(self, worker: str, kind: str, now: float) -> None:
        """A worker on which one job after another fails rests for a while, longer each time: it fails faster than
        others work, and would use up an attempt of every job there is."""
        hand = self.hands.of.get(worker)
        if hand is not None and kind not in self.limits.no_retry and kind != "Unavailable":
            hand.failures += 1
            if hand.failures >= SICK_AFTER and self.pool.size > 1:
                self.hands.sick[worker] = now + backoff_s(hand.failures - SICK_AFTER + 1, 1.0, *SICK_S)
                self.backlog.board.release(worker)

    def _break(self, lora: str, kind: str, reason: str) -> None:
        """A LoRA that no partner can use: all that need it are given up with the one reason."""
        self.broken.add(lora)
        for job in self.backlog.remove(lora):
            if lora in job.loras:
                self._give_up(job, kind, reason, "")
            else:  # it waited together with one of those
                self.backlog.put_back([job])

    def _give_up(self, job: Work, kind: str, reason: str, traceback: str) -> None:
        if isinstance(job, TrainJob):
            for waiting in self.backlog.trainings.given_up(job.job_id):
                self._give_up(waiting, kind, f"its {job.role} {job.id} could not be trained: {reason}", traceback)
            self.backlog.retries.forget(job.job_id)
            return
        attempts = self.backlog.retries.attempts(job.job_id)
        self.progress.given_up.append((job, reason))
        self._end(job)
        self.records.write(job, reason, kind, traceback, attempts)
        self.tell(events.JobGivenUp(job, kind, reason, attempts))

    def _end(self, job: Job) -> None:
        self.progress.left -= 1
        self.left[job.method] -= 1
        if not self.left[job.method]:
            del self.left[job.method]
        self.backlog.retries.forget(job.job_id)
        self.hands.ended(job.job_id)
