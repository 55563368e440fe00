"""`make bench-faults`: a grid of real pocket pairs on a real Ray of several nodes, while things go wrong on cue.

    python -m tests.bench.faults            every scenario; results/faults.json
    python -m tests.bench.faults NAME…      some

After each: every job is committed exactly once or given up with the right reason, attempts are as scripted, no actor
outlives its run, and what killed processes left half-written is found and taken by garbage collection. Needs about two
minutes and 2 GB per scenario; those of bench/cut_off.py need root and iproute2.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

from service import events
from tests.bench import cut_off, trainings
from tests.bench.record import figures_of, save
from tests.bench.stage import LIMITS, PATIENCE_S, Scene, check, driver, failures, found_by, log_of, stage
from tests.commands import wait_until

RESULT = Path(__file__).parent / "results" / "faults.json"


# What goes wrong. Each returns what was counted besides.


def kill_9(scene: Scene) -> dict[str, object]:
    """An actor's process is killed, three times."""

    def act() -> None:
        for share in (0.1, 0.3, 0.5):
            scene.committed(share)
            assert scene.pool is not None
            os.kill(scene.pool.processes[scene.busy_worker()].pid, signal.SIGKILL)

    scene.during(act)
    lost = scene.of(events.WorkerGone)
    assert len(lost) == 3, lost
    assert all(event.returns for event in lost)
    check(scene)
    return {"attempts that failed": len(failures(scene))}


def node_killed(scene: Scene) -> dict[str, object]:
    """A node vanishes with its worker; later another comes."""

    def remove() -> None:
        assert scene.cluster is not None
        scene.cluster.remove_node(scene.nodes.pop(), allow_graceful=False)

    scene.at = [(0.2, remove), (0.4, scene.add_node)]
    scene.drive()
    assert not scene.at
    check(scene)
    return {"workers lost": len(scene.of(events.WorkerGone)), "workers ready": len(scene.of(events.WorkerReady))}


def node_joins(scene: Scene) -> dict[str, object]:
    """A fourth worker was asked for and had no room; a node that joins in the middle gives it some."""
    scene.at = [(0.1, scene.add_node)]
    scene.script = replace(scene.script, pause_s=1.0)  # the run shall last longer than a node takes to start
    scene.drive(workers=4)
    check(scene)
    ready = scene.of(events.WorkerReady)
    assert len(ready) == 4, ready
    late = ready[-1].worker
    done = [event for event in scene.of(events.JobCommitted) if event.worker == late]
    assert done, "it was given nothing"
    assert not failures(scene)
    assert not scene.garbage
    return {"committed by the one that came late": len(done)}


def node_drained(scene: Scene) -> dict[str, object]:
    """A node is told to go: its worker gets nothing more, ends what it does, and is started again elsewhere."""

    def act() -> None:
        scene.committed(0.2)
        assert scene.pool is not None
        node_id = scene.pool.processes[scene.busy_worker()].node_id
        command = [Path(sys.executable).parent / "ray", "drain-node", "--address", scene.address]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice"]
        drain = [*command, "--node-id", node_id, *reason, "--deadline-remaining-seconds", "60"]
        subprocess.run(drain, check=True, capture_output=True)

    scene.during(act)
    gone = scene.of(events.WorkerGone)
    assert any("drained" in event.reason for event in gone), gone
    check(scene)
    assert not failures(scene), "a notice costs no attempt"
    assert not scene.garbage
    return {"workers told to leave": len(gone)}


def hang(scene: Scene) -> dict[str, object]:
    """Two merges never return: their workers are ended at the deadline."""
    pairs = [scene.jobs[7].pair, scene.jobs[40].pair]
    scene.script = replace(scene.script, acts={pair: ["hang", "ok"] for pair in pairs})
    scene.limits = replace(LIMITS, deadline_s=30.0)
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
    guilty = frozenset(job.job_id for job in scene.jobs if job.pair == pair)
    check(scene, given_up=guilty)
    assert {event.job.job_id for event in failures(scene)} == guilty
    assert len(failures(scene)) == 3 * len(guilty)
    returned = {event.job.pair for event in scene.of(events.JobFailed) if not event.counts}
    return {"attempts that failed": len(failures(scene)), "neighbours that came back and were committed": len(returned)}


