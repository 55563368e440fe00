"""The stage of bench/faults.py: a grid of real pocket pairs on a real Ray of several nodes, what was seen of the run,
and what must hold after it."""

import os
import pickle
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import ray
import yaml
from ray.cluster_utils import Cluster

from service import events
from service.catalog import Catalog
from service.faults import Limits
from service.jobs import Job, TrainJob
from service.manifest import read_manifest
from service.messages import WorkerSettings
from service.outcomes import Progress
from service.plan import plan
from service.ray_pool import RayPool
from service.run import run
from tests.bench.scripted_worker import Script
from tests.commands import wait_until
from tests.swift_node import SwiftNode, swift_node
from tests.test_ray_pool import actors

ROOT = Path(__file__).resolve().parent.parent.parent
LORAS = ROOT / "ziplora/pocket/weights/loras"
LIMITS = Limits(attempts=3, deadline_s=60.0, copies=0)  # a copy would do what a scripted fault shall fail at
PATIENCE_S = 900.0  # with a machine that is busy with other things
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@dataclass
class Scene:
    """The grid, where it runs, and what was seen of the run."""

    root: Path
    jobs: tuple[Job, ...]
    settings: WorkerSettings
    script: Script
    address: str = ""
    cluster: Cluster | None = None
    nodes: list[Any] = field(default_factory=list)
    store: SwiftNode | None = None
    seen: list[events.Event] = field(default_factory=list)
    progress: Progress | None = None
    pool: RayPool | None = None
    limits: Limits = LIMITS
    trainings: tuple[TrainJob, ...] = ()  # that some of the jobs wait for
    at: list[tuple[float, Callable[[], None]]] = field(default_factory=list)  # share committed → what happens then
    actors: Callable[[], list[int]] = actors  # processes of workers that live
    garbage: int = 0  # attempts and half-written files that killed processes left, see `check`
    # its thread lives as long as the scene: what it starts with `end_with_parent` ends with the thread, not the process
    beside: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, 1))

    @property
    def catalog(self) -> Catalog:
        return Catalog(self.settings.catalog)

    def drive(self, jobs: tuple[Job, ...] | None = None, workers: int = 3) -> None:
        self.pool = RayPool(self.settings, workers, self.address, make=self.script)
        try:
            self.progress = run(
                self.jobs if jobs is None else jobs,
                self.pool,
                self.catalog,
                run_id="faults",
                limits=self.limits,
                observers=[self._note],
                trainings=self.trainings,
            )
        finally:
            self.pool.close()

    def _note(self, event: events.Event) -> None:
        self.seen.append(event)
        if self.at and self.n_committed() >= self.at[0][0] * len(self.jobs):
            self.at.pop(0)[1]()

    def during(self, act: Callable[[], None], workers: int = 3) -> None:
        """Drive the run while `act` goes on beside it."""
        done = self.beside.submit(act)
        self.drive(workers=workers)
        done.result()

    def add_node(self) -> None:
        assert self.cluster is not None
        self.nodes.append(self.cluster.add_node(**NODE))

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.seen if isinstance(event, kind)]

    def n_committed(self) -> int:
        return len(self.of(events.JobCommitted))

    def committed(self, share: float) -> None:
        """Wait until so much of the grid is committed."""
        wait_until(lambda: self.n_committed() >= share * len(self.jobs), PATIENCE_S)

    def busy_worker(self) -> str:
        assert self.pool is not None
        started = [event.worker for event in self.of(events.JobStarted)]
        return next(worker for worker in reversed(started) if worker in self.pool.processes)


# What must hold afterwards


def failures(scene: Scene) -> list[events.JobFailed]:
    return [event for event in scene.of(events.JobFailed) if event.counts]


def check(scene: Scene, given_up: frozenset[str] = frozenset(), before: frozenset[str] = frozenset()) -> None:
    """Every job is committed once, or given up for what it did; attempts are those that were seen to fail and one more;
    no actor is left, and no file but what killed processes were writing, which `ziplora gc` takes. `before`: committed
    by an earlier run."""
    ids = {job.job_id for job in scene.jobs}
    catalog = scene.catalog
    assert catalog.committed() == ids - given_up
    recorded = list(catalog.failures())
    assert {failure.job_id for failure in recorded} == given_up
    assert {failure.kind for failure in recorded} <= {"WorkerLost"}
    commits = Counter(event.job.job_id for event in scene.of(events.JobCommitted))
    assert commits == Counter(ids - given_up - before), "a commit was reported twice, or never"
    failed = Counter(event.job.job_id for event in failures(scene))
    if scene.progress is not None:
        for job_id in ids - before:
            expected = failed[job_id] + (job_id not in given_up)
            assert scene.progress.attempts[job_id] == expected, (scene.progress.attempts[job_id], expected)
    wait_until(lambda: not scene.actors(), PATIENCE_S)
    # a half-written digest, of some bytes, goes when the next one is written beside it
    left = [path for path in scene.root.rglob("*.part") if path.is_file() and "digests" not in path.parts]
    assert not left, left
    garbage = catalog.garbage(now=datetime.now(UTC) + timedelta(days=2))
    scene.garbage = len(garbage)
    assert all(gone for _, gone in catalog.collect(garbage))
    assert not list(catalog.store.unfinished())
    attempts = {tuple(found.key.split("/")[1:3]) for found in catalog.store.list("pairs/")}
    assert len(attempts) == len(ids - given_up), "an attempt is left that no entry names"
    assert not [checked for checked in catalog.verify() if checked.problem], "an object is not as its entry promises"


