"""A one-node OpenStack Swift with its S3 API on loopback: a real S3 server from PyPI alone, for tests and experiments.

    python tests/swift_node.py            # installs on first use, prints endpoint and credentials, runs until Ctrl-C
    python tests/swift_node.py --install  # only the virtual environment

Four processes (five with TLS), ready in a second or two, 245 MB. Standard library only. The directory's file system
needs extended attributes.
"""

import contextlib
import ctypes
import fcntl
import getpass
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

SWIFT = "swift==2.38.3"
VENV = Path(__file__).resolve().parent.parent / ".venv-swift"
ACCESS_KEY, SECRET_KEY, REGION = "test:tester", "testing", "us-east-1"

BACKENDS = ("container", "account", "object")  # at the three ports after the proxy's
RINGS = f"""
import sys
from swift.common.ring import RingBuilder
for offset, kind in enumerate({BACKENDS}, start=1):
    builder = RingBuilder(4, 1, 1)  # 2**4 partitions, one replica
    builder.add_dev(dict(region=1, zone=1, ip="127.0.0.1", port=int(sys.argv[2]) + offset, device="d1", weight=1))
    builder.rebalance()
    builder.get_ring().save(sys.argv[1] + "/" + kind + ".ring.gz")
"""
SELF_SIGNED = shlex.split(
    "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=127.0.0.1 "
    "-addext subjectAltName=IP:127.0.0.1"
)
FILTERS = {  # in the order of the pipeline
    "catch_errors": "",
    "gatekeeper": "",
    "healthcheck": "",
    "listing_formats": "",
    "bulk": "",
    "s3api": f"location = {REGION}\ndns_compliant_bucket_names = true\nmin_segment_size = 5242880\n"
    "s3_acl = false\ncheck_bucket_owner = false\nmax_bucket_listing = 20\n",  # listings of tests have several pages
    "tempauth": "user_test_tester = testing .admin\n",
    "slo": "",
    "dlo": "",
    "versioned_writes": "allow_object_versioning = true\n",
    "symlink": "",
}