def driver_killed(scene: Scene) -> dict[str, object]:
    """The driver is killed in the middle; its actors end with it; the same run again goes on from there."""
    process = driver(scene, "first")
    wait_until(lambda: len(scene.catalog.committed()) > 0.3 * len(scene.jobs), PATIENCE_S)
    process.kill()
    process.wait()
    wait_until(lambda: not scene.actors(), PATIENCE_S)
    before = frozenset(scene.catalog.committed())
    scene.drive(tuple(job for job in scene.jobs if job.job_id not in before))
    check(scene, before=before)
    return {"committed before the kill": len(before)}


def two_drivers(scene: Scene) -> dict[str, object]:
    """A second coordinator on the same catalog, by mistake: both end well."""
    processes = [driver(scene, name, workers=2) for name in ("first", "second")]
    codes = [process.wait(PATIENCE_S) for process in processes]
    assert codes == [0, 0], [log_of(scene, name)[-2000:] for name in ("first", "second")]
    both = [found_by(scene, name)[0] for name in ("first", "second")]
    own = [{e.job.job_id for e in seen if isinstance(e, events.JobCommitted) and not e.already} for seen in both]
    assert not own[0] & own[1], "committed twice"
    assert own[0] | own[1] == {job.job_id for job in scene.jobs}
    check(scene, before=frozenset(job.job_id for job in scene.jobs))
    return {"committed by each": [len(one) for one in own]}


def store_down(scene: Scene) -> dict[str, object]:
    """The S3 server is gone for 30 s, as nothing listens on its port: no attempt is lost."""
    down: list[float] = []

    def act() -> None:
        scene.committed(0.3)
        assert scene.store is not None
        scene.store.stop_proxy()
        down.append(time.monotonic())
        time.sleep(30)
        down.append(time.monotonic())
        scene.store.start_proxy()

    scene.during(act)
    check(scene)
    assert not failures(scene), "an outage costs no attempt"
    waited = {event.worker for event in scene.of(events.WorkerStalled)}
    assert waited, "nobody noticed"
    return {
        "seconds without the store": round(down[1] - down[0]),
        "workers that waited for it": len(waited),
        "attempts that failed": 0,
        "jobs that came back through no fault of theirs": len(scene.of(events.JobFailed)),
    }


Scenario = Callable[[Scene], dict[str, object]]
LOST = (kill_9, node_killed, node_joins, node_drained, hang, poison, driver_killed, two_drivers)
SCENARIOS: dict[str, tuple[Callable[[str], AbstractContextManager[Scene]], Scenario]] = {
    **{scenario.__name__: (stage, scenario) for scenario in LOST},
    "store_down": (partial(stage, with_store=True), store_down),
    "training_killed": (partial(stage, nodes=0, write=trainings.manifest), trainings.training_killed),
    **{scenario.__name__: (cut_off.machines, scenario) for scenario in cut_off.SCENARIOS},
}


def main() -> None:
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_agent_register_timeout_ms", "600000")
    for name in sys.argv[1:] or SCENARIOS:
        began = time.monotonic()
        make, scenario = SCENARIOS[name]
        with make(name) as scene:
            ready_s = time.monotonic() - began
            found = scenario(scene)
            jobs = len(scene.jobs)
        figures = {
            "jobs": jobs,
            **found,
            "abandoned attempts and half-written files, for gc": scene.garbage,
            "seconds": round(time.monotonic() - began),
            "of them to start Ray": round(ready_s),
        }
        results = figures_of(RESULT)
        save(RESULT, {**results, name: figures})
        print(name, json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
