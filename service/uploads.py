"""Commits behind the worker's back: finished pairs upload while the next ones are merged.

A store that does not answer, or asks to slow down, costs time and nothing else: what was made is kept and sent again,
up to a limit. Only few jobs wait here, so memory is bounded, and a worker that runs ahead of its uploads waits.
"""

import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from service.catalog import Catalog
from service.errors import AlreadyCommitted, StorageError, Unavailable
from service.faults import backoff_s
from service.jobs import Job, identity
from service.messages import JobResult
from service.thumbnails import put_thumbnail
from service.translation import failed

T = TypeVar("T")
AHEAD = 2  # jobs whose files wait or upload; of SDXL pairs at rank 64 that is a gigabyte
RETRY_S = (1.0, 30.0)  # between two tries of a store that is away, at first and at most


@dataclass(frozen=True, slots=True)
class Made:
    """A job's files (name → content) and report, and `result` as it will be if they are committed."""

    job: Job
    files: Mapping[str, bytes]
    report: Mapping[str, Any]
    result: JobResult


class PatientStore:
    """Calls to a store that are repeated while it is away. `trouble`: what it answered last, while that goes on."""

    def __init__(self, patience_s: float) -> None:
        self.patience_s = patience_s
        self.trouble: str | None = None
        self._random = random.Random()
        self._closed = threading.Event()

    def close(self) -> None:
        """Whoever waits gets the last error at once."""
        self._closed.set()

    def call(self, function: Callable[[], T]) -> T:
        """The function's value; Unavailable when the store stayed away for longer than the worker is patient."""
        until, attempt = time.monotonic() + self.patience_s, 0
        while True:
            try:
                value = function()
            except Unavailable as error:
                self.trouble, attempt = str(error), attempt + 1
                wait_s = backoff_s(attempt, self._random.random(), *RETRY_S)
                if time.monotonic() + wait_s > until or self._closed.wait(wait_s):
                    raise
            else:
                self.trouble = None
                return value


class Uploads:
    """Commits under way. Used by one thread."""

    def __init__(self, catalog: Catalog, store: PatientStore, ahead: int = AHEAD) -> None:
        self.catalog, self.store, self.ahead = catalog, store, ahead
        self._threads = ThreadPoolExecutor(max(1, ahead), "upload")
        self._under_way: set[Future[JobResult]] = set()

    @property
    def pending(self) -> int:
        return len(self._under_way)

    def start(self, made: Made) -> None:
        self._under_way.add(self._threads.submit(self._commit, made))

    def finished(self, timeout_s: float = 0.0) -> list[JobResult]:
        """What has ended since; waits for one at most this long."""
        if not self._under_way:
            return []
        done, self._under_way = wait(self._under_way, timeout_s, FIRST_COMPLETED)
        return [future.result() for future in done]

    def close(self) -> None:
        """What is under way ends or not; what has not begun does not begin."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _commit(self, made: Made) -> JobResult:
        job, started = made.job, time.monotonic()
        stages = dict(made.result.stages)
        report = {**made.report, "stages": dict(stages)}
        try:
            entry = self.store.call(lambda: self.catalog.commit(job.job_id, identity(job), made.files, report))
        except AlreadyCommitted:
            return JobResult(job.job_id, "already", stages=stages)
        except Exception as error:
            return failed(job, error, stages)
        if "merged.png" in made.files:
            with suppress(StorageError, ValueError):  # whoever writes pages makes it again, from the stored picture
                put_thumbnail(self.catalog.store, job.job_id, made.files["merged.png"])
        stages["commit"] = time.monotonic() - started
        n_bytes = sum(item.size for item in entry.objects.values())
        return replace(made.result, stages=stages, n_bytes=n_bytes)
