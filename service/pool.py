"""Workers as the control loop sees them. `InlinePool` is one worker in this process: for debugging, and for
machines without Ray."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from service.errors import ServiceError
from service.jobs import Job
from service.worker import JobResult, Worker, WorkerSettings


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker has loaded its base."""

    worker: str
    device: str
    load_s: float


@dataclass(frozen=True, slots=True)
class Done:
    """A job's attempt ended, well or not, and the worker is free."""

    worker: str
    job: Job
    result: JobResult


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker ended with what it was doing (`job` None: while loading). `returns`: a new one takes its name."""

    worker: str
    job: Job | None
    error: ServiceError
    returns: bool


Report = Ready | Done | Lost


class Pool(Protocol):
    """Each worker does one job at a time. Nothing here retries: what a failure leads to is the control loop's to
    say."""

    @property
    def size(self) -> int:
        """Workers that are loading, idle or busy; 0 when none is left that could come back."""
        ...

    def idle(self) -> Sequence[str]: ...

    def start(self, worker: str, job: Job, deadline_s: float) -> None:
        """Give an idle worker a job; returns at once."""
        ...

    def wait(self, timeout_s: float) -> Sequence[Report]:
        """What happened since; waits for something at most this long."""
        ...

    def shrink(self, size: int) -> None:
        """End idle workers that are not needed any more."""
        ...

    def close(self) -> None:
        """End all workers, with what they are doing. Objects without an entry stay behind as garbage."""
        ...


class InlinePool:
    """One worker in this process. A job runs inside `wait`, so deadlines are not enforced and Ctrl-C stops it in
    the middle."""

    def __init__(self, settings: WorkerSettings, make: Callable[[WorkerSettings], Worker] = Worker) -> None:
        self._settings, self._make = settings, make
        self._worker: Worker | None = None
        self._job: Job | None = None

    @property
    def size(self) -> int:
        return 1

    def idle(self) -> Sequence[str]:
        return ["inline"] if self._worker is not None and self._job is None else []

    def start(self, worker: str, job: Job, deadline_s: float) -> None:
        self._job = job

    def wait(self, timeout_s: float) -> Sequence[Report]:
        if self._worker is None:
            self._worker = self._make(self._settings)
            return [Ready("inline", self._worker.device, self._worker.load_s)]
        if self._job is None:
            time.sleep(timeout_s)
            return []
        job, self._job = self._job, None
        return [Done("inline", job, self._worker.run(job))]

    def shrink(self, size: int) -> None:
        pass

    def close(self) -> None:
        self._worker = self._job = None
