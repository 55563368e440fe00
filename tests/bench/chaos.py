"""`make bench-chaos`: runs of a small grid with random faults, each decided by its seed. The control loop, the catalog
and its store are the real ones; workers are simulated, so that faults fall into every gap in milliseconds.

    python -m tests.bench.chaos            seeds 0 … 99; results/chaos.json
    python -m tests.bench.chaos 17 18      these seeds, with what happened

In every run: workers that crash, are preempted with and without notice, and hang; stragglers; pairs that end their
process; a store that is away for minutes. In some: the driver is killed and the run started again; two drivers work on
the same catalog at once. Afterwards every job must be committed exactly once, or given up for a reason that is its own.
"""

import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from service import events
from service.catalog import Catalog
from service.errors import AlreadyCommitted, ServiceError
from service.faults import Limits
from service.jobs import Job, identity
from service.pool import Report
from service.run import run
from tests.bench.record import save
from tests.bench.simulated import SimulatedPool, World, grid

RESULT = Path(__file__).parent / "results" / "chaos.json"
RUNS = 100
LIMITS = Limits(attempts=4, deadline_s=900.0, outage_s=7200.0, returns=50)


class DriverKilled(BaseException):
    pass


class ChaosPool(SimulatedPool):
    """Commits to a real catalog. `dies_after` reports, the driver is gone in the middle of what it was doing."""

    def __init__(self, size: int, world: World, seed: int, catalog: Catalog, dies_after: int | None = None) -> None:
        super().__init__(size, world, seed, self._into_catalog)
        self.catalog, self.reports_left = catalog, dies_after
        self.committed: Counter[str] = Counter()

    def wait(self, timeout_s: float) -> Sequence[Report]:
        reports = super().wait(timeout_s)
        if self.reports_left is not None:
            self.reports_left -= len(reports)
            if self.reports_left <= 0:
                raise DriverKilled
        return reports

    def _into_catalog(self, job: Job, now: float) -> str:
        if any(first <= now < last for first, last in self.world.outages):
            return ""
        try:
            self.catalog.commit(job.job_id, identity(job), {"merged.safetensors": job.pair.encode()}, {})
        except AlreadyCommitted:
            return "already"
        finally:
            self.done.add(job.job_id)
        self.committed[job.job_id] += 1
        return "committed"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a seed decides."""

    jobs: list[Job]
    workers: int
    world: World
    driver_dies_after: tuple[int, ...]
    two_drivers: bool


def plan(seed: int) -> Plan:
    dice = random.Random(seed)
    side = dice.choice((6, 12, 20))
    jobs = grid(dice.randint(side // 3, side), dice.randint(side // 3, side))
    dice.shuffle(jobs)
    jobs = jobs[: dice.randint(3, len(jobs))] if len(jobs) > 3 else jobs  # sparse grids, too
    pairs = [job.pair for job in jobs]
    away = dice.uniform(100, 900)
    world = World(
        load_s=dice.uniform(1, 60),
        merge_s=dice.choice((10.9, 1.0)),
        noise=dice.uniform(0, 0.5),
        cached_loras=dice.randint(2, 20),
        slow_share=dice.choice((0.0, 0.3)),
        preemptions_per_hour=dice.choice((0.0, 2.0, 10.0)),
        crashes_per_hour=dice.choice((0.0, 2.0, 10.0)),
        poison=frozenset(dice.sample(pairs, dice.choice((0, 0, 1, 2)))),
        hangs=frozenset(dice.sample(pairs, dice.choice((0, 0, 1, 2)))),
        outages=((away, away + dice.uniform(30, 600)),) if dice.random() < 0.5 else (),
        side_by_side=dice.choice((1, 1, 2, 4, 8)),
    )
    deaths = tuple(dice.randint(5, 3 * len(jobs)) for _ in range(dice.choice((0, 0, 1, 2))))
    return Plan(jobs, dice.randint(1, 8), world, deaths, two_drivers=dice.random() < 0.2)


def chaos(seed: int, directory: Path) -> dict[str, int]:
    """One run with all that its seed has in store for it; AssertionError if a job is lost or committed twice."""
    made = plan(seed)
    pools: list[ChaosPool] = []
    reasons: dict[str, set[str]] = {}
    seen: Counter[str] = Counter()

    def observe(event: events.Event) -> None:
        seen[type(event).__name__] += 1
        if isinstance(event, events.JobGivenUp):
            reasons.setdefault(event.job.job_id, set()).add(event.kind)

    def drive(number: int, dies_after: int | None = None) -> None:
        catalog = Catalog(directory)
        pool = ChaosPool(made.workers, made.world, seed * 1000 + number, catalog, dies_after)
        pools.append(pool)
        done = catalog.committed()
        pool.done |= done
        left = [job for job in made.jobs if job.job_id not in done]
        try:
            run(left, pool, catalog, run_id=f"chaos-{seed}", limits=LIMITS, observers=[observe], clock=pool.clock)
        except DriverKilled:
            seen["drivers killed"] += 1

    for number, reports in enumerate(made.driver_dies_after):
        drive(number, reports)
    if made.two_drivers:
        together = [threading.Thread(target=drive, args=(100 + number,)) for number in range(2)]
        for thread in together:
            thread.start()
        for thread in together:
            thread.join()
    drive(999)

    catalog = Catalog(directory)
    committed = catalog.committed()
    given_up = {failure.job_id: failure for failure in catalog.failures()}
    deaths: Counter[str] = Counter()
    commits: Counter[str] = Counter()
    for pool in pools:
        deaths.update(pool.deaths)
        commits.update(pool.committed)
    for job in made.jobs:
        assert (job.job_id in committed) != (job.job_id in given_up), f"{job.pair} is lost, or both"
        assert commits[job.job_id] == (job.job_id in committed), f"{job.pair} was committed {commits[job.job_id]} times"
        if job.pair in made.world.poison:
            assert job.job_id in given_up, f"{job.pair} ends its process and was not given up"
        if job.job_id in given_up:
            failure = given_up[job.job_id]
            assert failure.kind in ("WorkerLost", "DeadlineExceeded"), f"{job.pair}: {failure.kind}: {failure.reason}"
            assert failure.attempts == LIMITS.attempts, f"{job.pair} was given up after {failure.attempts} attempts"
            assert deaths[job.job_id] >= LIMITS.attempts, f"{job.pair} ended only {deaths[job.job_id]} workers"
    innocent = [job.pair for job in made.jobs if job.job_id in given_up and job.pair not in made.world.poison]
    return {
        "jobs": len(made.jobs),
        "committed": len(committed),
        "given up": len(given_up),
        "of them not poison, by as many crashes while they were merged": len(innocent),
        "workers lost": seen["WorkerGone"],
        "attempts that failed": seen["JobFailed"],
        "drivers killed": seen["drivers killed"],
        "two drivers": int(made.two_drivers),
        "store away": int(bool(made.world.outages)),
    }


def main() -> None:
    seeds = [int(seed) for seed in sys.argv[1:]] or list(range(RUNS))
    total: Counter[str] = Counter()
    failed: dict[str, str] = {}
    began = time.monotonic()
    for seed in seeds:
        with tempfile.TemporaryDirectory() as directory:
            try:
                figures = chaos(seed, Path(directory))
            except (AssertionError, ServiceError) as error:
                failed[str(seed)] = str(error)
                print(f"seed {seed}: {error}")
                continue
        total.update(figures)
        if len(sys.argv) > 1:
            print(seed, plan(seed).world, json.dumps(figures, indent=2))
    result = {
        "runs": len(seeds),
        "seconds": round(time.monotonic() - began),
        "failed seeds": failed,
        "in all runs": dict(total),
    }
    print(json.dumps(result, indent=2))
    if len(sys.argv) == 1:
        save(RESULT, result)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
