"""Failures written into the catalog behind the control loop's back: a slow store shall not hold up a thousand workers.

Best effort, within bounds: what a job failed with is in the run's own record too, and a reader leaves out failures of
jobs that were committed since.
"""

import logging
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from service.catalog import Catalog
from service.errors import ServiceError, StorageError, Unavailable
from service.faults import STORE_BACKOFF_S, backoff_s
from service.jobs import Job, identity

THREADS = 4
AHEAD = 10_000  # records not yet written
ATTEMPTS = 3
log = logging.getLogger("ziplora.run")


class FailureRecords:
    """The failures of a run. Nothing here raises; `close` waits for what is under way."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self._threads = ThreadPoolExecutor(THREADS, "records")
        self._room = threading.BoundedSemaphore(AHEAD)
        self._stopped = threading.Event()
        try:
            self._old = catalog.given_up()
        except StorageError as error:
            log.info("failures of earlier runs stay: %s", error)
            self._old = set()

    def write(self, job: Job, reason: str, kind: str, traceback: str, attempts: int) -> None:
        inputs = {"subject": job.subject.lora, "style": job.style.lora, "base": job.base.location}
        self._start(
            lambda: self.catalog.record_failure(job.job_id, identity(job), reason, kind, traceback, attempts, inputs)
        )

    def clear(self, job: Job) -> None:
        """A job that an earlier run gave up is committed now."""
        if job.job_id in self._old:
            self._start(lambda: self.catalog.clear_failure(job.job_id))

    def close(self, wait: bool = True) -> None:
        if not wait:
            self._stopped.set()
        self._threads.shutdown(wait=wait, cancel_futures=not wait)

    def _start(self, write: Callable[[], object]) -> None:
        self._room.acquire()
        self._threads.submit(self._do, write)

    def _do(self, write: Callable[[], object]) -> None:
        try:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    write()
                    return
                except Unavailable as error:
                    log.info("a failure is not recorded yet: %s", error)
                    if attempt < ATTEMPTS and self._stopped.wait(backoff_s(attempt, random.random(), *STORE_BACKOFF_S)):
                        return
                except ServiceError as error:
                    log.warning("a failure is not recorded in the catalog: %s", error)
                    return
        finally:
            self._room.release()
