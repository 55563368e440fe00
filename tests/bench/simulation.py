"""`make bench-simulation`: a million pairs on a thousand workers in virtual time, by the real tiles, failure policy and
control loop. Results: results/simulation.json.

    python -m tests.bench.simulation            every case, each in a process of its own (its memory is its own)
    python -m tests.bench.simulation CASE…      some

What is shown: how busy the workers are, how often LoRAs are loaded against the bound of square tiles and against
pair-by-pair scheduling, what the coordinator's own code costs, and how that grows with the grid.
"""

import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from service import events
from service.catalog import Catalog
from service.jobs import Job
from service.messages import Tile, TileDone
from service.metrics import Metrics
from service.pool import Lost, Ready, Report, Said
from service.run import run
from service.tiles import TILE_SIDE, Board, cut, loras
from tests.bench.record import figures_of, save
from tests.bench.simulated import SimulatedPool, World, grid

RESULT = Path(__file__).parent / "results" / "simulation.json"
ROUGH = World(slow_share=0.02, preemptions_per_hour=0.05)  # 10× stragglers; a notice before half of the preemptions
CASES: dict[str, tuple[int, int, int, World]] = {  # subjects, styles, workers
    "10^3": (25, 40, 1, World()),
    "10^4": (100, 100, 10, World()),
    "10^5": (250, 400, 100, World()),
    "10^6": (1000, 1000, 1000, World()),
    "10^5, rough": (250, 400, 100, ROUGH),
    "10^6, rough": (1000, 1000, 1000, ROUGH),
    "10^5, small caches": (250, 400, 100, replace(World(), cached_loras=8)),
}
NAIVE: dict[str, tuple[int, int, int, World]] = {
    "10^5, pair by pair": (250, 400, 100, World()),
    "10^6, pair by pair": (1000, 1000, 1000, World()),
    "10^6, rough, pair by pair": (1000, 1000, 1000, ROUGH),
}

DECISIONS = {"10^3, decisions": (25, 40, 1), "10^6, decisions": (1000, 1000, 1000)}


class TimedPool(SimulatedPool):
    """Knows how much of the processor's time went into simulating, so that the rest is the coordinator's."""

    simulating_s = 0.0

    def start(self, worker: str, tile: Tile, deadline_s: float) -> None:
        began = time.process_time()
        super().start(worker, tile, deadline_s)
        self.simulating_s += time.process_time() - began

    def wait(self, timeout_s: float) -> Sequence[Report]:
        began = time.process_time()
        reports = super().wait(timeout_s)
        self.simulating_s += time.process_time() - began
        return reports


class Watch:
    """Tiles, attempts that failed, and what the loop thought of its end at half time."""

    def __init__(self, pool: SimulatedPool, jobs: int) -> None:
        self.pool, self.jobs = pool, jobs
        self.tiles = self.failed = self.returned = 0
        self.half_time: tuple[float, float] | None = None  # virtual seconds, and those that were thought to be left

    def observe(self, event: events.Event) -> None:
        match event:
            case events.TileStarted():
                self.tiles += 1
            case events.JobFailed():
                self.failed += event.counts
                self.returned += not event.counts
            case events.Outlook(left, _, seconds) if seconds and left <= self.jobs / 2 and self.half_time is None:
                self.half_time = self.pool.now, seconds


def simulate(name: str) -> dict[str, object]:
    subjects, styles, workers, world = CASES[name]
    jobs = grid(subjects, styles)
    before_mb = peak_mb()
    pool = TimedPool(workers, world, seed=1)
    watch, metrics = Watch(pool, len(jobs)), Metrics("simulation")
    with tempfile.TemporaryDirectory() as directory:
        began = time.process_time()
        progress = run(
            jobs,
            pool,
            Catalog(directory),
            run_id="simulation",
            observers=[watch.observe, metrics.observe],
            clock=pool.clock,
        )
        used_s = time.process_time() - began
    assert len(progress.committed) == len({job.job_id for job in progress.committed}) == len(jobs)
    coordinator_s = used_s - pool.simulating_s
    at, thought = watch.half_time or (0.0, 0.0)
    return {
        **figures(jobs, workers, world, pool),
        "tiles": watch.tiles,
        "workers lost": pool.losses,
        "attempts that failed": watch.failed,
        "jobs that came back through no fault of theirs": watch.returned,
        "ETA at half time, of the true rest": round(thought / (pool.now - at), 3) if at else None,
        "coordinator CPU seconds": round(coordinator_s, 2),
        "tiles per CPU second, with all that came of them": round(watch.tiles / coordinator_s),
        "jobs per CPU second of coordinator": round(len(jobs) / coordinator_s),
        "coordinator memory MB, jobs included": round(peak_mb()),
        "of it before the run": round(before_mb),
    }


