"""Jobs that failed: what each has been through, and those that wait to be tried again. Pure: `now` is an argument."""

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from service.faults import ELSEWHERE_S, Fault, History, Limits, Verdict, after_failure
from service.jobs import Work

LOOKS = 8  # retries that wait for another worker, passed over in search of one that need not


@dataclass(frozen=True, slots=True, order=True)
class Retry:
    """Jobs that failed on `worker`, to be a tile of their own from `due` on; until `elsewhere_until` only on
    another worker."""

    due: float
    number: int
    jobs: tuple[Work, ...] = field(compare=False)
    worker: str = field(compare=False)
    elsewhere_until: float = field(compare=False)


class Retries:
    """Grows with the jobs that fail, not with those that there are."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._history: dict[str, History] = {}
        self._store_away: dict[str, float] = {}  # job → since when the store fails it
        self._waiting: list[Retry] = []  # a heap
        self._numbers = itertools.count()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def attempts(self, job_id: str) -> int:
        """Those that ended and counted."""
        return self._history[job_id].attempts if job_id in self._history else 0

    def knows(self, job_id: str) -> bool:
        """Whether it ever failed."""
        return job_id in self._history

    def judge(self, job: Work, kind: str, fault: Fault, now: float, jitter: float) -> Verdict:
        """What becomes of a job that failed; remembered."""
        before = self._history.get(job.job_id, History())
        if kind == "Unavailable":
            since = self._store_away.setdefault(job.job_id, now)
            before = History(before.attempts, before.returns, now - since)
        else:
            self._store_away.pop(job.job_id, None)
        verdict = after_failure(kind, fault, before, self.limits, jitter)
        self._history[job.job_id] = History(before.attempts + verdict.counts, before.returns + (not verdict.counts))
        return verdict

    def add(self, jobs: Sequence[Work], worker: str, verdict: Verdict, now: float) -> None:
        due = now + verdict.wait_s
        until = due + ELSEWHERE_S if verdict.elsewhere else 0.0
        heapq.heappush(self._waiting, Retry(due, next(self._numbers), tuple(jobs), worker, until))

    def take(
        self, worker: str, now: float, only_worker: bool, fits: Callable[[Work], bool] = lambda job: True
    ) -> tuple[Work, ...]:
        """Jobs whose time has come, and that need not wait for another worker than this; none, if there are none."""
        passed: list[Retry] = []
        found: Retry | None = None
        while self._waiting and self._waiting[0].due <= now and found is None and len(passed) < LOOKS:
            retry = heapq.heappop(self._waiting)
            waits = retry.worker == worker and now < retry.elsewhere_until and not only_worker
            if waits or not all(fits(job) for job in retry.jobs):
                passed.append(retry)
            else:
                found = retry
        for retry in passed:
            heapq.heappush(self._waiting, retry)
        return found.jobs if found is not None else ()

    def remove(self, lora: str) -> list[Work]:
        """Take out, and return, all jobs that wait together with one that needs this LoRA."""
        removed: list[Work] = []
        for retry in list(self._waiting):
            if any(lora in job.loras for job in retry.jobs):
                self._waiting.remove(retry)
                removed += retry.jobs
        heapq.heapify(self._waiting)
        return removed

    def forget(self, job_id: str) -> None:
        """The job is settled."""
        self._history.pop(job_id, None)
        self._store_away.pop(job_id, None)
