"""`make bench-no-op`: 100,000 jobs of no work through the real control loop and a real Ray: what a job costs where
nothing else does. Result: results/no_op.json.

    python -m tests.bench.no_op [JOBS [WORKERS]]
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from service import events
from service.catalog import Catalog
from service.messages import Began, JobResult, Message, Tile, TileDone, WorkerSettings
from service.metrics import Metrics
from service.ray_pool import RayPool
from service.run import run
from tests.bench.record import save
from tests.bench.simulated import grid

RESULT = Path(__file__).parent / "results" / "no_op.json"
STAGES = {"fetch": 0.0, "calibrate": 0.0, "merge": 0.0, "write": 0.0, "commit": 0.0}


class NoOp:
    """Says of each job what a worker says, and does nothing."""

    name = "none"
    load_s = 0.0
    model = ""
    n_bytes = None

    def __init__(self, settings: WorkerSettings) -> None:
        self.device = self

    def is_sound(self) -> bool:
        return True

    def work(self, tile: Tile) -> Iterator[Message]:
        began = time.monotonic()
        for job in tile.jobs:
            yield Began((job.job_id,))
            yield JobResult(job.job_id, "committed", stages=STAGES, n_bytes=1, peak_bytes=1)
        yield TileDone(seconds=time.monotonic() - began)


def main() -> None:
    n_jobs = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    workers = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    jobs = grid(n_jobs // 250, 250)
    me, memory = psutil.Process(), list[tuple[int, float]]()
    metrics, tiles, done = Metrics("no-op"), [0], [0]

    def watch(event: events.Event) -> None:
        tiles[0] += isinstance(event, events.TileStarted)
        if isinstance(event, events.JobCommitted):
            done[0] += 1
            if done[0] % (len(jobs) // 10) == 0:
                memory.append((done[0], round(me.memory_info().rss / 2**20, 1)))

    with tempfile.TemporaryDirectory() as directory:
        pool = RayPool(WorkerSettings(directory, "", None, device="cpu"), workers, make=NoOp)
        try:
            began, cpu = time.monotonic(), me.cpu_times()
            observers = [watch, metrics.observe]
            progress = run(jobs, pool, Catalog(directory), run_id="no-op", observers=observers)
            seconds, used = time.monotonic() - began, me.cpu_times()
        finally:
            pool.close()
    assert len(progress.committed) == len(jobs)
    figures = {
        "jobs": len(jobs),
        "workers": workers,
        "tiles": tiles[0],
        "seconds": round(seconds, 1),
        "jobs per second": round(len(jobs) / seconds),
        "coordinator CPU seconds": round(used.user + used.system - cpu.user - cpu.system, 1),
        "coordinator MB by jobs done": memory,
    }
    save(RESULT, figures)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
