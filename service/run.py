"""The control loop: tiles out to workers, results in, until each job is committed or given up.

hands.py keeps what each worker has in hand and backlog.py what nobody has; outcomes.py says what becomes of a job that
ended. Everything else is policy (tiles.py, faults.py, pace.py) or a pool.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from service import events
from service.backlog import Backlog
from service.catalog import Catalog
from service.errors import ServiceError, WorkerLost
from service.events import Event, Observer
from service.faults import Fault, Limits
from service.hands import Hand, Hands, late_jobs
from service.jobs import TRAINING, Job, TrainJob, Work
from service.messages import Began, JobResult, Learned, Stalled, Tile, TileDone
from service.method_facts import trains
from service.outcomes import Outcomes, Progress
from service.pace import Pace
from service.pool import Leaving, Lost, Pool, Ready, Report, Said
from service.records import FailureRecords
from service.tiles import copies, tile_size, workers_wanted

POLL_S = 0.5
OUTLOOK_S = 5.0  # between two estimates of the end
GATHERING_S = 900.0  # in which workers may still come that have more memory than those that are there
COPY_LOOK_S = 2.0  # between two looks for jobs that an idle worker shall do as well


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
        self.pool, self.limits, self.observers, self.pace, self.clock = pool, limits, observers, pace, clock
        self.hands = Hands()
        self.backlog = Backlog(jobs, trainings, pool.size, need, limits)
        self.board = self.backlog.board
        self.outcomes = Outcomes(jobs, self.backlog, self.hands, pool, pace, records, limits, self.tell, clock)
        self.progress = self.outcomes.progress
        self.last_loss: ServiceError | None = None
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
            while self.hands.free:
                self._feed(next(iter(self.hands.free)))
            for report in self.pool.wait(POLL_S):
                self._take(report)
            if self.pool.size > self._useful():
                self._shrink()

    # Out

    def _wake(self) -> None:
        """Workers that had nothing to do look again, now and then, for jobs whose time has come."""
        now = self.clock()
        hands = self.hands
        self.board.complete = len(hands.of) >= self.pool.size or now - self.started > GATHERING_S
        if hands.resting and (self.backlog.retries or hands.sick or self.board.left) and now >= self.next_look:
            self.next_look = now + POLL_S
            hands.wake()
        if now >= self.next_outlook:
            self.next_outlook = now + OUTLOOK_S
            left = self.outcomes.left + Counter({TRAINING: self.backlog.trainings.left})
            seconds = self.pace.seconds_left(left, hands.of, self.board.loads)
            self.pool.grow(workers_wanted(self.pace.work_s(left, self.board.loads), left.total()))
            self.tell(events.Outlook(self.progress.left, len(hands.of), seconds, self.pace.stages()))
        if hands.resting and not self.board.left and now >= self.next_copies:
            self.next_copies = now + COPY_LOOK_S
            self._copy(now)

    def _feed(self, worker: str) -> None:
        del self.hands.free[worker]
        hand = self.hands.of[worker]
        tile = None if hand.leaving else self._next(worker, hand)
        if tile is None and hand.given:
            tile = Tile(())  # the rest of its uploads
        if tile is None and hand.leaving:
            self.hands.leave(worker)
            self.pool.replace(worker)
            return
        if tile is None:
            self.hands.resting[worker] = None
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
            for worker, hand in self.hands.of.items()
            for seconds, job in late_jobs(hand, now, partial(self._learned_s, worker))
            # a second training would go on from the first one's checkpoints, and be no earlier
            if isinstance(job, Job)
            and not trains(job.method)
            and job.job_id not in self.hands.copied
            and not self.backlog.retries.knows(job.job_id)
        ]
        well = [worker for worker in self.hands.resting if worker not in self.hands.sick]
        idle = [(self.pace.learned_s(None, worker) or 0.0, worker) for worker in well]
        for worker, job in copies(late, idle):
            if self.board.fits(job, worker):
                del self.hands.resting[worker]
                self.hands.copied.add(job.job_id)
                self._give(worker, self.hands.of[worker], Tile((job,)))

    def _learned_s(self, worker: str, job: Work) -> float | None:
        return self.pace.learned_s(job.method, worker)

    def _useful(self) -> int:
        """Workers that could have something to do: as many as jobs, twice if each may be copied, and trainings."""
        copied = bool(self.limits.copies and self.pace.stages())
        return self.progress.left * (1 + copied) + self.backlog.trainings.left

    def _deadline_s(self, worker: str, hand: Hand, tile: Tile) -> float:
        if not tile.jobs:
            return self.limits.deadline_s
        return max(
            self.pace.deadline_s(method, worker, hand.side_by_side, self.limits.deadline_s)
            for method in {job.method for job in tile.jobs}
        )

    def _next(self, worker: str, hand: Hand) -> Tile | None:
        now = self.clock()
        if self.hands.sick.get(worker, 0.0) > now:
            return None
        first = self.backlog.before_the_grid(worker, now, self.pool.size)
        if first is not None:
            return first
        method = None if len(self.outcomes.left) > 1 else next(iter(self.outcomes.left))
        job_s = self.pace.learned_s(method, worker)
        n = tile_size(job_s, self.progress.left, len(self.hands.of), hand.side_by_side)
        return self.board.take(worker, n, hand.held)

    def _shrink(self) -> None:
        spare = [one for one in (*self.hands.resting, *self.hands.free) if not self.hands.of[one].given]
        for worker in self.pool.shrink(self._useful(), spare):
            self.hands.leave(worker)
            self.board.release(worker)
            self.board.leave(worker)

    # In

    def _take(self, report: Report) -> None:
        match report:
            case Ready():
                self.hands.join(report.worker)
                self.board.join(report.worker, report.n_bytes)
                self.tell(events.WorkerReady(report.worker, report.device, report.load_s, report.model, report.n_bytes))
            case Said(worker, Began(job_ids)):
                self._begun(worker, self.hands.of[worker], job_ids)
            case Said(worker, Learned() as at):
                job = self.hands.of[worker].given[at.job_id]
                self.tell(events.TrainingAt(job, worker, at.step, at.steps, at.loss))
            case Said(worker, JobResult() as result):
                hand = self.hands.of[worker]
                hand.begun.discard(result.job_id)
                if result.job_id in hand.done_elsewhere:
                    hand.done_elsewhere.remove(result.job_id)
                else:
                    self.outcomes.settle(hand.given.pop(result.job_id), worker, result)
            case Said(worker, TileDone() as done):
                hand = self.hands.of[worker]
                hand.now, hand.tile, hand.held, hand.side_by_side = (), (), done.held, done.side_by_side
                self.hands.free[worker] = None
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
            twin = self.hands.twin(job_id, worker)
            hand.begun.add(job_id)
            if twin is None or job_id not in self.hands.of[twin].begun:
                self.outcomes.started(hand.given[job_id], worker)

    def _leave(self, worker: str, reason: str) -> None:
        self.tell(events.WorkerGone(worker, reason, True))
        hand = self.hands.of.get(worker)
        if hand is not None:
            hand.leaving = True
            self._release(worker)

    def _lost(self, report: Lost) -> None:
        worker = report.worker
        self.last_loss = report.error
        self.tell(events.WorkerGone(worker, str(report.error), report.returns))
        self.pace.forget(worker)
        hand = self.hands.leave(worker)
        self.board.leave(worker)
        if hand is None:
            return
        if not hand.now:  # it never came to say what it was merging, so it may be anything of its tile
            self._begun(worker, hand, tuple(job_id for job_id in hand.tile if job_id not in hand.begun))
        suspects = [job_id for job_id in hand.now if job_id in hand.given]
        jobs = [hand.given.pop(job_id) for job_id in suspects]
        not_begun = [job for job_id, job in hand.given.items() if job_id not in hand.begun]
        self.backlog.put_back([job for job in not_begun if self.hands.twin(job.job_id, worker) is None])
        self._release(worker)
        kind, reason = type(report.error).__name__, str(report.error)
        for job_id in hand.begun & hand.given.keys():  # uploading: whoever takes them up looks for their entries first
            self.outcomes.failed([hand.given[job_id]], worker, "none of its", JobResult(job_id, "failed", kind, reason))
        n_suspects = len(jobs) + sum(job_id in hand.done_elsewhere for job_id in hand.now)
        fault: Fault = "none of its" if report.preempted else "its own" if n_suspects == 1 else "one of several"
        if fault == "its own" and jobs and self.outcomes.is_committed(jobs[0]):  # it died after the commit
            self.outcomes.settle(jobs[0], worker, JobResult(jobs[0].job_id, "already"))
            return
        half = (len(jobs) + 1) // 2
        for part in (jobs[:half], jobs[half:]) if fault == "one of several" else ([job] for job in jobs):
            if part:
                self.outcomes.failed(list(part), worker, fault, JobResult(part[0].job_id, "failed", kind, reason))

    def _release(self, worker: str) -> None:
        """What it would have been given next is anybody's again."""
        self.board.release(worker)
        self.hands.wake()
