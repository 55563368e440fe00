"""Workers in virtual time: a pool whose clock jumps from event to event, for the real control loop.

What is simulated is what the loop cannot decide: how long stages take, a store's latency, nodes that vanish, machines
that are slow, jobs that break things. A simulated worker keeps LoRAs in a cache of limited size, fetches ahead, uploads
behind, and speaks the messages of a real one.
"""

import heapq
import itertools
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from service.errors import DeadlineExceeded, WorkerLost
from service.jobs import BaseRef, Concept, Job, Role, SampleSettings
from service.messages import Began, JobResult, Message, Stalled, Tile, TileDone
from service.pool import Leaving, Lost, Ready, Report, Said

Commit = Callable[[Job, float], str]  # (job, now) → "committed", "already", or "" while the store is away


@dataclass(frozen=True, slots=True)
class World:
    """Seconds, and what goes wrong. The defaults are SDXL at 1024² on an H100: 100 steps of 10.9 s, teachers a third
    of that per LoRA, one picture; LoRAs of 186 MB over 250 MB/s, merged ones of 372 MB."""

    load_s: float = 60.0
    fetch_s: float = 0.8  # of a LoRA: latency and transfer; behind the merge where it could be seen coming
    calibrate_s: float = 5.0
    merge_s: float = 10.9
    sample_s: float = 4.0
    upload_s: float = 1.6  # behind the next merge
    noise: float = 0.1  # σ of a log-normal factor on every job
    cached_loras: int = 64
    slow_share: float = 0.0  # of workers
    slow_factor: float = 10.0
    preemptions_per_hour: float = 0.0  # of each worker
    drained_share: float = 0.5  # of preemptions that come with a notice
    notice_s: float = 30.0
    return_s: tuple[float, float] = (60.0, 300.0)  # until a machine is there again
    outages: tuple[tuple[float, float], ...] = ()  # [from, to): the store does not answer
    poison: frozenset[str] = frozenset()  # pairs whose merge ends its process
    hangs: frozenset[str] = frozenset()  # pairs whose first merge never ends
    crashes_per_hour: float = 0.0  # of each worker, of its process alone
    side_by_side: int = 1  # pairs in one forward pass
    patience_s: float = 600.0  # a worker's with a store that is away
    fails: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # pair, or "*", → kind and reason
    broken: frozenset[str] = frozenset()  # LoRAs
    sick: frozenset[str] = frozenset()  # workers on which every job fails at once
    rooms: Mapping[str, int] = field(default_factory=dict)  # worker → bytes of its GPU's memory
    needs: Mapping[str, int] = field(default_factory=dict)  # method → bytes that a job truly needs


@dataclass(slots=True)
class _Simulated:
    """One worker. `turn` tells its events from those of the process that had its name before."""

    slowness: float
    turn: int = 0
    present: bool = False
    leaving: bool = False
    cache: OrderedDict[str, None] = field(default_factory=OrderedDict)
    script: Iterator[tuple[float, list[Message]]] | None = None
    uploads: list[tuple[float, JobResult, Job]] = field(default_factory=list)
    heard: float = 0.0
    deadline_s: float = 0.0
    busy_since: float = 0.0
    merging: tuple[Job, ...] = ()


