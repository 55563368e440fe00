"""Scenarios of bench/faults.py with real `ray start` processes, each in a network namespace of its own as on a machine
of its own, one of which is cut off in mid-run. Need root and iproute2.

The machine that is cut off goes on computing and can still write to the catalog, which lies on a disk that all share:
the worst case for "committed exactly once".
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from service import events
from tests.bench.stage import PATIENCE_S, Scene, check, driver, failures, found_by, log_of, scene_in
from tests.commands import wait_until
from tests.ray_head import TOKEN
from tests.swift_node import end_with_parent

TAG = f"z{os.getpid() % 100_000}"  # names of links have at most 15 characters
BRIDGE, NET, PORT = f"{TAG}br", "10.214.77", 6399
NODES = 3  # the first is the head, with the driver and no worker


def ip(*words: object) -> str:
    return subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, text=True).stdout


@contextmanager
def namespaces() -> Iterator[None]:
    """TAG-0 … with the addresses NET.1 …, on one bridge. All that runs in them ends with them."""
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("link", "set", BRIDGE, "up")
        for i in range(NODES):
            ip("netns", "add", f"{TAG}-{i}")
            ip("link", "add", link(i), "type", "veth", "peer", "name", "eth0", "netns", f"{TAG}-{i}")
            ip("link", "set", link(i), "master", BRIDGE, "up")
            ip("-n", f"{TAG}-{i}", "addr", "add", f"{NET}.{i + 1}/24", "dev", "eth0")
            ip("-n", f"{TAG}-{i}", "link", "set", "eth0", "up")
            ip("-n", f"{TAG}-{i}", "link", "set", "lo", "up")
        yield
    finally:
        there = [process for i in range(NODES) for process in processes_in(i)]
        for process in there:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(there, 20)
        for i in range(NODES):
            subprocess.run(["ip", "netns", "del", f"{TAG}-{i}"], capture_output=True)
            subprocess.run(["ip", "link", "del", link(i)], capture_output=True)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)


def link(i: int) -> str:
    """The bridge's end of a namespace's cable."""
    return f"{TAG}v{i}"


def processes_in(i: int) -> list[psutil.Process]:
    found = []
    listed = subprocess.run(["ip", "netns", "pids", f"{TAG}-{i}"], capture_output=True, text=True).stdout
    for pid in map(int, listed.split()):
        with suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    return found


def actors_in(*nodes: int) -> list[int]:
    """Workers, also those whose node's Ray has ended."""
    found = []
    for process in (process for i in nodes for process in processes_in(i)):
        with suppress(psutil.NoSuchProcess):
            if "ray::_Actor" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def inside(scene: Scene, i: int) -> tuple[str, ...]:
    """Words before a command that run it in namespace i, with a directory for Ray that no other machine sees."""
    own = scene.root / f"ray{i}"
    own.mkdir(exist_ok=True)
    mount = 'mount --bind "$0" "$1" && shift && exec "$@"'  # `ip netns exec` gives it mounts of its own
    return "ip", "netns", "exec", f"{TAG}-{i}", "sh", "-c", mount, str(own), str(temporary(scene))


def temporary(scene: Scene) -> Path:
    """Where Ray's sockets lie on every machine: their paths may have 107 bytes."""
    return Path(tempfile.gettempdir()) / f"{TAG}{scene.root.name[-4:]}"


def start_ray(scene: Scene, i: int) -> None:
    common = [
        f"--node-ip-address={NET}.{i + 1}",
        "--block",
        "--disable-usage-stats",
        "--include-log-monitor=false",
        "--object-store-memory=83886080",
    ]
    head = [
        "--head",
        f"--port={PORT}",
        "--num-cpus=0",
        "--include-dashboard=false",
        "--no-monitor",
        f"--temp-dir={temporary(scene)}",
    ]
    own = [f"--address={scene.address}", "--num-cpus=1"] if i else head
    command = [*inside(scene, i), str(Path(sys.executable).parent / "ray"), "start", *own, *common]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (scene.root / f"node{i}.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, preexec_fn=end_with_parent)
    wait_until(lambda: process.poll() is not None or runs(scene, i), PATIENCE_S)
    assert runs(scene, i), log_of(scene, f"node{i}")[-3000:]


def runs(scene: Scene, i: int) -> bool:
    return "Ray runtime started" in log_of(scene, f"node{i}")


@contextmanager
def machines(name: str) -> Iterator[Scene]:
    """As many machines as NODES, a worker on each but the head's."""
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as directory, namespaces():
        scene = scene_in(Path(directory))
        scene.address, scene.actors = f"{NET}.1:{PORT}", lambda: actors_in(*range(NODES))
        temporary(scene).mkdir()
        (scene.root / "token").write_text(TOKEN)
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(scene.root / "token"))
        try:
            for i in range(NODES):
                start_ray(scene, i)
            yield scene
        finally:
            shutil.rmtree(temporary(scene), ignore_errors=True)  # no more than a place to mount on


# What goes wrong


def cut_off(scene: Scene) -> dict[str, object]:
    """A machine's cable is pulled and stays so: its Ray gives up after a while, and its worker with it."""
    return _cut(scene)


def cut_off_and_healed(scene: Scene) -> dict[str, object]:
    """It is put back after the run has given the machine up."""
    return _cut(scene, lambda seconds: "WorkerGone" in log_of(scene, "driver"))


def cut_off_briefly(scene: Scene) -> dict[str, object]:
    """It is put back after eight seconds, before anybody gave up: nothing is lost."""
    figures = _cut(scene, lambda seconds: seconds > 8)
    assert figures["workers lost"] == 0, figures
    return figures


SCENARIOS = (cut_off, cut_off_and_healed, cut_off_briefly)


def _cut(scene: Scene, to_heal: Callable[[float], bool] | None = None) -> dict[str, object]:
    """`to_heal` takes the seconds since the cut."""
    process = driver(scene, "driver", NODES - 1, inside(scene, 0))
    last, healed = NODES - 1, None
    try:
        wait_until(
            lambda: process.poll() is not None or len(scene.catalog.committed()) > 0.3 * len(scene.jobs), PATIENCE_S
        )
        assert process.poll() is None, log_of(scene, "driver")[-3000:]
        at = len(scene.catalog.committed())
        ip("link", "set", link(last), "down")
        cut = time.monotonic()
        if to_heal is not None:
            wait_until(lambda: process.poll() is not None or to_heal(time.monotonic() - cut), PATIENCE_S)
            assert process.poll() is None, "the run ended before the cut was healed"
            ip("link", "set", link(last), "up")
            healed = time.monotonic() - cut
        assert process.wait(PATIENCE_S) == 0, log_of(scene, "driver")[-3000:]
    finally:
        process.kill()
        process.wait()
    ended = time.monotonic() - cut
    scene.seen, scene.progress = found_by(scene, "driver")
    check(scene)
    gone = scene.of(events.WorkerGone)
    return {
        "machines with a worker": NODES - 1,
        "committed when the machine was cut off": at,
        "seconds from the cut to its healing": healed and round(healed),
        "seconds from the cut to the end of the run": round(ended),
        "seconds from the cut until no actor was left": round(time.monotonic() - cut),
        "workers lost": len(gone),
        "attempts that failed": [f"{event.kind}: {event.reason}" for event in failures(scene)],
        "committed by the machine that was cut off, and found": sum(e.already for e in scene.of(events.JobCommitted)),
    }
