"""Workers as Ray actors: a Ray of our own on this machine by default, a cluster by its address.

One tile at a time per actor, whose messages are streamed back and watched with `ray.wait`, instead of Ray's own queues
and retries: when an actor dies, the calls queued behind the running one fail with it, `ActorPool` does not replace dead
actors, and a task that Ray retries by itself would not look for the entry first. Actors restart by themselves
(`max_restarts=-1`); what they were doing is the control loop's to decide.
"""

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ray
import ray._private.state
import ray.util.client
from ray import exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from service.crew import Crew
from service.errors import BadInput, DeadlineExceeded, OutOfMemory, ServiceError, WorkerLost
from service.jobs import Job, from_json, to_json
from service.messages import JobResult, Message, Tile, TileDone, WorkerSettings
from service.pool import Leaving, Lost, Ready, Report, Said
from service.ray_cluster import connect, first_line

MAX_LOAD_FAILURES = 3  # in a row, of one worker, before its place stays empty
LOAD_DEADLINE_S = 1800.0  # for a base over a slow network
PATIENCE_S = 1800.0  # for Ray to restart an actor: after a node was lost, until its capacity is back
PING_S = (0.5, 15.0)  # between looks at an actor that is restarting: at first, at most
ENDING_S = 15.0  # at the end of a run, for processes that do not answer to be killed on their nodes
DRAIN_LOOK_S = 2.0  # between looks at which nodes are being drained
Make = Callable[[WorkerSettings], Any]  # builds a worker inside of its actor


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


class _Actor:
    """The process side. Loading is a call of its own, so that an error in it has a message and no restart loop."""

    def __init__(self, settings: WorkerSettings, make: Make | None) -> None:
        self.settings, self.make = settings, make
        self.worker: Any = None

    def load(self) -> tuple[str, float, str, int | None, Process]:
        if self.make is None:
            from service.worker import Worker

            self.make = Worker
        self.worker = self.make(self.settings)
        device = self.worker.device
        return device.name, self.worker.load_s, device.model, device.n_bytes, this_process()

    def work(self, jobs: list[str], ahead: list[str]) -> Iterator[list[Message]]:
        """What the worker says, as it says it; small messages together with the next one."""
        if self.worker is None:  # restarted behind our back
            self.load()
        said: list[Message] = []
        following = tuple(job for job in map(from_json, ahead) if isinstance(job, Job))
        for message in self.worker.work(Tile(tuple(map(from_json, jobs)), following)):
            said.append(message)
            if not isinstance(message, JobResult):  # results wait for the Began or TileDone that follows them at once
                yield said
                said = []
        if not self.worker.device.is_sound():
            os._exit(1)  # Ray starts a fresh process; what had no result yet comes back as lost

    def work_unheard(self, jobs: list[str], ahead: list[str]) -> list[list[Message]]:
        """`work` for a Ray Client, which has no streams."""
        return list(self.work(jobs, ahead))

    def ping(self) -> None:
        pass


@dataclass(slots=True)
class _Call:
    """What an actor is doing: a tile, loading its base, or answering whether it is back (`ping`)."""

    ref: Any  # an object, or a stream of them
    doing: Literal["tile", "load", "ping"]
    deadline: float  # on the monotonic clock; for a tile, until its next word
    patience_s: float = 0.0


@dataclass(slots=True)
class _Absence:
    """A worker whose actor Ray is restarting. Calls to it fail at once until it is back, so we look again and again."""

    since: float
    next_look: float
    interval_s: float = PING_S[0]