# The stage


def manifest(root: Path) -> Path:
    """64 pairs of trained pocket LoRAs, two of the styles once more at 0.8 of their weight; without samples."""

    def section(kind: str, prompt: str, trigger: str, weights: dict[str, float] | None = None) -> dict[str, object]:
        return {
            f"{path.name}{suffix}": {
                "lora": str(path / f"{path.name}.safetensors"),
                "prompt": prompt,
                "trigger": trigger,
                "images": str(path / "*.png"),
                "weight": weight,
            }
            for suffix, weight in {"": 1.0, **(weights or {})}.items()
            for path in sorted((LORAS / kind).iterdir())[: None if not suffix else 2]
        }

    content = {
        "base": str(ROOT / "ziplora/pocket/weights/base"),
        "subjects": section("subjects", "a photo of a sks", "sks"),
        "styles": section("styles", "a house in szn style", "szn style", {"-soft": 0.8}),
        "merge": {"method": "ziplora", "steps": 4},
        "samples": {"prompts": []},
        "output": str(root / "catalog"),
    }
    path = root / "manifest.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def scene_in(root: Path, write: Callable[[Path], Path] = manifest) -> Scene:
    """The grid, planned; nobody to work on it yet. `write` leaves its manifest in a directory."""
    planned = plan(read_manifest(write(root)))
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
    script = Script({}, root / "counts", pause_s=0.25)
    return Scene(root, planned.jobs, settings, script, trainings=planned.trainings)


@contextmanager
def stage(
    name: str, with_store: bool = False, nodes: int = 3, write: Callable[[Path], Path] = manifest
) -> Iterator[Scene]:
    """Nodes with a processor each, and a head without; with no `nodes` the head has one. `with_store`: the catalog lies
    on an S3 server. `write` as for `scene_in`."""
    with tempfile.TemporaryDirectory(prefix=f"faults-{name}-") as directory, ExitStack() as stack:
        scene = scene_in(Path(directory), write)
        if with_store:
            scene.store = stack.enter_context(swift_node(Path(directory) / "swift"))
            os.environ.update(scene.store.environment)  # before Ray starts, whose workers have it from there
            boto3.client("s3").create_bucket(Bucket="faults")
            scene.settings = replace(scene.settings, catalog="s3://faults/catalog")
        scene.cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0 if nodes else 1})
        scene.address = scene.cluster.address
        try:
            for _ in range(nodes):
                scene.add_node()
            yield scene
        finally:
            ray.shutdown()
            scene.cluster.shutdown()


# A coordinator in a process of its own: python -m tests.bench.stage ORDER


def driver(scene: Scene, name: str, workers: int = 3, prefix: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    """It leaves `name`.pickle, see `found_by`; `prefix` are words of a command that runs another."""
    order = (scene.address, scene.jobs, scene.settings, scene.script, workers)
    (scene.root / f"{name}.order").write_bytes(pickle.dumps(order))
    command = [*prefix, sys.executable, "-m", __name__, str(scene.root / name)]
    with (scene.root / f"{name}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def found_by(scene: Scene, name: str) -> tuple[list[events.Event], Progress]:
    """What the driver saw, and where its jobs stood at the end."""
    seen, progress = pickle.loads((scene.root / f"{name}.pickle").read_bytes())
    return seen, progress


def log_of(scene: Scene, name: str) -> str:
    return (scene.root / f"{name}.log").read_text()


def main() -> None:
    order = Path(sys.argv[1])
    address, jobs, settings, script, workers = pickle.loads(order.with_suffix(".order").read_bytes())
    seen: list[events.Event] = []

    def note(event: events.Event) -> None:
        seen.append(event)
        if isinstance(event, events.WorkerReady | events.WorkerGone):
            print(event, flush=True)

    pool = RayPool(settings, workers, address, make=script)
    try:
        progress = run(jobs, pool, Catalog(settings.catalog), run_id=order.name, limits=LIMITS, observers=[note])
    finally:
        pool.close()
    order.with_suffix(".pickle").write_bytes(pickle.dumps((seen, progress)))


if __name__ == "__main__":
    main()
