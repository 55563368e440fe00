"""`make bench-faults`: a grid of real pocket pairs on a real Ray of several nodes, while things go wrong on cue.

    python -m tests.bench.faults            every scenario; results/faults.json
    python -m tests.bench.faults NAME…      some

After each: every job is committed exactly once or given up with the right reason, attempts are as scripted, no actor
outlives its run, no half-written file is left. Needs about a minute and 2 GB per scenario.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.cluster_utils import Cluster

from service import events
from service.catalog import Catalog
from service.faults import Limits
from service.jobs import Job
from service.manifest import read_manifest
from service.messages import WorkerSettings
from service.plan import plan
from service.ray_pool import RayPool
from service.run import Progress, run
from tests.bench.record import figures_of, save
from tests.bench.scripted_worker import Script
from tests.commands import wait_until
from tests.test_ray_pool import actors

ROOT = Path(__file__).resolve().parent.parent.parent
LORAS = ROOT / "ziplora/pocket/weights/loras"
RESULT = Path(__file__).parent / "results" / "faults.json"
LIMITS = Limits(attempts=3, deadline_s=60.0)


@dataclass
class Scene:
    """A cluster, the grid, and what was seen of the run."""

    root: Path
    cluster: Cluster
    nodes: list[Any]
    jobs: tuple[Job, ...]
    settings: WorkerSettings
    script: Script
    seen: list[events.Event] = field(default_factory=list)
    progress: Progress | None = None
    pool: RayPool | None = None
    limits: Limits = LIMITS
    at: list[tuple[float, Callable[[], None]]] = field(default_factory=list)  # share committed → what happens then

    @property
    def catalog(self) -> Catalog:
        return Catalog(self.settings.catalog)

    def drive(self, jobs: tuple[Job, ...] | None = None, workers: int = 3) -> None:
        self.pool = RayPool(self.settings, workers, self.cluster.address, make=self.script)
        try:
            self.progress = run(
                self.jobs if jobs is None else jobs,
                self.pool,
                self.catalog,
                run_id="faults",
                limits=self.limits,
                observers=[self._note],
            )
        finally:
            self.pool.close()

    def _note(self, event: events.Event) -> None:
        self.seen.append(event)
        if self.at and self.n_committed() >= self.at[0][0] * len(self.jobs):
            self.at.pop(0)[1]()

    def during(self, act: Callable[[], None]) -> None:
        """Drive the run while `act` goes on beside it."""
        with ThreadPoolExecutor(1) as beside:
            done = beside.submit(act)
            self.drive()
            done.result()

    def n_committed(self) -> int:
        return sum(isinstance(event, events.JobCommitted) for event in self.seen)

    def committed(self, share: float) -> None:
        """Wait until so much of the grid is committed."""
        wait_until(lambda: self.n_committed() >= share * len(self.jobs))

    def busy_worker(self, node_id: str | None = None) -> str:
        assert self.pool is not None
        started = [event.worker for event in self.seen if isinstance(event, events.JobStarted)]
        there = [w for w in reversed(started) if w in self.pool.processes]
        return next(w for w in there if node_id in (None, self.pool.processes[w].node_id))


# What goes wrong. Each returns what was counted besides.


def kill_9(scene: Scene) -> dict[str, object]:
    """An actor's process is killed, three times."""

    def act() -> None:
        for share in (0.1, 0.3, 0.5):
            scene.committed(share)
            assert scene.pool is not None
            os.kill(scene.pool.processes[scene.busy_worker()].pid, signal.SIGKILL)

    scene.during(act)
    lost = [event for event in scene.seen if isinstance(event, events.WorkerGone)]
    assert len(lost) == 3, lost
    assert all(event.returns for event in lost)
    check(scene)
    return {"attempts that failed": len(failures(scene))}


def node_killed(scene: Scene) -> dict[str, object]:
    """A node vanishes with its worker; later another comes."""

    def remove() -> None:
        scene.cluster.remove_node(scene.nodes.pop(), allow_graceful=False)

    def add() -> None:
        scene.nodes.append(scene.cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20))

    scene.at = [(0.2, remove), (0.4, add)]
    scene.drive()
    assert not scene.at
    check(scene)
    ready = sum(isinstance(event, events.WorkerReady) for event in scene.seen)
    return {"workers lost": sum(isinstance(event, events.WorkerGone) for event in scene.seen), "workers ready": ready}


