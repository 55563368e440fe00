"""The control loop: tiles out to workers, results in, until each job is committed or given up. Everything else is
policy (tiles.py, faults.py, pace.py) or a pool."""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from service import events
from service.boards import Boards
from service.catalog import Catalog
from service.errors import NotFound, RunStopped, ServiceError, StorageError, WorkerLost
from service.events import Event, Observer
from service.faults import Breaker, Fault, Limits, backoff_s
from service.hands import Hand, late_jobs
from service.jobs import TRAINING, Job, TrainJob, Work
from service.messages import Began, JobResult, Learned, Stalled, Tile, TileDone
from service.pace import Pace
from service.pool import Leaving, Lost, Pool, Ready, Report, Said
from service.records import FailureRecords
from service.retries import Retries
from service.tiles import copies, tile_size, workers_wanted
from service.trainings import Trainings

POLL_S = 0.5
OUTLOOK_S = 5.0  # between two estimates of the end
GATHERING_S = 900.0  # in which workers may still come that have more memory than those that are there
COPY_LOOK_S = 2.0  # between two looks for jobs that an idle worker shall do as well
SICK_AFTER = 5  # jobs that fail one after another on a worker, before it rests
SICK_S = (30.0, 600.0)  # for how long, at first and at most


@dataclass(slots=True)
class Progress:
    """Where the jobs of a run stand. `attempts` by job id, those that count and the one that committed."""

    left: int
    attempts: dict[str, int] = field(default_factory=dict)
    committed: list[Job] = field(default_factory=list)
    given_up: list[tuple[Job, str]] = field(default_factory=list)


