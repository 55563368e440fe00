"""A catalog as it fills, seen from elsewhere: what is committed and given up, how fast, what came last.

Everything is read from the store: the run may be on another continent, or over.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from service.catalog import Catalog
from service.entry import JOB_ID
from service.errors import Corrupted, NotFound
from service.standing import NAME, Standing

RECENT = 8
WINDOW = timedelta(minutes=10)  # that the rate is taken over
STALE = timedelta(minutes=5)  # a run that has said nothing for so long is not counted on


@dataclass(frozen=True, slots=True)
class Merge:
    """One of the last that came."""

    subject: str
    style: str
    method: str
    at: datetime


@dataclass(frozen=True, slots=True)
class View:
    """What is there at `at`. `standing`: what the newest run says of itself, None if none does; `per_minute` and
    `eta_s` are None where nothing can be said."""

    at: datetime
    merges: int
    given_up: int
    recent: tuple[Merge, ...]  # the latest first
    per_minute: float | None
    standing: Standing | None

    @property
    def running(self) -> bool:
        return self.standing is not None and self.standing.state == "running" and not self.stale

    @property
    def stale(self) -> bool:
        """The run says that it is running, but has not said so for long."""
        return (
            self.standing is not None
            and self.standing.state == "running"
            and self.at - datetime.fromisoformat(self.standing.updated) > STALE
        )

    @property
    def left(self) -> int | None:
        """Jobs of the newest run; None when there is none."""
        return None if self.standing is None else max(0, self.standing.left)

    @property
    def eta_s(self) -> float | None:
        if not self.running or self.standing is None:
            return None
        if self.standing.eta_s is not None:
            passed = (self.at - datetime.fromisoformat(self.standing.updated)).total_seconds()
            return max(0.0, self.standing.eta_s - passed)
        return 60 * self.standing.left / self.per_minute if self.per_minute else None


class Watch:
    """Iterating yields a View, again and again after `wait()`, until the newest run is over; keep it, and only what is
    new is read. StorageError."""

    def __init__(self, catalog: Catalog, wait: Callable[[], None], now: Callable[[], datetime] | None = None) -> None:
        self.catalog, self.wait = catalog, wait
        self.now = now or (lambda: datetime.now(UTC))
        self.named: dict[str, Merge] = {}  # by job id; those that were among the recent ones

    def __iter__(self) -> Iterator[View]:
        while True:
            view = self.look()
            yield view
            if view.standing is not None and view.standing.state != "running":
                return
            self.wait()

    def look(self) -> View:
        standing = self._standing()  # before the listing: what it counts is then seen below
        times = {
            found.key[8:-5]: found.modified
            for found in self.catalog.store.list("entries/")
            if JOB_ID.fullmatch(found.key[8:-5])
        }
        given_up = self.catalog.given_up() - times.keys()
        latest = sorted(times, key=lambda job_id: (times[job_id], job_id), reverse=True)[:RECENT]
        now = self.now()
        return View(
            now,
            len(times),
            len(given_up),
            tuple(self._names(latest, times)),
            _rate(list(times.values()), now),
            standing,
        )

    def _names(self, job_ids: list[str], times: dict[str, datetime]) -> Iterator[Merge]:
        self.named = {job_id: self.named[job_id] for job_id in job_ids if job_id in self.named}
        for job_id in job_ids:
            if job_id not in self.named:
                try:
                    entry = self.catalog.entry(job_id)
                except (NotFound, Corrupted):
                    continue
                self.named[job_id] = Merge(entry.subject, entry.style, entry.method, times[job_id])
            yield self.named[job_id]

    def _standing(self) -> Standing | None:
        """Of the newest run that has left a standing which can be read."""
        keys = [found.key for found in self.catalog.store.list("runs/") if found.key.endswith(f"/{NAME}")]
        for key in reversed(keys):  # a run's id begins with its time
            try:
                standing = Standing(**json.loads(self.catalog.store.get(key)))
                datetime.fromisoformat(standing.updated)
            except (NotFound, ValueError, TypeError):
                continue
            return standing
        return None


def _rate(times: list[datetime], now: datetime) -> float | None:
    """Merges per minute, over the last minutes in which there were any; None with fewer than two."""
    recent = [time for time in times if now - time <= WINDOW]
    if len(recent) < 2:
        return None
    minutes = (now - min(recent)).total_seconds() / 60
    return (len(recent) - 1) / minutes if minutes > 0 else None
