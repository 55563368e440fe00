"""`make bench-cut-off`: real `ray start` processes in network namespaces of their own, one of them cut off in mid-run.

Needs root. The machine that is cut off goes on computing and can still write to the catalog, which lies on a disk that
all share: the worst case for "committed exactly once". Result: results/cut_off.json.
"""

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from service.catalog import Catalog
from service.manifest import read_manifest
from service.messages import WorkerSettings
from service.plan import plan
from tests.bench.faults import manifest
from tests.bench.scripted_worker import Script
from tests.commands import wait_until
from tests.swift_node import end_with_parent

RESULT = Path(__file__).parent / "results" / "cut_off.json"
BRIDGE, NET, PORT = "zipbr", "10.214.77", 6399
NODES = 3  # the first is the head, with the driver and no worker


def ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True)


@contextmanager
def namespaces() -> Iterator[None]:
    """zip0 … with the addresses NET.1 …, on one bridge."""
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("link", "set", BRIDGE, "up")
        for i in range(NODES):
            ip("netns", "add", f"zip{i}")
            ip("link", "add", f"zipv{i}", "type", "veth", "peer", "name", "eth0", "netns", f"zip{i}")
            ip("link", "set", f"zipv{i}", "master", BRIDGE, "up")
            ip("-n", f"zip{i}", "addr", "add", f"{NET}.{i + 1}/24", "dev", "eth0")
            ip("-n", f"zip{i}", "link", "set", "eth0", "up")
            ip("-n", f"zip{i}", "link", "set", "lo", "up")
        yield
    finally:
        for i in range(NODES):
            subprocess.run(["ip", "netns", "del", f"zip{i}"], capture_output=True)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)


def inside(i: int, command: list[object], log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as out:
        return subprocess.Popen(
            ["ip", "netns", "exec", f"zip{i}", *map(str, command)],
            env=environment,
            stdout=out,
            stderr=out,
            preexec_fn=end_with_parent,
        )


def start_ray(i: int, root: Path, temporary: str) -> subprocess.Popen[bytes]:
    ray = Path(sys.executable).parent / "ray"
    common = [
        f"--node-ip-address={NET}.{i + 1}",
        "--block",
        "--disable-usage-stats",
        f"--object-store-memory={80 << 20}",
    ]
    if i == 0:
        own: list[object] = [
            "--head",
            f"--port={PORT}",
            "--num-cpus=0",
            "--include-dashboard=false",
            f"--temp-dir={temporary}",
        ]
    else:
        own = [f"--address={NET}.1:{PORT}", "--num-cpus=1"]
    return inside(i, [ray, "start", *own, *common], root / f"ray{i}.log")


def runs(root: Path, i: int) -> bool:
    return "Ray runtime started" in (root / f"ray{i}.log").read_text()


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Each with all that it started."""
    family = [child for one in processes if one.poll() is None for child in psutil.Process(one.pid).children(True)]
    for one in (*family, *processes):
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, 20)


def main() -> None:
    began = time.monotonic()
    processes: list[subprocess.Popen[bytes]] = []
    with (
        tempfile.TemporaryDirectory(prefix="cut-") as directory,
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temporary,
        namespaces(),
    ):
        root = Path(directory)
        planned = plan(read_manifest(manifest(root)))
        planned.check()
        assert planned.base is not None
        location, digest = planned.base.ref.location, planned.base.ref.digest
        settings = WorkerSettings(
            str(root / "catalog"), location, None, digest, device="cpu", cache_dir=str(root / "cache")
        )
        jobs = planned.jobs
        try:
            processes.append(start_ray(0, root, temporary))
            wait_until(lambda: runs(root, 0))
            processes += [start_ray(i, root, temporary) for i in range(1, NODES)]
            wait_until(lambda: all(runs(root, i) for i in range(NODES)))
            order = (f"{NET}.1:{PORT}", jobs, settings, Script({}, root / "counts", pause_s=0.25), NODES - 1)
            (root / "run.order").write_bytes(pickle.dumps(order))
            command = [sys.executable, "-m", "tests.bench.faults", "--drive", root / "run"]
            driver = inside(0, command, root / "driver.log")
            processes.append(driver)
            catalog = Catalog(settings.catalog)
            wait_until(lambda: driver.poll() is not None or len(catalog.committed()) > 0.3 * len(jobs))
            at = len(catalog.committed())
            ip("link", "set", f"zipv{NODES - 1}", "down")
            cut = time.monotonic()
            code = driver.wait(240)
            assert code == 0, (root / "driver.log").read_text()[-3000:]
            found = pickle.loads((root / "run.pickle").read_bytes())
            after = time.monotonic() - cut
        finally:
            end(processes)
        assert catalog.committed() == {job.job_id for job in jobs}
        reported = Counter(job_id for job_id, _ in found["committed"])
        assert set(reported.values()) == {1}
        attempts = Counter(path.name for path in (root / "catalog/pairs").iterdir() for _ in path.iterdir())
        figures = {
            "jobs": len(jobs),
            "nodes": NODES - 1,
            "committed when the node was cut off": at,
            "seconds from the cut to the end": round(after),
            "workers lost": found["lost"],
            "attempts that failed": found["failed"],
            "found committed by the one that was cut off": sum(already for _, already in found["committed"]),
            "jobs with objects of more than one attempt": sum(n > 1 for n in attempts.values()),
            "seconds": round(time.monotonic() - began),
        }
    RESULT.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
