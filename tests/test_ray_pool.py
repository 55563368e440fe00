"""Workers as Ray actors: what a pool does with real processes that die, hang and are told to go. The workers here merge
nothing, they commit a line of text; everything else is real."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray._raylet import GcsClient
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.experimental.internal_kv import _internal_kv_get

from service import events
from service.catalog import Catalog
from service.crew import Crew
from service.faults import Limits
from service.jobs import Job, identity
from service.messages import Began, JobResult, Message, Tile, TileDone, WorkerSettings
from service.outcomes import Progress
from service.pool import Ready, Report
from service.ray_pool import RayPool
from service.run import run
from tests.bench.simulated import grid
from tests.commands import wait_until


@dataclass(frozen=True, slots=True)
class Quick:
    """Makes workers that commit at once, but for what a script says: pair → what its attempts do, in order."""

    directory: Path
    acts: Mapping[str, Sequence[str]]
    side_by_side: int = 1
    job_s: float = 0.0

    name = "none"
    load_s = 0.0
    model = ""
    n_bytes = None

    def __call__(self, settings: WorkerSettings) -> "Quick":
        return self

    @property
    def device(self) -> "Quick":
        return self

    def is_sound(self) -> bool:
        return True

    def work(self, tile: Tile) -> Iterator[Message]:
        catalog = Catalog(self.directory / "catalog")
        for first in range(0, len(tile.jobs), self.side_by_side):
            jobs = tile.jobs[first : first + self.side_by_side]
            yield Began(tuple(job.job_id for job in jobs))
            for job in jobs:
                self._act(job)
            for job in jobs:
                catalog.commit(job.job_id, identity(job), {"merged.json": b"{}"}, {})
                yield JobResult(job.job_id, "committed", stages={"merge": self.job_s})
        yield TileDone(side_by_side=self.side_by_side)

    def _act(self, job: Job) -> None:
        time.sleep(self.job_s)
        acts = self.acts.get(job.pair, ())
        done = len(list(self.directory.glob(f"{job.subject.id}-{job.style.id}.*")))
        (self.directory / f"{job.subject.id}-{job.style.id}.{done}").touch()
        act = acts[min(done, len(acts) - 1)] if acts else "ok"
        if act in ("die", "hang"):
            time.sleep(0.5)  # Began is sent by another thread: ended at once, the process would take the word along
        match act:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                os.kill(os.getpid(), signal.SIGSTOP)


MEMORY = {"object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **MEMORY})
    try:
        cluster.add_node(num_cpus=1, **MEMORY)
        yield cluster
    finally:
        cluster.shutdown()


@dataclass(slots=True)
class Driven:
    jobs: list[Job]
    progress: Progress
    seen: list[events.Event]

    def attempts(self) -> dict[str, int]:
        return {job.pair: self.progress.attempts[job.job_id] for job in self.jobs}

    def failed(self) -> list[tuple[str, str]]:
        return [(e.job.pair, e.kind) for e in self.seen if isinstance(e, events.JobFailed) and e.counts]


def drive(cluster: Cluster, make: Quick, jobs: list[Job], limits: Limits | None = None, act: object = None) -> Driven:
    """Run `jobs` on two workers, and hold the end to what must hold after every run."""
    seen: list[events.Event] = []
    pool = RayPool(WorkerSettings("", "", None, device="cpu"), 2, cluster.address, make=make)

    def observe(event: events.Event) -> None:
        seen.append(event)
        if callable(act):
            act(pool, event)

    try:
        catalog = Catalog(make.directory / "catalog")
        progress = run(jobs, pool, catalog, run_id="test", limits=limits, observers=[observe])
    finally:
        pool.close()
    assert progress.left == 0
    assert catalog.committed() == {job.job_id for job in progress.committed}
    assert not ray.is_initialized()
    wait_until(
        lambda: not [p for p in psutil.process_iter(["cmdline"]) if "ray::_Actor" in " ".join(p.info["cmdline"] or ())]
    )
    return Driven(jobs, progress, seen)


def actors() -> list[int]:
    """Processes of workers on this test's nodes."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ray::_Actor" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def test_a_pair_that_ends_processes_or_stops_them_harms_nobody_else(cluster: Cluster, tmp_path: Path) -> None:
    make = Quick(tmp_path, {"subject1/style1": ["die"], "subject3/style2": ["hang", "ok"]}, side_by_side=2)
    done = drive(cluster, make, grid(4, 3), Limits(attempts=2, deadline_s=3))
    assert [job.pair for job, _ in done.progress.given_up] == ["subject1/style1"]
    assert done.failed().count(("subject1/style1", "WorkerLost")) == 2
    # the one that stopped had a neighbour, so its end did not count, and it did not stop again
    assert {pair for pair, _ in done.failed()} == {"subject1/style1"}
    assert done.attempts() == {job.pair: 2 if job.pair == "subject1/style1" else 1 for job in done.jobs}
    kinds = {event.kind for event in done.seen if isinstance(event, events.JobFailed) and not event.counts}
    assert kinds == {"WorkerLost", "DeadlineExceeded"}


