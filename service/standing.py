"""How far a run is, kept in its catalog while it goes on (runs/<run_id>/standing.json), for who asks from elsewhere.

Written by an observer, from a thread of its own: a slow store does not hold up the run, and one that fails costs
nothing but the freshness of this record.
"""

import json
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from service import events
from service.catalog import Catalog
from service.errors import StorageError

EVERY_S = 30.0
NAME = "standing.json"


@dataclass(frozen=True, slots=True)
class Standing:
    """`state`: running, finished, interrupted. `committed` counts those from before this run, too; `eta_s` from
    `updated` on, None while nothing is known."""

    run_id: str
    state: str
    jobs: int
    committed: int
    given_up: int
    workers: int
    started: str  # ISO 8601, UTC
    updated: str
    eta_s: float | None = None

    @property
    def left(self) -> int:
        return self.jobs - self.committed - self.given_up


class StandingRecord:
    """`observe` takes events; `close` writes the last word and ends the thread."""

    def __init__(self, catalog: Catalog, run_id: str, every_s: float = EVERY_S) -> None:
        self._catalog, self._run_id, self._every_s = catalog, run_id, every_s
        self._lock = threading.Lock()
        self._standing: Standing | None = None
        self._ready: set[str] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="standing", daemon=True)

    def observe(self, event: events.Event) -> None:
        with self._lock:
            if isinstance(event, events.RunStarted):
                started = _now()
                self._standing = Standing(
                    self._run_id, "running", event.jobs, event.committed, 0, 0, started=started, updated=started
                )
                self._thread.start()
            elif self._standing is not None:
                self._standing = self._after(event, self._standing)

    def close(self, committed: int | None = None) -> None:
        """`committed`: in all, by the catalog, where workers may have committed after the last event."""
        with self._lock:
            if self._standing is not None and committed is not None:
                self._standing = replace(self._standing, committed=committed)
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * self._every_s)

    def _after(self, event: events.Event, now: Standing) -> Standing:
        match event:
            case events.WorkerReady():
                self._ready.add(event.worker)
            case events.WorkerGone():
                self._ready.discard(event.worker)
            case events.JobCommitted():
                now = replace(now, committed=now.committed + 1)
            case events.JobGivenUp():
                now = replace(now, given_up=now.given_up + 1)
            case events.RunFinished():
                now = replace(now, state="interrupted" if event.interrupted or event.left else "finished")
            case events.Outlook():
                now = replace(now, eta_s=event.seconds)
            case _:
                return now
        return replace(now, workers=len(self._ready))

    def _keep(self) -> None:
        written = None
        while True:
            ended = self._ended.wait(0.0 if written is None else self._every_s)
            with self._lock:
                standing = self._standing
            if standing is not None and standing != written:
                written = standing
                body = json.dumps(asdict(replace(standing, updated=_now())), indent=2).encode()
                with suppress(StorageError):  # the next one may be taken
                    self._catalog.store.put(f"runs/{self._run_id}/{NAME}", body, content_type="application/json")
            if ended:
                return


def latest_standing(catalog: Catalog, manifest_digest: str) -> Standing | None:
    """Of the newest run of the manifest that has left one; None if there is none that can be read. StorageError."""
    ending = f"-{manifest_digest[:8]}/{NAME}"
    keys = [found.key for found in catalog.store.list("runs/") if found.key.endswith(ending)]
    for key in reversed(keys):  # a run's id begins with its time
        try:
            fields: dict[str, Any] = json.loads(catalog.store.get(key))
            return Standing(**fields)
        except (ValueError, TypeError):
            continue
    return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
