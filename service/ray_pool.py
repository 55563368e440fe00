"""Workers as Ray actors: a Ray of our own on this machine by default, a cluster by its address.

One call at a time per actor, watched with `ray.wait`, instead of Ray's own queues and retries: when an actor dies,
the calls queued behind the running one fail with it, `ActorPool` does not replace dead actors, and a task that Ray
retries by itself would not look for the entry first. Actors restart by themselves (`max_restarts=-1`); what they
were doing is the control loop's to decide.
"""

import logging
import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from service.errors import BadInput, DeadlineExceeded, OutOfMemory, ServiceError, WorkerLost
from service.jobs import Job, from_json, to_json
from service.pool import Done, Lost, Ready, Report
from service.worker import JobResult, Worker, WorkerSettings

MAX_LOAD_FAILURES = 3  # in a row, of one worker, before its place stays empty
LOAD_DEADLINE_S = 1800.0  # for a base over a slow network
PATIENCE_S = 1800.0  # for Ray to restart an actor: after a node was lost, until its capacity is back
PING_S = (0.5, 15.0)  # between looks at an actor that is restarting: at first, at most


@dataclass(frozen=True, slots=True)
class Process:
    """A process of some node; `started` (clock ticks since its boot) tells it from a later one with the same pid."""

    node_id: str
    pid: int
    started: str


def this_process() -> Process:
    return Process(ray.get_runtime_context().get_node_id(), os.getpid(), start_of(os.getpid()) or "")


def start_of(pid: int) -> str | None:
    """Field 22 of /proc/<pid>/stat, None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def end(process: Process) -> None:
    """To be run on its own node: SIGKILL, which also ends what does not listen to `ray.kill`."""
    if start_of(process.pid) == process.started:
        os.kill(process.pid, signal.SIGKILL)


class NoCluster(ServiceError):
    exit_code = 2


class _Actor:
    """The process side. Loading is a call of its own, so that an error in it has a message and no restart loop."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.worker: Worker | None = None

    def load(self) -> tuple[str, float, "Process"]:
        self.worker = Worker(self.settings)
        return self.worker.device, self.worker.load_s, this_process()

    def run(self, job: str) -> JobResult:
        if self.worker is None:  # restarted behind our back
            self.load()
        assert self.worker is not None
        result = self.worker.run(from_json(job))
        if not self.worker.is_sound():
            os._exit(1)  # Ray starts a fresh process; the job comes back as lost and is tried again
        return result

    def ping(self) -> None:
        pass


@dataclass(slots=True)
class _Call:
    """What an actor is doing: a job, loading its base (job None), or answering whether it is back (`ping`)."""

    ref: Any
    job: Job | None
    deadline: float  # on the monotonic clock
    ping: bool = False


@dataclass(slots=True)
class _Absence:
    """A worker whose actor Ray is restarting. Calls to it fail at once until it is back, so we look again and again."""

    since: float
    next_look: float
    interval_s: float = PING_S[0]