class SimulatedPool:
    """`size` workers of a `World`; `clock` is to be the loop's. `commit` decides what becomes of a finished job."""

    def __init__(self, size: int, world: World, seed: int = 0, commit: Commit | None = None) -> None:
        self.world, self.random = world, random.Random(seed)
        self.now = 0.0
        self.workers = {
            f"worker-{i}": _Simulated(world.slow_factor if self.random.random() < world.slow_share else 1.0)
            for i in range(size)
        }
        self.done: set[str] = set()
        self.commit = commit or self._remember
        self.hung: set[str] = set()
        self.deaths: Counter[str] = Counter()  # job → how often a worker ended while it was being merged
        self.busy_s = self.loads = self.losses = 0.0
        self._events: list[tuple[float, int, str, int, str]] = []  # a heap: time, number, worker, turn, what
        self._numbers = itertools.count()
        for worker in self.workers:
            self._start_loading(worker, self.random.uniform(0, 5))

    def clock(self) -> float:
        return self.now

    @property
    def size(self) -> int:
        return len(self.workers)

    def start(self, worker: str, tile: Tile, deadline_s: float) -> None:
        one = self.workers[worker]
        one.script, one.heard, one.deadline_s = self._work(worker, one, tile), self.now, deadline_s
        self._at(self.now, worker, "speaks")

    def wait(self, timeout_s: float) -> Sequence[Report]:
        limit = self.now + timeout_s
        assert self.now < END_S, "the run does not end: a job is lost"
        while self._events and self._events[0][0] <= limit:
            time, _, worker, turn, what = heapq.heappop(self._events)
            self.now = max(self.now, time)
            one = self.workers.get(worker)
            if one is not None and one.turn == turn and (reports := list(self._happens(worker, one, what))):
                return reports
        self.now = limit
        return []

    def shrink(self, size: int, spare: Iterable[str]) -> Sequence[str]:
        absent = [worker for worker, one in self.workers.items() if not one.present]
        surplus = list(dict.fromkeys([*absent, *spare]))[: max(0, len(self.workers) - size)]
        for worker in surplus:
            del self.workers[worker]
        return surplus

    def grow(self, size: int) -> None:
        pass

    def replace(self, worker: str) -> None:
        self._end(self.workers[worker])
        self._start_loading(worker, self.random.uniform(*self.world.return_s))

    def close(self) -> None:
        self.workers.clear()

    # What happens

    def _at(self, time: float, worker: str, what: str) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), worker, self.workers[worker].turn, what))

    def _start_loading(self, worker: str, after_s: float) -> None:
        one = self.workers[worker]
        one.turn += 1
        self._at(self.now + after_s + self.world.load_s * one.slowness, worker, "is ready")

    def _happens(self, worker: str, one: _Simulated, what: str) -> Iterator[Report]:
        match what:
            case "is ready":
                one.present = True
                for rate, fate in (
                    (self.world.preemptions_per_hour, "is preempted"),
                    (self.world.crashes_per_hour, "crashes"),
                ):
                    if rate:
                        self._at(self.now + self.random.expovariate(rate / 3600), worker, fate)
                yield Ready(worker, "simulated", self.world.load_s, n_bytes=self.world.rooms.get(worker))
            case "speaks":
                yield from self._speaks(worker, one)
            case "is preempted" if not one.leaving and self.random.random() < self.world.drained_share:
                one.leaving = True
                self._at(self.now + self.world.notice_s, worker, "is preempted")
                yield Leaving(worker, f"{worker}: its node is being drained")
            case "is preempted":
                yield self._lose(worker, one, WorkerLost(f"{worker} was preempted"), preempted=True)
            case "crashes":
                yield self._lose(worker, one, WorkerLost(f"{worker} crashed"))
            case "is overdue":
                if one.script is not None and self.now - one.heard >= one.deadline_s - 1e-6:
                    yield self._lose(worker, one, DeadlineExceeded(f"{worker} took too long over a job"))
            case _:
                raise AssertionError(what)

    def _lose(
        self, worker: str, one: _Simulated, error: WorkerLost | DeadlineExceeded, preempted: bool = False
    ) -> Lost:
        self.losses += 1
        self.deaths.update(job.job_id for job in one.merging)
        for finished, _, job in one.uploads:  # what had reached the store by now stays there
            if finished <= self.now:
                self.commit(job, self.now)
        self._end(one)
        self._start_loading(worker, self.random.uniform(*self.world.return_s))
        return Lost(worker, error, returns=True, preempted=preempted)

    def _end(self, one: _Simulated) -> None:
        if one.script is not None:
            self.busy_s += self.now - one.busy_since
        one.present, one.leaving, one.script = False, False, None
        one.merging = ()
        one.cache.clear()
        one.uploads.clear()

    def _speaks(self, worker: str, one: _Simulated) -> Iterator[Report]:
        """The worker's next words, and when it will speak again."""
        assert one.script is not None
        wait_s, messages = next(one.script)
        one.heard = self.now
        if wait_s == POISON:
            self._at(self.now + 1.0, worker, "crashes")
        elif wait_s == HANG:
            self._at(self.now + one.deadline_s, worker, "is overdue")
        elif messages and isinstance(messages[-1], TileDone):
            one.script = None
        else:
            self._at(self.now + wait_s, worker, "speaks")
        for message in messages:
            yield Said(worker, message)

    def _work(self, worker: str, one: _Simulated, tile: Tile) -> Iterator[tuple[float, list[Message]]]:
        """(seconds until the next words, words): as service/worker.py does it."""
        started, busy_s = self.now, 0.0
        loads_before, k = self.loads, self.world.side_by_side
        for first in range(0, len(tile.jobs), k):
            jobs = tile.jobs[first : first + k]
            began = [*self._uploaded(one, self.now), Began(tuple(job.job_id for job in jobs))]
            one.merging = jobs
            pairs = {job.pair for job in jobs}
            if pairs & self.world.poison:
                yield POISON, began
            if hanging := pairs & self.world.hangs - self.hung:
                self.hung |= hanging
                yield HANG, began
            ended = {job.job_id: result for job in jobs if (result := self._ends_at_once(worker, job))}
            new = [job for job in jobs if job.job_id not in ended]
            began += ended.values()
            stages = {job.job_id: self._stages(one, job, first=job is tile.jobs[0]) for job in new}
            fetch_s = sum(times["fetch"] for times in stages.values())
            compute_s = sum(sum(times.values()) for times in stages.values()) - fetch_s
            one.busy_since = self.now + fetch_s
            yield max(0.05, fetch_s + compute_s), began
            busy_s += compute_s
            self.busy_s += compute_s
            one.busy_since = self.now
            for job in new:
                while len(one.uploads) > 2:
                    yield 1.0, [*self._uploaded(one, self.now), Stalled("uploading")]
                result = JobResult(job.job_id, "committed", stages=stages[job.job_id], n_bytes=372_000_000)
                one.uploads.append((self.now + self.world.upload_s * one.slowness, result, job))
            one.merging = ()
        while not tile.jobs and one.uploads:
            yield max(0.1, min(5.0, one.uploads[0][0] - self.now)), list(self._uploaded(one, self.now))
        one.busy_since = self.now
        misses = {"lora": int(self.loads - loads_before)}
        done = TileDone(frozenset(one.cache), self.now - started, busy_s, {}, misses, side_by_side=k)
        yield 0.0, [*self._uploaded(one, self.now), done]

    def _ends_at_once(self, worker: str, job: Job) -> JobResult | None:
        if job.job_id in self.done:
            return JobResult(job.job_id, "already")
        for lora in (job.subject.lora_sha256, job.style.lora_sha256):
            if lora in self.world.broken:
                return JobResult(job.job_id, "failed", "BadInput", f"{lora} is no LoRA", broken_lora=lora)
        fails = self.world.fails.get(job.pair) or self.world.fails.get("*")
        if self.world.needs.get(job.method, 0) > self.world.rooms.get(worker, 2**60):
            fails = "OutOfMemory", "the GPU's memory does not suffice"
        if worker in self.world.sick:
            fails = "AccessDenied", "the clocks of this machine and the server differ"
        return JobResult(job.job_id, "failed", *fails) if fails else None

    def _uploaded(self, one: _Simulated, now: float) -> list[Message]:
        """Results of what is in the store by now; while that is away, what is there waits."""
        results: list[Message] = []
        while one.uploads and one.uploads[0][0] <= now:
            finished, result, job = one.uploads[0]
            status = self.commit(job, now)
            if not status and now - finished < self.world.patience_s:
                break
            one.uploads.pop(0)
            if not status:
                results.append(JobResult(job.job_id, "failed", "Unavailable", "the store does not answer"))
                continue
            results.append(result if status == "committed" else JobResult(job.job_id, status))
        return results

    def _remember(self, job: Job, now: float) -> str:
        if any(first <= now < last for first, last in self.world.outages):
            return ""
        if job.job_id in self.done:
            return "already"
        self.done.add(job.job_id)
        return "committed"

    def _stages(self, one: _Simulated, job: Job, first: bool) -> Mapping[str, float]:
        world, fetched = self.world, 0
        for lora in (job.subject.lora_sha256, job.style.lora_sha256):
            if lora in one.cache:
                one.cache.move_to_end(lora)
            else:
                fetched += 1
                one.cache[lora] = None
                if len(one.cache) > world.cached_loras:
                    one.cache.popitem(last=False)
        self.loads += fetched
        factor = one.slowness * self.random.lognormvariate(0.0, world.noise)
        return {
            # what the coordinator said would come was fetched while the last merge ran
            "fetch": fetched * world.fetch_s if first and not one.cache else 0.01 * fetched,
            "calibrate": fetched * world.calibrate_s * factor,
            "merge": world.merge_s * factor,
            "sample": world.sample_s * factor,
        }


POISON, HANG = -1.0, -2.0
END_S = 1e6  # no run takes as long
BASE = BaseRef("/base", None, "b" * 64, "sdxl")
SAMPLES = SampleSettings((), (), 50, 5.0, 1024, 1024)


def grid(subjects: int, styles: int) -> list[Job]:
    """Jobs as the planner makes them; concepts, settings and knobs are shared objects there too."""
    rows, columns = [concept("subject", i) for i in range(subjects)], [concept("style", i) for i in range(styles)]
    knobs = {"steps": 100}
    return [Job(BASE, subject, style, "ziplora", knobs, 0, SAMPLES) for subject, style in product(rows, columns)]


def concept(role: Role, number: int) -> Concept:
    name = f"{role}{number}"
    return Concept(name, role, f"s3://bucket/{name}.safetensors", name, "a photo", "sks")
