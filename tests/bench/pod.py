"""Pods as Linux makes them: network, mount and process namespaces, an address on a bridge, volumes, the rendered user,
no capabilities. Needs root, ip, unshare, nsenter and setpriv. Not made: cgroups (so no limit of CPU and memory is
enforced), seccomp, a root file system of its own (the pod sees this machine's, with /tmp and /root hidden)."""

import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = Path(sys.executable).parent
HOST = "10.77.0.1"  # this side of the bridge
# The pods of a whole cluster share this machine: Ray waits longer than its usual 30, 30 and 10 seconds
PATIENCE = {
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_health_check_timeout_ms": "60000",
}
REACHED = sorted({sys.base_prefix, sys.prefix, str(ROOT)})  # the image's content, wherever it lies here


class Container:
    """A process that is number 1 of a process namespace, as in a container; `pid` is its number outside."""

    def __init__(self, outer: subprocess.Popen) -> None:
        self.outer = outer
        wait_for(lambda: bool(self._inner()) or outer.poll() is not None, "a container's process", 60)
        self.pid = self._inner()[0].pid if self._inner() else 0

    def _inner(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.outer.pid).children()
        return []

    def command(self) -> str:
        """As `ps` has it, without this machine's places."""
        places = re.escape(str(BIN))
        return re.sub(rf"({places}/python\S* )?{places}/", "", " ".join(psutil.Process(self.pid).cmdline()))

    def send(self, number: signal.Signals) -> None:
        if self.outer.poll() is None:
            os.kill(self.pid, number)

    def ended(self) -> bool:
        return self.outer.poll() is not None

    def wait(self, timeout_s: float | None = None) -> int:
        return self.outer.wait(timeout_s)