def node_drained(scene: Scene) -> dict[str, object]:
    """A node is told to go: its worker gets nothing more, ends what it does, and is started again elsewhere."""

    def act() -> None:
        scene.committed(0.2)
        assert scene.pool is not None
        node_id = scene.pool.processes[scene.busy_worker()].node_id
        command = [Path(sys.executable).parent / "ray", "drain-node", "--address", scene.cluster.address]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice"]
        drain = [*command, "--node-id", node_id, *reason, "--deadline-remaining-seconds", "60"]
        subprocess.run(drain, check=True, capture_output=True)

    scene.during(act)
    gone = [event for event in scene.seen if isinstance(event, events.WorkerGone)]
    assert any("drained" in event.reason for event in gone), gone
    check(scene)
    assert not failures(scene), "a notice costs no attempt"
    return {"workers told to leave": len(gone)}


def hang(scene: Scene) -> dict[str, object]:
    """Two merges never return: their workers are ended at the deadline."""
    pairs = [scene.jobs[7].pair, scene.jobs[40].pair]
    scene.script = replace(scene.script, acts={pair: ["hang", "ok"] for pair in pairs})
    scene.limits = replace(LIMITS, deadline_s=15.0)
    scene.drive()
    check(scene)
    assert sorted(event.kind for event in failures(scene)) == ["DeadlineExceeded"] * 2
    assert {event.job.pair for event in failures(scene)} == set(pairs)
    return {"attempts that failed": 2}


def poison(scene: Scene) -> dict[str, object]:
    """A pair ends every process that merges it, four pairs at a time: it alone is given up."""
    pair = scene.jobs[20].pair
    scene.settings = replace(scene.settings, side_by_side=4)
    scene.script = replace(scene.script, acts={pair: ["die"]})
    scene.drive()
    guilty = {job.job_id for job in scene.jobs if job.pair == pair}
    check(scene, given_up=guilty)
    assert {event.job.job_id for event in failures(scene)} == guilty
    assert len(failures(scene)) == 3 * len(guilty)
    returned = {e.job.pair for e in scene.seen if isinstance(e, events.JobFailed) and not e.counts}
    return {"attempts that failed": len(failures(scene)), "neighbours that came back and were committed": len(returned)}


def driver_killed(scene: Scene) -> dict[str, object]:
    """The driver is killed in the middle; its actors end with it; the same run again goes on from there."""
    process = driver(scene, "first")
    wait_until(lambda: len(scene.catalog.committed()) > 0.3 * len(scene.jobs))
    process.kill()
    process.wait()
    before = scene.catalog.committed()
    wait_until(lambda: not actors(), 60)
    scene.drive(tuple(job for job in scene.jobs if job.job_id not in before))
    check(scene, before=before)
    return {"committed before the kill": len(before)}


def two_drivers(scene: Scene) -> dict[str, object]:
    """A second coordinator on the same catalog, by mistake: both end well."""
    processes = [driver(scene, name, workers=2) for name in ("first", "second")]
    codes = [process.wait(170) for process in processes]
    assert codes == [0, 0], [Path(scene.root / f"{name}.log").read_text()[-2000:] for name in ("first", "second")]
    both = [pickle.loads((scene.root / f"{name}.pickle").read_bytes()) for name in ("first", "second")]
    own = [{job_id for job_id, already in found["committed"] if not already} for found in both]
    assert not own[0] & own[1], "committed twice"
    assert own[0] | own[1] == {job.job_id for job in scene.jobs}
    check(scene, before={job.job_id for job in scene.jobs})
    return {"committed by each": [len(one) for one in own]}


SCENARIOS = {
    function.__name__: function
    for function in (kill_9, node_killed, node_drained, hang, poison, driver_killed, two_drivers)
}


# What must hold afterwards


def failures(scene: Scene) -> list[events.JobFailed]:
    return [event for event in scene.seen if isinstance(event, events.JobFailed) and event.counts]


