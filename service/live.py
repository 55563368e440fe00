"""The gallery kept up while a run goes on: an observer, and a thread that indexes and writes pages now and then.

Nothing of it can hold up or fail a run: it waits for no one, and what goes wrong is tried again the next time.
"""

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from service import events
from service.catalog import Catalog
from service.errors import ServiceError
from service.pages import Gallery, Written, put_live

EVERY_S = 20.0
CLOSE_S = 5.0  # a run that was interrupted shall end, whatever the pages are at
SHARE = 10  # a refresh that takes long comes seldom: at most a tenth of the time goes into them
log = logging.getLogger("ziplora.live")


class LiveGallery:
    """`observe` takes events; `close` ends the thread, `finish` writes the last state."""

    def __init__(self, catalog: Catalog, every_s: float = EVERY_S, clock: Callable[[], float] = time.monotonic) -> None:
        self.gallery, self.every_s, self.clock = Gallery(catalog), every_s, clock
        self.store = catalog.store
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="gallery", daemon=True)
        self.live: dict[str, Any] | None = None
        self.since: tuple[float, int] | None = None  # when the first job of this run was settled, and how many then

    def observe(self, event: events.Event) -> None:
        with self._lock:
            match event:
                case events.RunStarted():
                    self.live = {"state": "running", "jobs": event.jobs, "committed": event.committed, "given_up": 0}
                    self._thread.start()
                case events.JobCommitted() if self.live:
                    self.live["committed"] += 1
                case events.JobGivenUp() if self.live:
                    self.live["given_up"] += 1
                case events.RunFinished() if self.live:
                    self.live["state"] = "interrupted" if event.interrupted or event.left else "finished"

    def close(self) -> None:
        """End the thread, if it does so soon, and say to open pages how the run ended."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=CLOSE_S)
        self._say()

    def finish(self) -> Written:
        """The pages as everything stands; StorageError, unlike what the thread does."""
        if self._thread.is_alive():
            self._thread.join()
        written = self.gallery.refresh()
        self._say()
        return written

    def _keep(self) -> None:
        wait_s = 0.0
        while not self._ended.wait(wait_s):
            started = self.clock()
            try:
                self.gallery.refresh()
            except ServiceError as error:
                log.info("the gallery is not up to date: %s", error)
            self._say()
            wait_s = max(self.every_s, SHARE * (self.clock() - started))

    def _say(self) -> None:
        with self._lock:
            if self.live is None:
                return
            live = self.live | {"eta_s": self._eta_s(self.live)}
        live |= {"updated": datetime.now(UTC).isoformat(timespec="seconds"), "digest": self.gallery.written.digest}
        try:
            put_live(self.store, live)
        except ServiceError as error:
            log.info("open pages are not told how far the run is: %s", error)

    def _eta_s(self, live: dict[str, Any]) -> float | None:
        settled, at = live["committed"] + live["given_up"], self.clock()
        if self.since is None:
            self.since = (at, settled)
            return None
        since, first = self.since
        return (at - since) / (settled - first) * (live["jobs"] - settled) if settled > first else None