class Pod:
    """Namespaces held by a process; `run` starts a container's command in them."""

    def __init__(
        self,
        name: str,
        number: int,
        spec: Mapping[str, Any],
        directory: Path,
        hosts: Mapping[str, str],
        config_maps: Mapping[str, Mapping[str, str]],
    ) -> None:
        self.name, self.address, self.spec = name, f"10.77.0.{number}", spec
        self.directory = directory / name
        self.directory.mkdir()
        self.log = self.directory / "stdout.log"
        self.containers: list[Container] = []
        known = {"localhost": "127.0.0.1", name: self.address, **hosts}
        (self.directory / "hosts").write_text("".join(f"{ip} {host}\n" for host, ip in known.items()))
        script = "\n".join([*self._setup(config_maps), "echo ready", "exec sleep infinity"])
        self.holder = subprocess.Popen(
            ["unshare", "-n", "-m", "-u", "bash", "-ec", script], stdout=subprocess.PIPE, preexec_fn=killed_with_parent
        )
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == b"ready\n"
        command(f"ip link add v{number} type veth peer name p{number}")
        command(f"ip link set v{number} master br0 up")
        command(f"ip link set p{number} netns {self.holder.pid} name eth0")
        enter = f"nsenter -t {self.holder.pid} -n"
        command(f"{enter} ip addr add {self.address}/24 dev eth0")
        command(f"{enter} ip link set eth0 up")
        command(f"{enter} ip route add default via {HOST}")  # which goes nowhere; Ray looks for its address by it

    def _setup(self, config_maps: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
        yield f"mount --make-rprivate /; ip link set lo up; hostname {self.name}"
        yield f"mount --bind {self.directory}/hosts /etc/hosts"
        # an address where nobody answers at once is asked for what is not in hosts, such as IPv6
        (self.directory / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        yield f"mount --bind {self.directory}/resolv.conf /etc/resolv.conf"
        volumes = {volume["name"]: volume for volume in self.spec.get("volumes", [])}
        late = []  # what lies below /tmp must be bound before that is hidden, what is in memory after
        for mount in self.spec["containers"][0].get("volumeMounts", []):
            volume = volumes[mount["name"]]
            empty = volume.get("emptyDir")
            if empty is not None and empty.get("medium") == "Memory":
                size = empty["sizeLimit"].removesuffix("i")
                late.append(f"mount -t tmpfs -o mode=1777,size={size} tmpfs {mount['mountPath']}")
                continue
            source = self.directory / f"volume-{mount['name']}"
            source.mkdir()
            if empty is None:
                for file, text in config_maps[volume["configMap"]["name"]].items():
                    (source / file).write_text(text)
            os.chown(source, 0, self.spec["securityContext"]["fsGroup"])
            source.chmod(0o2775)
            yield f"mount --bind {source} {mount['mountPath']}"
        yield "mount -t tmpfs tmpfs /mnt"
        for number, path in enumerate(REACHED):
            yield f"mkdir /mnt/{number}; mount --bind {path} /mnt/{number}"
        yield "mount -t tmpfs -o mode=1777 tmpfs /tmp; mount -t tmpfs -o mode=755 tmpfs /root"
        for number, path in enumerate(REACHED):
            yield f"mkdir -p {path}; mount --move /mnt/{number} {path}"
        yield "umount /mnt"
        yield from late

    def run(self, words: list[str], environment: Mapping[str, str]) -> Container:
        user = self.spec["securityContext"]
        own = self.spec["containers"][0]["securityContext"]
        assert own == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        enter = ["nsenter", "-t", str(self.holder.pid), "-n", "-m", "-u", "--wd=/tmp"]
        first = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        ids = [f"--reuid={user['runAsUser']}", f"--regid={user['runAsGroup']}", f"--groups={user['fsGroup']}"]
        drop = ["setpriv", *ids, "--no-new-privs", "--bounding-set=-all"]
        image = {"PATH": f"{BIN}:/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [*enter, *first, *drop, *words],
            env={**image, **image_environment(), **PATIENCE, **environment},
            stdout=self.log.open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,  # as a container's process 1 is the leader of one
            preexec_fn=killed_with_parent,
        )
        self.containers.append(Container(process))
        return self.containers[-1]

    def keep_logs(self) -> None:
        """Ray's own, out of a /tmp that goes with the pod."""
        for session in Path(f"/proc/{self.holder.pid}/root/tmp/ray").glob("session_2*/logs"):
            shutil.copytree(session, self.directory / "ray-logs", symlinks=True, dirs_exist_ok=True)

    def kill(self) -> None:
        """As a node that vanishes: everything at once."""
        for container in self.containers:
            container.send(signal.SIGKILL)
            container.wait()
        self.holder.kill()
        self.holder.wait()


def image_environment() -> dict[str, str]:
    """ENV of the Dockerfile."""
    text = (ROOT / "deploy/Dockerfile").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^ENV (.+)$", text, re.MULTILINE)
    return dict(one.split("=", 1) for one in line.split())


def killed_with_parent() -> None:
    """In the child: SIGKILL when the parent dies; unshare does not listen to SIGTERM while its child lives."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def command(line: str) -> None:
    subprocess.run(line.split(), check=True)


def make_bridge() -> None:
    command("ip link set lo up")
    command("ip link add br0 type bridge")
    command(f"ip addr add {HOST}/24 dev br0")
    command("ip link set br0 up")


@contextlib.contextmanager
def mount_points(*paths: str) -> Iterator[None]:
    """As the image and the kubelet make them."""
    made = [Path(path) for path in paths if not Path(path).exists()]
    for path in made:
        path.mkdir()
    try:
        yield
    finally:
        for path in made:
            path.rmdir()


def get(url: str, token: str | None = None) -> bytes:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
        return answer.read()


def answers(url: str) -> bool:
    with contextlib.suppress(OSError):
        return bool(get(url) is not None)
    return False


def wait_for(condition: Callable[[], bool], what: str, limit_s: float = 900) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come within {limit_s:.0f} s")
        time.sleep(0.5)


def forwarded(port: int, target: int) -> None:
    """TCP from the bridge to the loopback, where the S3 server listens."""
    listener = socket.create_server((HOST, port), backlog=128)

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(65536):
                sink.sendall(chunk)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def accept() -> None:
        while True:
            client, _ = listener.accept()
            try:
                server = socket.create_connection(("127.0.0.1", target))
            except OSError:
                client.close()  # as a server that is gone
                continue
            for ends in ((client, server), (server, client)):
                threading.Thread(target=pump, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