def run(
    jobs: Sequence[Job],
    pool: Pool,
    catalog: Catalog,
    *,
    run_id: str,
    already: int = 0,
    limits: Limits | None = None,
    observers: Iterable[Observer] = (),
    prior_s: float | None = None,
    need: Callable[[Job], int] | None = None,
    trainings: Sequence[TrainJob] = (),
    training_s: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """Do `jobs`; every one ends committed, or given up with a reason that is recorded in the catalog.

    prior_s: seconds that a job is thought to take. need: bytes of a GPU's memory that it is thought to need, see
    boards.py. trainings: of the LoRAs that some of the jobs need and that the catalog lacks, training_s each; one that
    fails for good is given up with all those jobs.
    KeyboardInterrupt ends the run at once: what is committed stays, the rest is as if it had not been started. Raises
    what ended the last worker when none is left (BadInput if the base loads nowhere), and RunStopped when most jobs
    fail for one reason.
    """
    records = FailureRecords(catalog)
    pace = Pace(prior_s, training_s)
    loop = _Loop(jobs, trainings, pool, records, limits or Limits(), tuple(observers), pace, need, clock)
    started = clock()
    loop.tell(events.RunStarted(run_id, catalog.store.url, len(jobs) + already, already, pool.size))
    interrupted = False
    try:
        loop.drive()
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        records.close(wait=not interrupted)
        progress = loop.progress
        loop.tell(
            events.RunFinished(
                len(progress.committed), len(progress.given_up), progress.left, clock() - started, interrupted
            )
        )
    return progress


class _Loop:
    def __init__(
        self,
        jobs: Sequence[Job],
        trainings: Sequence[TrainJob],
        pool: Pool,
        records: FailureRecords,
        limits: Limits,
        observers: Sequence[Observer],
        pace: Pace,
        need: Callable[[Job], int] | None,
        clock: Callable[[], float],
    ) -> None:
        self.pool, self.records, self.limits, self.observers = pool, records, limits, observers
        self.pace, self.clock = pace, clock
        self.trainings = Trainings(trainings, jobs)
        self.board = Boards(self.trainings.ready, pool.size, need)
        self.progress = Progress(len(jobs))
        self.left = Counter(job.method for job in jobs)  # not settled, by method
        self.hands: dict[str, Hand] = {}  # of workers that are ready
        self.free: dict[str, None] = {}  # to be fed
        self.resting: dict[str, None] = {}  # free, and there was nothing for them
        self.retries = Retries(limits)
        self.sick: dict[str, float] = {}  # worker → until when it rests
        self.broken: set[str] = set()  # LoRAs that no partner can use
        self.breaker = Breaker()
        self.random = random.Random(0)  # jitter only
        self.last_loss: ServiceError | None = None
        self.copied: set[str] = set()  # jobs that two workers were given
        self.started = clock()
        self.next_look = self.next_outlook = self.next_copies = 0.0

    def tell(self, event: Event) -> None:
        for observer in self.observers:
            observer(event)

    def drive(self) -> None:
        while self.progress.left:
            if self.pool.size == 0:
                raise self.last_loss or WorkerLost("no worker could be started")
            self._wake()
            while self.free:
                self._feed(next(iter(self.free)))
            for report in self.pool.wait(POLL_S):
                self._take(report)
            if self.pool.size > self._useful():
                self._shrink()

    # Out

    def _wake(self) -> None:
        """Workers that had nothing to do look again, now and then, for jobs whose time has come."""
        now = self.clock()
        self.board.complete = len(self.hands) >= self.pool.size or now - self.started > GATHERING_S
        if self.resting and (self.retries or self.sick or self.board.left) and now >= self.next_look:
            self.next_look = now + POLL_S
            self.free |= self.resting
            self.resting.clear()
        if now >= self.next_outlook:
            self.next_outlook = now + OUTLOOK_S
            left = self.left + Counter({TRAINING: self.trainings.left})
            seconds = self.pace.seconds_left(left, self.hands, self.board.loads)
            self.pool.grow(workers_wanted(self.pace.work_s(left, self.board.loads), left.total()))
            self.tell(events.Outlook(self.progress.left, len(self.hands), seconds, self.pace.stages()))

        if self.resting and not self.board.left and now >= self.next_copies:
            self.next_copies = now + COPY_LOOK_S
            self._copy(now)

    def _feed(self, worker: str) -> None:
        del self.free[worker]
        hand = self.hands[worker]
        tile = None if hand.leaving else self._next(worker, hand)
        if tile is None and hand.given:
            tile = Tile(())  # the rest of its uploads
        if tile is None and hand.leaving:
            del self.hands[worker]
            self.pool.replace(worker)
            return
        if tile is None:
            self.resting[worker] = None
            return
        self._give(worker, hand, tile)

    def _give(self, worker: str, hand: Hand, tile: Tile) -> None:
        if not hand.given:
            hand.since = self.clock()
        hand.given.update((job.job_id, job) for job in tile.jobs)
        hand.tile = tuple(job.job_id for job in tile.jobs)
        self.pool.start(worker, tile, self._deadline_s(worker, hand, tile))
        self.tell(events.TileStarted(worker, len(tile.jobs)))

    def _copy(self, now: float) -> None:
        """At the end, when nothing is left to give out: idle workers also do what others will be late with."""
        if not self.limits.copies:
            return
        late = [
            (seconds, job)
            for worker, hand in self.hands.items()
            for seconds, job in late_jobs(hand, now, partial(self._learned_s, worker))
            # a second training would go on from the first one's checkpoints, and be no earlier
            if isinstance(job, Job) and job.job_id not in self.copied and not self.retries.knows(job.job_id)
        ]
        idle = [
            (self.pace.learned_s(None, worker) or 0.0, worker) for worker in self.resting if worker not in self.sick
        ]
        for worker, job in copies(late, idle):
            if self.board.fits(job, worker):
                del self.resting[worker]
                self.copied.add(job.job_id)
                self._give(worker, self.hands[worker], Tile((job,)))

    def _learned_s(self, worker: str, job: Work) -> float | None:
        return self.pace.learned_s(job.method, worker)

    def _useful(self) -> int:
        """Workers that could have something to do: as many as jobs, twice if each may be copied, and trainings."""
        return self.progress.left * (1 + bool(self.limits.copies and self.pace.stages())) + self.trainings.left

    def _deadline_s(self, worker: str, hand: Hand, tile: Tile) -> float:
        if not tile.jobs:
            return self.limits.deadline_s
        return max(
            self.pace.deadline_s(method, worker, hand.side_by_side, self.limits.deadline_s)
            for method in {job.method for job in tile.jobs}
        )

    def _next(self, worker: str, hand: Hand) -> Tile | None:
        now = self.clock()
        if self.sick.get(worker, 0.0) > now:
            return None
        jobs = self.retries.take(worker, now, self.pool.size == 1, lambda job: self._fits(job, worker))
        if jobs:
            return Tile(jobs)
        training = self.trainings.take(self.pool.size, self.board.left)
        if training is not None:
            return Tile((training,))
        method = None if len(self.left) > 1 else next(iter(self.left))
        job_s = self.pace.learned_s(method, worker)
        n = tile_size(job_s, self.progress.left, len(self.hands), hand.side_by_side)
        return self.board.take(worker, n, hand.held)

    def _fits(self, job: Work, worker: str) -> bool:
        return isinstance(job, TrainJob) or self.board.fits(job, worker)

    def _too_large(self, job: Work, worker: str) -> bool:
        return isinstance(job, Job) and self.board.too_large(job, worker)

    def _shrink(self) -> None:
        spare = [worker for worker in (*self.resting, *self.free) if not self.hands[worker].given]
        for worker in self.pool.shrink(self._useful(), spare):
            self.hands.pop(worker, None)
            self.free.pop(worker, None)
            self.resting.pop(worker, None)
            self.board.release(worker)
            self.board.leave(worker)

    # In

    def _take(self, report: Report) -> None:
        match report:
            case Ready():
                self.hands[report.worker] = Hand()
                self.free[report.worker] = None
                self.board.join(report.worker, report.n_bytes)
                self.tell(events.WorkerReady(report.worker, report.device, report.load_s, report.model, report.n_bytes))
            case Said(worker, Began(job_ids)):
                self._begun(worker, self.hands[worker], job_ids)
            case Said(worker, Learned() as at):
                job = self.hands[worker].given[at.job_id]
                self.tell(events.TrainingAt(job, worker, at.step, at.steps, at.loss))
            case Said(worker, JobResult() as result):
                hand = self.hands[worker]
                hand.begun.discard(result.job_id)
                if result.job_id in hand.done_elsewhere:
                    hand.done_elsewhere.remove(result.job_id)
                else:
                    self._settle(hand.given.pop(result.job_id), worker, result)
            case Said(worker, TileDone() as done):
                hand = self.hands[worker]
                hand.now, hand.tile, hand.held, hand.side_by_side = (), (), done.held, done.side_by_side
                self.free[worker] = None
                self.pace.learn_loads(done.misses.get("lora", 0))
                self.tell(events.TileFinished(worker, done))
            case Said(worker, Stalled(reason)):
                self.tell(events.WorkerStalled(worker, reason))
            case Lost():
                self._lost(report)
            case Leaving():
                self._leave(report.worker, report.reason)

    def _begun(self, worker: str, hand: Hand, job_ids: tuple[str, ...]) -> None:
        hand.now, hand.merging_since = job_ids, self.clock()
        for job_id in job_ids:
            if job_id not in hand.given:  # done by another meanwhile
                continue
            twin = self._twin(job_id, worker)
            hand.begun.add(job_id)
            if twin is None or job_id not in self.hands[twin].begun:
                self._started(hand.given[job_id], worker)

    def _started(self, job: Work, worker: str) -> None:
        attempt = self.retries.attempts(job.job_id) + 1
        self.progress.attempts[job.job_id] = attempt
        if isinstance(job, TrainJob):
            self.tell(events.TrainingStarted(job, worker, attempt))
        else:
            self.tell(events.JobStarted(job, worker, attempt))

    def _twin(self, job_id: str, worker: str) -> str | None:
        """The other worker that has the job in hand."""
        if job_id not in self.copied:
            return None
        return next((other for other, hand in self.hands.items() if other != worker and job_id in hand.given), None)

    def _leave(self, worker: str, reason: str) -> None:
        self.tell(events.WorkerGone(worker, reason, True))
        hand = self.hands.get(worker)
        if hand is not None:
            hand.leaving = True
            self._release(worker)
            if worker in self.resting:
                del self.resting[worker]
                self.free[worker] = None

    def _lost(self, report: Lost) -> None:
        worker = report.worker
        self.last_loss = report.error
        self.tell(events.WorkerGone(worker, str(report.error), report.returns))
        self.pace.forget(worker)
        hand = self.hands.pop(worker, None)
        self.free.pop(worker, None)
        self.resting.pop(worker, None)
        self.board.leave(worker)
        if hand is None:
            return
        if not hand.now:  # it never came to say what it was merging, so it may be anything of its tile
            self._begun(worker, hand, tuple(job_id for job_id in hand.tile if job_id not in hand.begun))
        suspects = [job_id for job_id in hand.now if job_id in hand.given]
        jobs = [hand.given.pop(job_id) for job_id in suspects]
        not_begun = [job for job_id, job in hand.given.items() if job_id not in hand.begun]
        self._put_back([job for job in not_begun if self._twin(job.job_id, worker) is None])
        self._release(worker)
        kind, reason = type(report.error).__name__, str(report.error)
        for job_id in hand.begun & hand.given.keys():  # uploading: whoever takes them up looks for their entries first
            self._failed([hand.given[job_id]], worker, "none of its", JobResult(job_id, "failed", kind, reason))
        n_suspects = len(jobs) + sum(job_id in hand.done_elsewhere for job_id in hand.now)
        fault: Fault = "none of its" if report.preempted else "its own" if n_suspects == 1 else "one of several"
        if fault == "its own" and jobs and self._is_committed(jobs[0]):  # it died after the commit
            self._settle(jobs[0], worker, JobResult(jobs[0].job_id, "already"))
            return
        half = (len(jobs) + 1) // 2
        for part in (jobs[:half], jobs[half:]) if fault == "one of several" else ([job] for job in jobs):
            if part:
                self._failed(list(part), worker, fault, JobResult(part[0].job_id, "failed", kind, reason))

    def _release(self, worker: str) -> None:
        self.board.release(worker)
        self.free |= self.resting
        self.resting.clear()

    def _put_back(self, work: Iterable[Work]) -> None:
        jobs = []
        for job in work:
            if isinstance(job, TrainJob):
                self.trainings.put_back(job)
            else:
                jobs.append(job)
        self.board.add(jobs)

    def _is_committed(self, job: Work) -> bool:
        if isinstance(job, TrainJob):
            return False  # whoever takes it up again finds it trained
        try:
            self.records.catalog.entry(job.job_id)
        except (NotFound, StorageError):
            return False
        return True

    # What becomes of a job

    def _settle(self, job: Work, worker: str, result: JobResult) -> None:
        if result.status == "failed":
            self._failed([job], worker, "its own", result)
            return
        self.breaker.note(None)
        if (hand := self.hands.get(worker)) is not None and hand.failures:
            hand.failures = 0
            self.sick.pop(worker, None)
        already = result.status == "already"
        if not already:
            now = self.clock()
            self.pace.learn(job.method, worker, result.stages, now - hand.since if hand is not None else None)
            if hand is not None:
                hand.since = now
            self.board.slowness[worker] = self.pace.slowness(worker)
        if isinstance(job, TrainJob):
            self.retries.forget(job.job_id)
            self._add(self.trainings.done(job.job_id))
            self.tell(events.TrainingDone(job, worker, already, result.stages, result.n_bytes, result.peak_bytes))
            return
        self.progress.committed.append(job)
        self.progress.attempts[job.job_id] = self.retries.attempts(job.job_id) + 1
        self._end(job)
        self.tell(
            events.JobCommitted(
                job, worker, already, result.stages, result.n_bytes, result.peak_bytes, result.alignments
            )
        )
        self.records.clear(job)

    def _add(self, jobs: Sequence[Job]) -> None:
        """Jobs that waited for a training and need not any more."""
        self.board.admit(jobs, self.pool.size)
        self.free |= self.resting
        self.resting.clear()

    def _failed(self, jobs: list[Work], worker: str, fault: Fault, result: JobResult) -> None:
        """`jobs` ended together; those that are tried again stay together unless the verdict says otherwise."""
        kind, reason, now = result.kind or "Defect", result.reason or "", self.clock()
        if kind == "OutOfMemory" and fault == "its own" and len(jobs) == 1 and self._too_large(jobs[0], worker):
            fault = "none of its"  # a larger worker will do it
        again: list[Work] = []
        for job in jobs:
            verdict = self.retries.judge(job, kind, fault, now, self.random.random())
            attempt = self.progress.attempts[job.job_id]
            twin = self._twin(job.job_id, worker) if kind not in self.limits.no_retry else None
            retry = verdict.retry or twin is not None
            failed = events.TrainingFailed if isinstance(job, TrainJob) else events.JobFailed
            self.tell(failed(job, worker, attempt, kind, reason, retry, verdict.counts))  # type: ignore[arg-type]
            if twin is not None:  # which is at it still
                if job.job_id in self.hands[twin].begun:
                    self._started(job, twin)
            elif verdict.retry:
                again.append(job)
            else:
                self._give_up(job, kind, reason, result.traceback or "")
        if again:
            self.retries.add(again, worker, verdict, now)
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

    def _suspect(self, worker: str, kind: str, now: float) -> None:
        """A worker on which one job after another fails rests for a while, longer each time: it fails faster than
        others work, and would use up an attempt of every job there is."""
        hand = self.hands.get(worker)
        if hand is not None and kind not in self.limits.no_retry and kind != "Unavailable":
            hand.failures += 1
            if hand.failures >= SICK_AFTER and self.pool.size > 1:
                self.sick[worker] = now + backoff_s(hand.failures - SICK_AFTER + 1, 1.0, *SICK_S)
                self.board.release(worker)

    def _break(self, lora: str, kind: str, reason: str) -> None:
        """A LoRA that no partner can use: all that need it are given up with the one reason."""
        self.broken.add(lora)
        for job in [*self.board.remove(lora), *self.retries.remove(lora)]:
            if lora in job.loras:
                self._give_up(job, kind, reason, "")
            else:  # it waited together with one of those
                self._put_back([job])

    def _give_up(self, job: Work, kind: str, reason: str, traceback: str) -> None:
        if isinstance(job, TrainJob):
            for waiting in self.trainings.given_up(job.job_id):
                self._give_up(waiting, kind, f"its {job.role} {job.id} could not be trained: {reason}", traceback)
            self.retries.forget(job.job_id)
            return
        attempts = self.retries.attempts(job.job_id)
        self.progress.given_up.append((job, reason))
        self._end(job)
        self.records.write(job, reason, kind, traceback, attempts)
        self.tell(events.JobGivenUp(job, kind, reason, attempts))

    def _end(self, job: Job) -> None:
        self.progress.left -= 1
        self.left[job.method] -= 1
        if not self.left[job.method]:
            del self.left[job.method]
        self.retries.forget(job.job_id)
        if job.job_id in self.copied:
            for hand in self.hands.values():
                if hand.given.pop(job.job_id, None) is not None:
                    hand.begun.discard(job.job_id)
                    hand.done_elsewhere.add(job.job_id)