def decisions(name: str) -> dict[str, object]:
    """Who gets what, alone: tiles of ten pairs, each to the worker that has waited longest, until none is left."""
    subjects, styles, workers = DECISIONS[name]
    jobs = grid(subjects, styles)
    board = Board(cut(jobs, workers))
    held: dict[str, set[str]] = {f"worker-{i}": set() for i in range(workers)}
    n, longest_s, began = 0, 0.0, time.process_time()
    while board.left:
        for worker, loras_held in held.items():
            asked = time.process_time()
            tile = board.take(worker, 10, loras_held)
            longest_s = max(longest_s, time.process_time() - asked)
            if tile is not None:
                n += 1
                held[worker] = loras(tile.jobs) | set(list(loras_held)[-50:])
    seconds = time.process_time() - began
    return {
        "pairs": len(jobs),
        "workers": workers,
        "tiles": n,
        "tile decisions per second": round(n / seconds),
        "longest decision ms": round(1000 * longest_s, 2),
    }


def pair_by_pair(name: str) -> dict[str, object]:
    """What a queue of single pairs does on the same workers: the next pair to whoever is free."""
    subjects, styles, workers, world = NAIVE[name]
    jobs = grid(subjects, styles)
    pool = SimulatedPool(workers, world, seed=1)
    left = list(reversed(jobs))
    given: dict[str, list[Job]] = {}  # the last one's upload goes on beside the next
    while len(pool.done) < len(jobs):
        for report in pool.wait(0.5):
            if isinstance(report, Ready) or (isinstance(report, Said) and isinstance(report.message, TileDone)):
                tile = Tile((left.pop(),)) if left else Tile(())
                given.setdefault(report.worker, []).extend(tile.jobs)
                if left or tile.jobs or pool.workers[report.worker].uploads:
                    pool.start(report.worker, tile, math.inf)
            elif isinstance(report, Lost):
                left.extend(job for job in given.pop(report.worker, ()) if job.job_id not in pool.done)
    return figures(jobs, workers, world, pool)


def figures(jobs: Sequence[Job], workers: int, world: World, pool: SimulatedPool) -> dict[str, object]:
    bound = 2 / TILE_SIDE
    return {
        "pairs": len(jobs),
        "workers": workers,
        "world": {name: value for name, value in asdict(world).items() if not isinstance(value, frozenset)},
        "virtual hours": round(pool.now / 3600, 2),
        "busy": round(pool.busy_s / (workers * pool.now), 4),
        "LoRA loads per pair": round(pool.loads / len(jobs), 4),
        "bound of 16×16 tiles, each loaded anew": bound,
        "loads against that bound": round(pool.loads / len(jobs) / bound, 3),
        "GPU hours": round(workers * pool.now / 3600, 1),
    }


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    if sys.argv[1:2] == ["--here"]:
        name = sys.argv[2]
        print(json.dumps((simulate if name in CASES else pair_by_pair if name in NAIVE else decisions)(name)))
        return
    for name in sys.argv[1:] or (*CASES, *NAIVE, *DECISIONS):
        command = [sys.executable, "-m", __spec__.name, "--here", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results = figures_of(RESULT)
        results[name] = json.loads(done.stdout)
        print(name, json.dumps(results[name], ensure_ascii=False))
        save(RESULT, results)


if __name__ == "__main__":
    main()