def check(scene: Scene, given_up: set[str] = frozenset(), before: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    ids = {job.job_id for job in scene.jobs}
    catalog = scene.catalog
    assert catalog.committed() == ids - given_up
    recorded = list(catalog.failures())
    assert {failure.job_id for failure in recorded} == given_up
    assert {failure.kind for failure in recorded} <= {"WorkerLost"}
    commits = Counter(e.job.job_id for e in scene.seen if isinstance(e, events.JobCommitted))
    assert commits == Counter(ids - given_up - before), "a commit was reported twice, or never"
    failed = Counter(event.job.job_id for event in failures(scene))
    if scene.progress is not None:
        for job_id in ids - before:
            expected = failed[job_id] + (job_id not in given_up)
            assert scene.progress.attempts[job_id] == expected, (scene.progress.attempts[job_id], expected)
    wait_until(lambda: not actors(), 60)
    left = [path for path in scene.root.rglob("*.part") if path.is_file()]
    left += [path for path in (scene.root / "catalog").rglob(".tmp/*") if path.is_file()]
    assert not left, left


# The stage


def manifest(root: Path) -> Path:
    """48 pairs of trained pocket LoRAs by two methods, without samples: 96 jobs."""

    def section(kind: str, prompt: str, trigger: str) -> dict[str, object]:
        return {
            path.name: {
                "lora": str(path / f"{path.name}.safetensors"),
                "prompt": prompt,
                "trigger": trigger,
                "images": str(path / "*.png"),
            }
            for path in sorted((LORAS / kind).iterdir())
        }

    content = {
        "base": str(ROOT / "ziplora/pocket/weights/base"),
        "subjects": section("subjects", "a photo of a sks", "sks"),
        "styles": section("styles", "a house in szn style", "szn style"),
        "merge": [{"method": "ziplora", "steps": 4}, {"method": "direct"}],
        "samples": {"prompts": []},
        "output": str(root / "catalog"),
    }
    path = root / "manifest.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@contextmanager
def stage(name: str) -> Iterator[Scene]:
    with tempfile.TemporaryDirectory(prefix=f"faults-{name}-") as directory:
        root = Path(directory)
        planned = plan(read_manifest(manifest(root)))
        planned.check()
        assert planned.base is not None
        settings = WorkerSettings(
            str(root / "catalog"),
            planned.base.ref.location,
            None,
            planned.base.ref.digest,
            device="cpu",
            cache_dir=str(root / "cache"),
            store_patience_s=120,
        )
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 * 2**20})
        try:
            nodes = [cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20) for _ in range(3)]
            script = Script({}, root / "counts", pause_s=0.25)
            yield Scene(root, cluster, nodes, planned.jobs, settings, script)
        finally:
            ray.shutdown()
            cluster.shutdown()


def driver(scene: Scene, name: str, workers: int = 3) -> subprocess.Popen[bytes]:
    """A coordinator in a process of its own."""
    order = (scene.cluster.address, scene.jobs, scene.settings, scene.script, workers)
    (scene.root / f"{name}.order").write_bytes(pickle.dumps(order))
    log = (scene.root / f"{name}.log").open("w")
    command = [sys.executable, "-m", __spec__.name, "--drive", str(scene.root / name)]
    return subprocess.Popen(command, stdout=log, stderr=log)


def drive(order: Path) -> None:
    address, jobs, settings, script, workers = pickle.loads(order.with_suffix(".order").read_bytes())
    committed: list[tuple[str, bool]] = []
    seen: Counter[str] = Counter()

    def note(event: events.Event) -> None:
        seen[type(event).__name__] += not isinstance(event, events.JobFailed) or event.counts
        if isinstance(event, events.JobCommitted):
            committed.append((event.job.job_id, event.already))

    pool = RayPool(settings, workers, address, make=script)
    try:
        run(jobs, pool, Catalog(settings.catalog), run_id=order.name, limits=LIMITS, observers=[note])
    finally:
        pool.close()
    found = {"committed": committed, "lost": seen["WorkerGone"], "failed": seen["JobFailed"]}
    order.with_suffix(".pickle").write_bytes(pickle.dumps(found))


def main() -> None:
    if sys.argv[1:2] == ["--drive"]:
        drive(Path(sys.argv[2]))
        return
    os.environ.setdefault("RAY_worker_niceness", "0")
    for name in sys.argv[1:] or SCENARIOS:
        began = time.monotonic()
        with stage(name) as scene:
            ready_s = time.monotonic() - began
            found = SCENARIOS[name](scene)
            jobs = len(scene.jobs)
        figures = {
            "jobs": jobs,
            **found,
            "seconds": round(time.monotonic() - began),
            "of them to start Ray": round(ready_s),
        }
        results = figures_of(RESULT)
        save(RESULT, {**results, name: figures})
        print(name, json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