def install(venv: Path = VENV) -> Path:
    """The virtual environment that holds Swift, made on first use; safe for several processes at once."""
    with (Path(tempfile.gettempdir()) / f"{venv.name}-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (venv / "bin" / "swift-proxy-server").exists():
            subprocess.run([sys.executable, "-m", "venv", venv], check=True)
            subprocess.run([venv / "bin" / "pip", "install", "--quiet", SWIFT], check=True)
    return venv


class SwiftNode:
    """Running servers; `environment` holds what an S3 client needs, under the standard AWS names."""

    def __init__(self, directory: Path, venv: Path) -> None:
        self.directory, self.venv = directory, venv
        self.port, self._lock = reserve_ports(5)  # proxy, container, account, object, TLS proxy
        self.processes: list[subprocess.Popen] = []
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.environment = {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_CONFIG_FILE": os.devnull,  # whatever this account has configured is not for this server
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def start(self) -> None:
        etc = self.directory / "etc"
        etc.mkdir(parents=True)
        (self.directory / "srv" / "d1").mkdir(parents=True)
        (etc / "swift.conf").write_text(
            "[swift-hash]\nswift_hash_path_suffix = test\nswift_hash_path_prefix = test\n"
            "[storage-policy:0]\nname = default\ndefault = yes\n"
        )
        subprocess.run([self.venv / "bin" / "python", "-c", RINGS, etc, str(self.port)], check=True)
        for offset, kind in enumerate(BACKENDS, start=1):
            self._write_backend(etc, kind, self.port + offset)
            self._start(f"{kind}-server", etc / f"{kind}-server.conf")
        self._write_proxy(etc / "proxy-server.conf", self.port)
        self.start_proxy()
        for offset in range(1, 4):
            self._wait_until_open(self.port + offset)

    def start_proxy(self) -> None:
        self._start("proxy-server", self.directory / "etc" / "proxy-server.conf")
        self.proxy = self.processes[-1]
        self._wait_until_open(self.port)

    def stop_proxy(self) -> None:
        """Nothing answers at the endpoint until `start_proxy`; what is stored stays."""
        self.processes.remove(self.proxy)
        self.proxy.kill()  # told to end, it would first serve the connections that it has
        self.proxy.wait()

    def start_tls(self) -> tuple[str, Path]:
        """(https endpoint, certificate to trust): a second proxy over the same objects."""
        certificate, key, port = self.directory / "cert.pem", self.directory / "key.pem", self.port + 4
        subprocess.run(
            [*SELF_SIGNED, "-keyout", key, "-out", certificate],
            check=True,
            capture_output=True,
        )
        config = self.directory / "etc" / "proxy-tls.conf"
        self._write_proxy(config, port, f"cert_file = {certificate}\nkey_file = {key}\n")
        self._start("proxy-server", config)
        self._wait_until_open(port)
        return f"https://127.0.0.1:{port}", certificate

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._lock.close()

    def _start(self, server: str, config: Path) -> None:
        log = (self.directory / f"{config.stem}.log").open("w")
        command = [self.venv / "bin" / f"swift-{server}", config, "--verbose"]
        self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=end_with_parent))

    def _common(self, port: int) -> str:
        etc = self.directory / "etc"
        return (
            f"[DEFAULT]\nbind_ip = 127.0.0.1\nbind_port = {port}\nworkers = 0\nuser = {getpass.getuser()}\n"
            f"swift_dir = {etc}\nlog_address = /dev/null\n"
        )

    def _write_backend(self, etc: Path, kind: str, port: int) -> None:
        (etc / f"{kind}-server.conf").write_text(
            f"{self._common(port)}devices = {self.directory}/srv\nmount_check = false\nfallocate_reserve = 0\n"
            f"[pipeline:main]\npipeline = {kind}-server\n[app:{kind}-server]\nuse = egg:swift#{kind}\n"
        )

    def _write_proxy(self, path: Path, port: int, tls: str = "") -> None:
        filters = "".join(f"[filter:{name}]\nuse = egg:swift#{name}\n{options}" for name, options in FILTERS.items())
        path.write_text(
            f"{self._common(port)}{tls}[pipeline:main]\npipeline = {' '.join(FILTERS)} proxy-server\n"
            "[app:proxy-server]\nuse = egg:swift#proxy\nallow_account_management = true\naccount_autocreate = true\n"
            f"{filters}"
        )

    def _wait_until_open(self, port: int, limit_s: float = 60) -> None:
        deadline = time.monotonic() + limit_s
        while True:
            try:
                return socket.create_connection(("127.0.0.1", port), timeout=1).close()
            except OSError:
                ended = [process.args for process in self.processes if process.poll() is not None]
                if ended or time.monotonic() > deadline:
                    logs = "\n".join(log.read_text()[-2000:] for log in self.directory.glob("*.log"))
                    raise RuntimeError(f"port {port} does not open; ended: {ended}\n{logs}") from None
            time.sleep(0.02)


def reserve_ports(n: int) -> tuple[int, TextIO]:
    """The first of `n` neighbouring free ports, and a file whose lock keeps other nodes away while it is open."""
    for first in range(20080, 32000, 10):  # Ray's workers take ports below 20000
        lock = (Path(tempfile.gettempdir()) / f"swift-node-{os.getuid()}-{first}.lock").open("w")
        with contextlib.ExitStack() as sockets:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for port in range(first, first + n):
                    sockets.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                lock.close()
                continue
            return first, lock
    raise RuntimeError("no free ports between 20080 and 32000")


def end_with_parent() -> None:
    """In the child: be terminated when the parent dies, even by SIGKILL (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def swift_node(directory: Path) -> Iterator[SwiftNode]:
    node = SwiftNode(directory, install())
    try:
        node.start()
        yield node
    finally:
        node.stop()


def main() -> None:
    install()
    if "--install" in sys.argv:
        return
    with tempfile.TemporaryDirectory(prefix="swift-") as directory, swift_node(Path(directory)) as node:
        print("\n".join(f"export {name}={value}" for name, value in node.environment.items()), flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    main()