class RayPool:
    """`size` actors on `address` (None: a Ray started here and ended by `close`), each with one GPU if the cluster
    has any."""

    def __init__(
        self,
        settings: WorkerSettings,
        size: int | None = None,
        address: str | None = None,
        cpus_per_worker: int = 1,
        most: int | None = None,
    ) -> None:
        self._settings = settings
        self._own = connect(address, cpus=max(os.cpu_count() or 1, (size or 1) * cpus_per_worker))
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if settings.device == "cpu":
            gpus = 0
        size = min(size or gpus or 1, most or 2**31)
        if not self._fits(cpus_per_worker):
            raise BadInput(f"no node has {cpus_per_worker} CPUs: take fewer --threads")
        on_gpu = bool(gpus) or settings.device.startswith("cuda")
        options = {
            "num_cpus": cpus_per_worker,
            "num_gpus": 1 if on_gpu else 0,
            "max_restarts": -1,
            "max_task_retries": 0,
        }
        self._actor_class = ray.remote(**options)(_Actor)
        self._actors: dict[str, Any] = {}
        self._calls: dict[str, _Call] = {}
        self._absent: dict[str, _Absence] = {}
        self._load_failures: dict[str, int] = {}
        self.processes: dict[str, Process] = {}
        for number in range(size):
            self._add(f"worker-{number}")

    @staticmethod
    def _fits(cpus: float) -> bool:
        return any(node["Resources"].get("CPU", 0) >= cpus for node in ray.nodes() if node["Alive"])

    @property
    def size(self) -> int:
        return len(self._actors)

    def idle(self) -> Sequence[str]:
        return [worker for worker in self._actors if worker not in self._calls and worker not in self._absent]

    def start(self, worker: str, job: Job, deadline_s: float) -> None:
        ref = self._actors[worker].run.remote(to_json(job))
        self._calls[worker] = _Call(ref, job, time.monotonic() + deadline_s)

    def wait(self, timeout_s: float) -> Sequence[Report]:
        self._look_for_absent()
        by_ref = {call.ref: worker for worker, call in self._calls.items()}
        if not by_ref:
            time.sleep(min(timeout_s, PING_S[0]))
            return []
        next_deadline = min(call.deadline for call in self._calls.values()) - time.monotonic()
        ready, _ = ray.wait(list(by_ref), num_returns=1, timeout=max(0.0, min(timeout_s, next_deadline)))
        reports = [report for ref in ready if (report := self._collect(by_ref[ref])) is not None]
        return [*reports, *self._expire()]

    def shrink(self, size: int) -> None:
        loading = [worker for worker, call in self._calls.items() if call.job is None]
        # a worker that has loaded is worth more than one that has yet to
        for worker in [*self._absent, *loading, *self.idle()][: max(0, len(self._actors) - size)]:
            if worker in self._actors:
                self._remove(worker)

    def close(self) -> None:
        for worker in list(self._actors):
            self._remove(worker)
        if self._own:
            ray.shutdown()

    def _add(self, worker: str) -> None:
        self._actors[worker] = self._actor_class.remote(self._settings)
        self._load(worker)

    def _load(self, worker: str) -> None:
        self._calls[worker] = _Call(self._actors[worker].load.remote(), None, time.monotonic() + LOAD_DEADLINE_S)

    def _remove(self, worker: str) -> None:
        ray.kill(self._actors.pop(worker), no_restart=True)
        self._calls.pop(worker, None)
        self._absent.pop(worker, None)

    def _collect(self, worker: str) -> Report | None:
        call = self._calls.pop(worker)
        try:
            value = ray.get(call.ref)
        except exceptions.RayTaskError as error:
            # raised by our code inside the actor, which lives
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, BadInput) and call.job is None:
                return self._lost(worker, call, cause)
            return self._lost(worker, call, WorkerLost(f"{worker} failed outside of a job: {cause!r}"))
        except exceptions.OutOfMemoryError as error:
            return self._lost(worker, call, OutOfMemory(f"{worker} was ended, its node ran out of memory: {error}"))
        except exceptions.RayError as error:
            if call.ping:
                return self._still_absent(worker, error)
            return self._lost(worker, call, WorkerLost(f"{worker} ended: {first_line(error)}"))
        if call.ping:
            del self._absent[worker]
            self._load(worker)
            return None
        if call.job is None:
            self._load_failures[worker] = 0
            device, load_s, self.processes[worker] = value
            return Ready(worker, device, load_s)
        return Done(worker, call.job, value)

    def _lost(self, worker: str, call: _Call, error: ServiceError) -> Lost:
        failures = self._load_failures.get(worker, 0) + 1 if call.job is None else 0
        self._load_failures[worker] = failures
        # what is wrong with the base on a machine stays wrong
        returns = failures < MAX_LOAD_FAILURES and not isinstance(error, BadInput)
        if returns:
            now = time.monotonic()
            self._absent[worker] = _Absence(now, now + PING_S[0])
        else:
            self._remove(worker)
        return Lost(worker, call.job, error, returns)

    def _look_for_absent(self) -> None:
        now = time.monotonic()
        for worker, absence in self._absent.items():
            if worker not in self._calls and absence.next_look <= now:
                ref = self._actors[worker].ping.remote()
                self._calls[worker] = _Call(ref, None, now + PATIENCE_S, ping=True)

    def _still_absent(self, worker: str, error: exceptions.RayError) -> Lost | None:
        absence, now = self._absent[worker], time.monotonic()
        if now - absence.since > PATIENCE_S:
            self._remove(worker)
            gone = WorkerLost(f"{worker} did not come back within {PATIENCE_S:.0f} s: {first_line(error)}")
            return Lost(worker, None, gone, returns=False)
        if isinstance(error, exceptions.ActorDiedError):  # for good: Ray will not restart this one
            self._actors[worker] = self._actor_class.remote(self._settings)
        absence.interval_s = min(2 * absence.interval_s, PING_S[1])
        absence.next_look = now + absence.interval_s
        return None

    def _end(self, worker: str) -> None:
        """End a worker that does not answer; Ray starts another in its place."""
        ray.kill(self._actors[worker], no_restart=False)
        process = self.processes.pop(worker, None)
        if process is not None:
            there = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
            ray.remote(num_cpus=0, max_retries=0)(end).options(scheduling_strategy=there).remote(process)

    def _expire(self) -> list[Report]:
        """Calls past their deadline: one can hang for ever on a node that vanished; only we know what is too long."""
        now = time.monotonic()
        reports: list[Report] = []
        for worker, call in [(worker, call) for worker, call in self._calls.items() if call.deadline <= now]:
            del self._calls[worker]
            self._end(worker)
            what = "loading its base" if call.job is None else call.job.pair
            late = DeadlineExceeded(f"{worker} took too long over {what} and was restarted: is --deadline too short?")
            reports.append(self._lost(worker, call, late))
        return reports


def connect(address: str | None, cpus: int) -> bool:
    """Join the cluster at `address`, or start a small Ray here. True if it is ours to end. ServiceError if the
    address does not answer."""
    if ray.is_initialized():
        return False
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # says that a worker without GPU keeps its environment
    common = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is not None:
        try:
            ray.init(address=address, **common)
        except (OSError, RuntimeError, exceptions.RayError, ValueError) as error:
            if listens(address):  # Ray says the same of a wrong token and of no cluster at all
                raise NoCluster(
                    f"the Ray cluster at {address} lets no one in without its token, or is no Ray {ray.__version__}:"
                    " set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file, to the cluster's"
                ) from error
            raise NoCluster(f"no Ray cluster answers at {address}: {first_line(error)}") from error
        return True
    # results are small values; models live in the actors
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=100 * 2**20, **common)
    return True


def listens(address: str) -> bool:
    """Whether anything takes connections at `[ray://]host:port`."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