def test_a_node_that_is_drained_gets_no_more_work_and_loses_none(cluster: Cluster, tmp_path: Path) -> None:
    told: list[str] = []

    def tell(pool: RayPool, event: events.Event) -> None:
        if not isinstance(event, events.JobCommitted) or told:
            return
        node_id = pool.processes[event.worker].node_id
        if node_id != cluster.head_node.node_id:
            told.append(event.worker)
            gcs = GcsClient(address=cluster.address)
            gcs.drain_node(node_id, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot notice", 0)

    done = drive(cluster, Quick(tmp_path, {}, job_s=0.5), grid(5, 5), act=tell)
    gone = [event for event in done.seen if isinstance(event, events.WorkerGone)]
    assert [(event.worker, event.returns) for event in gone] == [(told[0], True)]
    assert "drained" in gone[0].reason
    assert len(done.progress.committed) == 25
    assert not [event for event in done.seen if isinstance(event, events.JobFailed)]
    after = done.seen.index(gone[0])
    started = [event for event in done.seen[after:] if isinstance(event, events.TileStarted) and event.jobs]
    assert started
    assert told[0] not in {event.worker for event in started}


def test_workers_wait_for_nodes_where_there_is_none_yet_and_ask_for_them(tmp_path: Path) -> None:
    """A head that only coordinates, and an autoscaler that starts at 0 nodes: what it sees are the waiting actors."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **MEMORY})
    pool = None
    try:
        settings = WorkerSettings("", "", None, device="cuda")
        pool = RayPool(settings, 8, cluster.address, most=2, make=Quick(tmp_path, {}))
        assert pool.size == 2
        wait_until(lambda: demands(cluster.address) == {(("CPU", 1.0), ("GPU", 1.0)): 2})
        assert pool.wait(0) == []
        cluster.add_node(num_cpus=1, num_gpus=1, **MEMORY)
        (ready,) = heard(pool)
        assert isinstance(ready, Ready)
        wait_until(lambda: demands(cluster.address) == {(("CPU", 1.0), ("GPU", 1.0)): 1})
    finally:
        if pool is not None:
            pool.close()
        cluster.shutdown()


def demands(address: str) -> dict[tuple[tuple[str, float], ...], int]:
    """What an autoscaler is asked for: resources of one, and how often."""
    status = get_cluster_status(address)
    found = status.resource_demands.ray_task_actor_demand
    return {tuple(sorted(b.bundle.items())): b.count for demand in found for b in demand.bundles_by_count}


def heard(pool: RayPool, timeout_s: float = 120) -> Sequence[Report]:
    """The first that a pool has to say."""
    end = time.monotonic() + timeout_s
    while not (reports := pool.wait(1)):
        assert time.monotonic() < end, "nothing was heard"
    return reports


def test_a_crew_grows_with_the_work_asks_for_room_and_takes_the_request_back(cluster: Cluster, tmp_path: Path) -> None:
    pool = RayPool(
        WorkerSettings("", "", None, device="cpu"), address=cluster.address, make=Quick(tmp_path, {}), crew=Crew(1, 3)
    )
    try:
        assert pool.size == 1
        assert requested() == [{"CPU": 1}]
        pool.grow(50)
        assert pool.size == 3
        assert requested() == [{"CPU": 1}] * 3
        assert len(pool.shrink(2, [])) == 1
        assert requested() == [{"CPU": 1}] * 2
        pool.grow(1)  # what is there is not ended for want of work
        assert pool.size == 2
    finally:
        pool.close()
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        assert requested() == []
    finally:
        ray.shutdown()


def requested() -> list[dict[str, float]]:
    """What an autoscaler was told to have room for."""
    return json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or "[]")


@pytest.mark.parametrize("crew", [Crew(1, 1, labels={"zone": "b"}), Crew(1, 1, accelerator_type="T4")], ids=str)
def test_workers_run_only_where_they_were_told_to(cluster: Cluster, tmp_path: Path, crew: Crew) -> None:
    node = cluster.add_node(num_cpus=1, labels={"zone": "b"}, resources={"accelerator_type:T4": 1}, **MEMORY)
    pool = RayPool(
        WorkerSettings("", "", None, device="cpu"), address=cluster.address, make=Quick(tmp_path, {}), crew=crew
    )
    try:
        (ready,) = heard(pool)
        assert isinstance(ready, Ready)
        assert pool.processes[ready.worker].node_id == node.node_id
    finally:
        pool.close()
        cluster.remove_node(node)
