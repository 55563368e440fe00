"""A real Ray head with token authentication, as `ray start` makes it, on ports of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.swift_node import end_with_parent, reserve_ports

TOKEN = "0123456789abcdef" * 4
BIN = Path(sys.executable).parent


@dataclass(frozen=True, slots=True)
class Head:
    port: int  # of the GCS; the dashboard's follows it
    log: Path
    pid: int

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.port + 1}"


@contextlib.contextmanager
def ray_head(directory: Path, environment: Mapping[str, str], cpus: int = 2) -> Iterator[Head]:
    """Ended by its pid, since `ray stop` ends every Ray of the machine."""
    port, lock = reserve_ports(5)
    token = directory / "token"
    token.write_text(TOKEN)
    # sockets lie below it, and their paths may have 107 bytes
    with lock, tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temporary:
        options = {
            "port": port,
            "dashboard-host": "127.0.0.1",
            "dashboard-port": port + 1,
            "dashboard-agent-listen-port": port + 2,
            "dashboard-agent-grpc-port": port + 3,
            "ray-client-server-port": port + 4,
            "num-cpus": cpus,
            "num-gpus": 0,
            "object-store-memory": 80 * 2**20,
            "temp-dir": temporary,
        }
        command = [BIN / "ray", "start", "--head", "--block", "--disable-usage-stats"]
        log = directory / "head.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                [*command, *(f"--{name}={value}" for name, value in options.items())],
                env={
                    **environment,
                    "RAY_AUTH_MODE": "token",
                    "RAY_AUTH_TOKEN_PATH": str(token),
                    "RAY_worker_niceness": "0",  # Ray's own 15 starves its workers on a busy machine
                    "OMP_NUM_THREADS": "1",
                    "HF_HUB_OFFLINE": "1",
                    "PATH": f"{BIN}{os.pathsep}{environment['PATH']}",
                },
                stdout=out,
                stderr=out,
                preexec_fn=end_with_parent,
            )
        head = Head(port, log, process.pid)
        try:
            _wait_until_it_answers(head, process)
            yield head
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_it_answers(head: Head, process: subprocess.Popen, limit_s: float = 120) -> None:
    end = time.monotonic() + limit_s
    request = urllib.request.Request(f"{head.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
    while True:
        with contextlib.suppress(OSError, urllib.error.URLError), urllib.request.urlopen(request, timeout=2):
            return
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"Ray does not start:\n{head.log.read_text()[-3000:]}")
        time.sleep(0.3)
