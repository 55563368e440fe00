"""How long things take: a guess before the run, replaced by what finished jobs say. Drives how large tiles are, when a
worker is taken for hung, and the estimate of the end. No clock: seconds come with the results."""

from collections.abc import Collection, Mapping

PRIOR_WEIGHT = 1.0  # in jobs: operation counts are right within a factor, one finished job is better
MEMORY = 20.0  # jobs; older ones fade, since the first of a run calibrate more than the later ones
WORKER_MEMORY = 5.0  # jobs by which a worker's own speed is judged
OVERLAPPED = frozenset({"commit"})  # stages that run behind the next job's
HUNG = 20.0  # times what it should take: a straggler is slow, not hung
HUNG_S = 120.0  # and never less


class _Mean:
    """A mean that forgets: exact over the first `memory` values, then exponential."""

    __slots__ = ("memory", "value", "weight")

    def __init__(self, memory: float, value: float = 0.0, weight: float = 0.0) -> None:
        self.memory, self.value, self.weight = memory, value, weight

    def add(self, value: float) -> None:
        self.weight = min(self.weight + 1, self.memory)
        self.value += (value - self.value) / self.weight


class Pace:
    """Seconds per job by method, and how slow each worker is against the others.

    prior_s: what a job is thought to take, from service/cost.py; None: nobody knows until the first is done.
    """

    def __init__(self, prior_s: float | None = None) -> None:
        self.prior_s = prior_s
        self._jobs: dict[str, _Mean] = {}
        self._stages: dict[str, _Mean] = {}
        self._workers: dict[str, _Mean] = {}

    def learn(self, method: str, worker: str, stages: Mapping[str, float]) -> None:
        """A job of `method` was committed; `stages` in seconds."""
        seconds = sum(seconds for stage, seconds in stages.items() if stage not in OVERLAPPED)
        if method not in self._jobs:
            self._jobs[method] = _Mean(MEMORY, self.prior_s or 0.0, PRIOR_WEIGHT if self.prior_s else 0.0)
        usual = self._jobs[method].value if self._jobs[method].weight > PRIOR_WEIGHT else seconds
        self._workers.setdefault(worker, _Mean(WORKER_MEMORY)).add(seconds / usual if usual > 0 else 1.0)
        # a straggler's seconds say how slow it is, not how long the method takes
        self._jobs[method].add(seconds / max(1.0, self.slowness(worker)))
        for stage, value in stages.items():
            self._stages.setdefault(stage, _Mean(MEMORY)).add(value)

    def forget(self, worker: str) -> None:
        """Its place may be taken by another machine."""
        self._workers.pop(worker, None)

    def slowness(self, worker: str) -> float:
        """1.0 is usual, 10.0 takes ten times as long."""
        mean = self._workers.get(worker)
        return mean.value if mean is not None and mean.value > 0 else 1.0

    def job_s(self, method: str | None = None, worker: str | None = None) -> float | None:
        """Seconds of one job, of all methods together if none is given; None if nobody knows."""
        if method is None:
            known = [mean.value for mean in self._jobs.values()]
            seconds = sum(known) / len(known) if known else self.prior_s
        else:
            seconds = self._jobs[method].value if method in self._jobs else self.prior_s
        return None if seconds is None else seconds * (self.slowness(worker) if worker else 1.0)

    def stages(self) -> dict[str, float]:
        """Mean seconds of each stage."""
        return {stage: mean.value for stage, mean in self._stages.items()}

    def learned_s(self, method: str | None, worker: str) -> float | None:
        """`job_s` from finished jobs alone: a guess that is far too low would put a whole block into one tile."""
        return self.job_s(method, worker) if (self._jobs if method is None else method in self._jobs) else None

    def deadline_s(self, method: str, worker: str, side_by_side: int, limit_s: float) -> float:
        """Seconds without a word after which a worker is taken for hung: `limit_s` for each job merged side by side,
        less once it is known how long they take."""
        limit = limit_s * side_by_side
        seconds = self.job_s(method, worker)
        if seconds is None or method not in self._jobs:
            return limit
        return min(limit, max(HUNG_S, HUNG * seconds * side_by_side))

    def seconds_left(self, left: Mapping[str, int], workers: Collection[str]) -> float | None:
        """Until the last job is done: `left` by method, over workers of the speeds they showed. None: nobody knows."""
        times = [(number, self.job_s(method)) for method, number in left.items()]
        if not workers or any(seconds is None for _, seconds in times):
            return None
        work = sum(number * seconds for number, seconds in times if seconds is not None)
        return work / sum(1 / self.slowness(worker) for worker in workers)
