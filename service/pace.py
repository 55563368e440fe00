"""How long things take: a guess before the run, replaced by what finished jobs say. Drives how large tiles are, when a
worker is taken for hung, and the estimate of the end. No clock: seconds come with the results."""

from collections.abc import Collection, Mapping

from service.jobs import TRAINING

PRIOR_WEIGHT = 1.0  # in jobs: operation counts are right within a factor, one finished job is better
MEMORY = 20.0  # jobs; older ones fade, since the first of a run calibrate more than the later ones
WORKER_MEMORY = 5.0  # jobs by which a worker's own speed is judged
SHARE_MEMORY = 50.0  # jobs by which the share of a worker's time that goes into stages is judged
SHARE_LEAST = 5.0  # jobs before that share is believed
OF_A_LORA = frozenset({"fetch", "calibrate"})  # stages that a worker goes through once per LoRA, not per pair
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
    training_s: the same of a training.
    """

    def __init__(self, prior_s: float | None = None, training_s: float | None = None) -> None:
        self.prior_s, self.training_s = prior_s, training_s
        self._jobs: dict[str, _Mean] = {}
        self._own: dict[str, _Mean] = {}  # the same without what is done once per LoRA
        self._stages: dict[str, _Mean] = {}
        self._workers: dict[str, _Mean] = {}
        self._in_stages, self._passed = _Mean(SHARE_MEMORY), _Mean(SHARE_MEMORY)
        self._lora_s = self._loras = 0.0  # seconds spent on so many LoRAs

    def learn(self, method: str, worker: str, stages: Mapping[str, float], passed_s: float | None = None) -> None:
        """A job of `method` was committed; `stages` in seconds. passed_s: since the worker's last one, or since it
        began to work: what goes beyond the stages is lost between them."""
        seconds = sum(seconds for stage, seconds in stages.items() if stage not in OVERLAPPED)
        once = sum(stages.get(stage, 0.0) for stage in OF_A_LORA)
        if method not in self._jobs:
            prior_s = self.training_s if method == TRAINING else self.prior_s
            self._jobs[method] = _Mean(MEMORY, prior_s or 0.0, PRIOR_WEIGHT if prior_s else 0.0)
            self._own[method] = _Mean(MEMORY)
        own = seconds - once  # whom the new LoRAs fall to is chance
        usual = self._own[method].value if self._own[method].weight else own
        self._workers.setdefault(worker, _Mean(WORKER_MEMORY)).add(own / usual if usual > 0 else 1.0)
        # a straggler's seconds say how slow it is, not how long the method takes
        slowness = max(1.0, self.slowness(worker))
        self._jobs[method].add(seconds / slowness)
        self._own[method].add(own / slowness)
        self._lora_s += once / slowness
        for stage, value in stages.items():
            self._stages.setdefault(stage, _Mean(MEMORY)).add(value)
        if passed_s is not None:
            self._in_stages.add(seconds)
            self._passed.add(passed_s)

    def learn_loads(self, loras: int) -> None:
        """So many LoRAs were new to a worker in its tile."""
        self._loras += loras

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
            known = [mean.value for method, mean in self._jobs.items() if method != TRAINING]
            seconds = sum(known) / len(known) if known else self.prior_s
        else:
            prior_s = self.training_s if method == TRAINING else self.prior_s
            seconds = self._jobs[method].value if method in self._jobs else prior_s
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

    def work_s(self, left: Mapping[str, int], loads: float | None = None) -> float | None:
        """Seconds that what is left takes one usual worker: `left` jobs by method. None: nobody knows.

        loads: LoRAs that are yet to be loaded, where that is known: the first pairs of a block pay for the later ones.
        """
        seconds = 0.0
        for method, number in left.items():
            job_s = self.job_s(method) if loads is None else self._own_s(method)
            if job_s is None:
                return None
            seconds += number * job_s
        return seconds + (loads * self._lora_s / self._loras if loads and self._loras else 0.0)

    def seconds_left(
        self, left: Mapping[str, int], workers: Collection[str], loads: float | None = None
    ) -> float | None:
        """Until the last job is done, over workers of the speeds they showed. None: nobody knows, as before the first
        is done: counted operations may be off by the ratio of a GPU to a CPU.

        The pace is that of workers at work: loading a base and being away are not in it, so that who joins or leaves
        changes the estimate at once.
        """
        work, n_jobs = self.work_s(left, loads), sum(left.values())
        if not workers or not n_jobs or work is None or not self._jobs:
            return None
        speed = sum(1 / self.slowness(worker) for worker in workers) * min(1.0, n_jobs / len(workers))
        ragged = (1 - 1 / len(workers)) / 2 * work / n_jobs  # the last jobs end one by one: half of one on average
        return work / speed / self._share() + ragged

    def _own_s(self, method: str) -> float | None:
        """Seconds of a job without what is done once per LoRA; while no load was counted, with it."""
        return self._own[method].value if self._loras and method in self._own else self.job_s(method)

    def _share(self) -> float:
        """Of a worker's time, what went into stages of late; the rest is lost between them."""
        if self._passed.weight < SHARE_LEAST or self._in_stages.value <= 0:
            return 1.0
        return min(1.0, max(0.1, self._in_stages.value / max(self._passed.value, 1e-9)))