class RayPool:
    """Actors on `address` (None: a Ray started here and ended by `close`), each with one GPU if the cluster has any:
    `size` of them, at most as many as there are jobs (`most`), or what `crew` says. `make` builds what works in each.

    A crew that may grow tells the cluster's autoscaler what it has and wants. That request outlives us, so `close`
    takes it back; after a SIGKILL the next run of the kind replaces it.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        size: int | None = None,
        address: str | None = None,
        cpus_per_worker: int = 1,
        most: int | None = None,
        make: Make | None = None,
        crew: Crew | None = None,
    ) -> None:
        self._crew = crew = crew or Crew(least=size, most=size)
        crew.check()
        self._own = connect(address, cpus=max(os.cpu_count() or 1, (crew.most or 1) * cpus_per_worker))
        self._streams = not ray.util.client.ray.is_connected()
        alive = [node for node in ray.nodes() if node["Alive"]]
        nodes = [node["Resources"] for node in alive]
        crew.check_nodes(nodes, [node.get("Labels", {}) for node in alive])
        # a head that only coordinates has no CPU: workers' nodes may be yet to come, and come because actors wait
        if not any(node.get("CPU", cpus_per_worker) >= cpus_per_worker for node in nodes):
            raise BadInput(f"no node has {cpus_per_worker} CPUs: take fewer --threads")
        share = crew.gpus or 1
        gpus = 0 if settings.device == "cpu" else sum(int(node.get("GPU", 0) / share) for node in nodes)
        asked = settings.device == "auto" and bool(crew.gpus or crew.accelerator_type)  # of nodes that are yet to come
        on_gpu = bool(gpus) or settings.device.startswith("cuda") or asked
        size = crew.begin_with(gpus, most)
        per_node = (node.get("GPU", 0) / share if on_gpu else node.get("CPU", 0) // cpus_per_worker for node in nodes)
        self._settings = replace(
            settings, workers_per_node=int(min(max(1, *per_node), crew.most or size)), gpu_share=float(share)
        )
        self._make, self._jobs = make, most
        self._needs: dict[str, float] = {"CPU": cpus_per_worker} | ({"GPU": share} if on_gpu else {})
        options = {
            "num_cpus": cpus_per_worker,
            "num_gpus": share if on_gpu else 0,
            "accelerator_type": crew.accelerator_type,
            "label_selector": dict(crew.labels) or None,
            "max_restarts": -1,
            "max_task_retries": 0,
        }
        self._actor_class = ray.remote(**options)(_Actor)
        self._requested = 0  # workers that the autoscaler was told of
        self._numbers = itertools.count()
        self._actors: dict[str, Any] = {}
        self._calls: dict[str, _Call] = {}
        self._absent: dict[str, _Absence] = {}
        self._leaving: set[str] = set()
        self._endings: list[Any] = []  # of processes that did not answer
        self._load_failures: dict[str, int] = {}
        self._next_drain_look = 0.0
        self.processes: dict[str, Process] = {}
        self._start_more(size)

    @property
    def size(self) -> int:
        return len(self._actors)

    def start(self, worker: str, tile: Tile, deadline_s: float) -> None:
        jobs, ahead = [to_json(job) for job in tile.jobs], [to_json(job) for job in tile.ahead]
        if self._streams:
            ref = self._actors[worker].work.options(num_returns="streaming").remote(jobs, ahead)
        else:
            ref = self._actors[worker].work_unheard.remote(jobs, ahead)
            deadline_s *= max(1, len(jobs))  # nothing is heard before all are done
        self._calls[worker] = _Call(ref, "tile", time.monotonic() + deadline_s, deadline_s)

    def wait(self, timeout_s: float) -> Sequence[Report]:
        self._look_for_absent()
        reports = self._look_for_drained()
        by_ref = {call.ref: worker for worker, call in self._calls.items()}
        if not by_ref or reports:
            time.sleep(0 if reports else min(timeout_s, PING_S[0]))
            return reports
        next_deadline = min(call.deadline for call in self._calls.values()) - time.monotonic()
        timeout_s = max(0.0, min(timeout_s, next_deadline))
        # all that is there already, else the first that comes
        ready, _ = ray.wait(list(by_ref), num_returns=len(by_ref), timeout=0)
        if not ready:
            ready, _ = ray.wait(list(by_ref), num_returns=1, timeout=timeout_s)
        for ref in ready:
            reports += self._collect(by_ref[ref])
        return reports + self._expire()

    def shrink(self, size: int, spare: Iterable[str]) -> Sequence[str]:
        loading = [worker for worker, call in self._calls.items() if call.doing != "tile"]
        # a worker that has loaded is worth more than one that has yet to
        surplus = list(dict.fromkeys([*self._absent, *loading, *spare]))[: max(0, len(self._actors) - size)]
        for worker in surplus:
            self._remove(worker)
        self._request()
        return surplus

    def grow(self, size: int) -> None:
        if self._crew.is_elastic:
            self._start_more(min(self._crew.aim(size), self._jobs or size) - len(self._actors))

    def replace(self, worker: str) -> None:
        self._remove(worker)
        self._add(worker)  # waits for room on another node

    def close(self) -> None:
        if self._endings:  # a process that is stopped would stay behind
            ray.wait(self._endings, num_returns=len(self._endings), timeout=ENDING_S)
        for worker in list(self._actors):
            self._remove(worker)
        self._request()
        if self._own:
            ray.shutdown()

    def _start_more(self, n: int) -> None:
        for _ in range(n):
            self._add(f"worker-{next(self._numbers)}")
        self._request()

    def _request(self) -> None:
        """Tell the autoscaler how many workers there shall be room for: all of them now, not a few at a time, and none
        of their nodes is taken for idle while a worker restarts."""
        n = len(self._actors)
        if not self._crew.is_elastic or not self._streams or n == self._requested:
            return
        from ray.autoscaler.sdk import request_resources  # brings half of Ray's command line with it

        self._requested = n
        bundle, labels = dict(self._needs), dict(self._crew.labels)
        if self._crew.accelerator_type:
            bundle[f"accelerator_type:{self._crew.accelerator_type}"] = 0.001
        request_resources(bundles=[bundle] * n, bundle_label_selectors=[labels] * n if labels and n else None)

    def _add(self, worker: str) -> None:
        self._actors[worker] = self._actor_class.remote(self._settings, self._make)
        self._load(worker)

    def _load(self, worker: str) -> None:
        self._calls[worker] = _Call(self._actors[worker].load.remote(), "load", time.monotonic() + LOAD_DEADLINE_S)

    def _remove(self, worker: str) -> None:
        ray.kill(self._actors.pop(worker), no_restart=True)
        self._calls.pop(worker, None)
        self._absent.pop(worker, None)
        self._leaving.discard(worker)
        self.processes.pop(worker, None)

    def _collect(self, worker: str) -> list[Report]:
        call = self._calls[worker]
        try:
            if call.doing == "tile" and self._streams:
                return self._heard(worker, call, ray.get(next(call.ref)))
            value = ray.get(call.ref)
        except StopIteration:  # a stream that ended without a TileDone
            return [self._lost(worker, call, WorkerLost(f"{worker} ended in the middle of a tile"))]
        except exceptions.RayTaskError as error:
            # raised by our code inside the actor, which lives
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, BadInput) and call.doing == "load":
                return [self._lost(worker, call, cause)]
            return [self._lost(worker, call, WorkerLost(f"{worker} failed outside of a job: {cause!r}"))]
        except exceptions.OutOfMemoryError as error:
            return [self._lost(worker, call, OutOfMemory(f"{worker} was ended, its node ran out of memory: {error}"))]
        except exceptions.RayError as error:
            if call.doing == "ping":
                return self._still_absent(worker, error)
            preempted = worker in self._leaving or bool(getattr(error, "preempted", False))
            return [self._lost(worker, call, WorkerLost(f"{worker} ended: {first_line(error)}"), preempted)]
        if call.doing == "tile":
            return [report for said in value for report in self._heard(worker, call, said)]
        del self._calls[worker]
        if call.doing == "ping":
            del self._absent[worker]
            self._load(worker)
            return []
        self._load_failures[worker] = 0
        *about, self.processes[worker] = value
        return [Ready(worker, *about)]

    def _heard(self, worker: str, call: _Call, said: Sequence[Message]) -> list[Report]:
        call.deadline = time.monotonic() + call.patience_s
        if any(isinstance(message, TileDone) for message in said):
            del self._calls[worker]
        return [Said(worker, message) for message in said]

    def _lost(self, worker: str, call: _Call, error: ServiceError, preempted: bool = False) -> Lost:
        self._calls.pop(worker, None)
        failures = self._load_failures.get(worker, 0) + 1 if call.doing != "tile" else 0
        self._load_failures[worker] = failures
        # what is wrong with the base on a machine stays wrong
        returns = failures < MAX_LOAD_FAILURES and not isinstance(error, BadInput)
        if returns:
            now = time.monotonic()
            self._leaving.discard(worker)
            self._absent[worker] = _Absence(now, now + PING_S[0])
        else:
            self._remove(worker)
        return Lost(worker, error, returns, preempted)

    def _look_for_absent(self) -> None:
        now = time.monotonic()
        for worker, absence in self._absent.items():
            if worker not in self._calls and absence.next_look <= now:
                ref = self._actors[worker].ping.remote()
                self._calls[worker] = _Call(ref, "ping", now + PATIENCE_S)

    def _look_for_drained(self) -> list[Report]:
        """Workers whose node was told to go (a spot notice, a scale-down). Its deadline is only advisory."""
        now = time.monotonic()
        if not self._streams or now < self._next_drain_look:
            return []
        self._next_drain_look = now + DRAIN_LOOK_S
        draining = ray._private.state.state.get_draining_nodes()
        going = [
            worker
            for worker, process in self.processes.items()
            if process.node_id in draining and worker not in self._leaving and worker not in self._absent
        ]
        self._leaving.update(going)
        return [Leaving(worker, f"{worker} gets no more work, its node is being drained") for worker in going]

    def _still_absent(self, worker: str, error: exceptions.RayError) -> list[Report]:
        del self._calls[worker]
        absence, now = self._absent[worker], time.monotonic()
        if now - absence.since > PATIENCE_S:
            self._remove(worker)
            gone = WorkerLost(f"{worker} did not come back within {PATIENCE_S:.0f} s: {first_line(error)}")
            return [Lost(worker, gone, returns=False)]
        if isinstance(error, exceptions.ActorDiedError):  # for good: Ray will not restart this one
            self._actors[worker] = self._actor_class.remote(self._settings, self._make)
        absence.interval_s = min(2 * absence.interval_s, PING_S[1])
        absence.next_look = now + absence.interval_s
        return []

    def _waits_for_room(self, worker: str) -> bool:
        """Whether no node has had resources for its actor yet: that is no failure, the cluster may still grow."""
        if not self._streams:
            return False
        actor = ray._private.state.actors(self._actors[worker]._actor_id.hex())
        return actor.get("State") in ("DEPENDENCIES_UNREADY", "PENDING_CREATION")

    def _end(self, worker: str) -> None:
        """End a worker that does not answer; Ray starts another in its place."""
        ray.kill(self._actors[worker], no_restart=False)
        process = self.processes.pop(worker, None)
        if process is not None:
            there = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
            self._endings.append(
                ray.remote(num_cpus=0, max_retries=3)(end).options(scheduling_strategy=there).remote(process)
            )

    def _expire(self) -> list[Report]:
        """Calls past their deadline: one can hang for ever on a node that vanished; only we know what is too long."""
        now = time.monotonic()
        reports: list[Report] = []
        for worker, call in [(worker, call) for worker, call in self._calls.items() if call.deadline <= now]:
            if call.doing == "load" and self._waits_for_room(worker):
                call.deadline = now + LOAD_DEADLINE_S
                continue
            self._end(worker)
            what = "loading its base" if call.doing != "tile" else "a job"
            late = DeadlineExceeded(f"{worker} took too long over {what} and was restarted: is --deadline too short?")
            reports.append(self._lost(worker, call, late))
        return reports
