"""Workers as the control loop sees them. `InlinePool` is one worker in this process: for debugging, and for
machines without Ray."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from service.errors import ServiceError
from service.messages import Message, Tile, TileDone, WorkerSettings

if TYPE_CHECKING:
    from service.worker import Worker  # imports torch


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker has loaded its base and is free. `model` of its GPU, whose memory it may use `n_bytes` of."""

    worker: str
    device: str
    load_s: float
    model: str = ""
    n_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Said:
    """What a worker says of its tile; after a TileDone it is free."""

    worker: str
    message: Message


@dataclass(frozen=True, slots=True)
class Leaving:
    """The worker's node is about to be taken away: it may end its tile and shall get no other."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker ended with whatever it was doing. `returns`: a new one takes its name. `preempted`: its node was taken
    back, so nothing that it did can be to blame."""

    worker: str
    error: ServiceError
    returns: bool
    preempted: bool = False


Report = Ready | Said | Leaving | Lost


class Pool(Protocol):
    """Each worker does one tile at a time. Nothing here retries: what a failure leads to is the control loop's to
    say."""

    @property
    def size(self) -> int:
        """Workers that are loading, idle or busy; 0 when none is left that could come back."""
        ...

    def start(self, worker: str, tile: Tile, deadline_s: float) -> None:
        """Give a free worker a tile; returns at once. A worker that says nothing for `deadline_s` is ended."""
        ...

    def wait(self, timeout_s: float) -> Sequence[Report]:
        """What happened since; waits for something at most this long."""
        ...

    def shrink(self, size: int, spare: Iterable[str]) -> Sequence[str]:
        """End workers beyond `size`, those that have yet to load first, then of the `spare` ones; which were ended."""
        ...

    def grow(self, size: int) -> None:
        """So many workers have enough to do: start those that are missing, within the pool's own limits."""
        ...

    def replace(self, worker: str) -> None:
        """End a free worker that is leaving, and start another in its place where there is room."""
        ...

    def close(self) -> None:
        """End all workers, with what they are doing. Objects without an entry stay behind as garbage."""
        ...


class InlinePool:
    """One worker in this process. It works inside `wait`, so deadlines are not enforced and Ctrl-C stops it in
    the middle."""

    def __init__(self, settings: WorkerSettings, make: "Callable[[WorkerSettings], Worker] | None" = None) -> None:
        self._settings, self._make = settings, make
        self._worker: Worker | None = None
        self._messages: Iterator[Message] | None = None

    @property
    def size(self) -> int:
        return 1

    def start(self, worker: str, tile: Tile, deadline_s: float) -> None:
        assert self._worker is not None
        self._messages = self._worker.work(tile)

    def wait(self, timeout_s: float) -> Sequence[Report]:
        if self._worker is None:
            if self._make is None:
                from service.worker import Worker

                self._make = Worker
            self._worker = self._make(self._settings)
            device = self._worker.device
            return [Ready("inline", device.name, self._worker.load_s, device.model, device.n_bytes)]
        if self._messages is None:
            time.sleep(timeout_s)
            return []
        message = next(self._messages)
        if isinstance(message, TileDone):
            self._messages = None
        return [Said("inline", message)]

    def shrink(self, size: int, spare: Iterable[str]) -> Sequence[str]:
        return []

    def grow(self, size: int) -> None:
        pass

    def replace(self, worker: str) -> None:
        pass

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
        self._worker = self._messages = None
