"""What a worker keeps between jobs: the values used last, within a size, each made once however many threads ask."""

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")
SHARE = 0.5  # of a machine's memory, for the caches of all workers on it


class Cache(Generic[T]):
    """Least recently used values of at most `limit_bytes` in all; one that is larger by itself is made, returned
    and not kept. Safe for threads: while one makes a value, others that want it wait."""

    def __init__(self, limit_bytes: int, size: Callable[[T], int]) -> None:
        self.limit_bytes, self.size = limit_bytes, size
        self.values: OrderedDict[Hashable, T] = OrderedDict()
        self.n_bytes = self.hits = self.misses = 0
        self._making: dict[Hashable, Future[T]] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value, made if it is not there; what `make` raises, to all who wait for it."""
        with self._lock:
            if key in self.values:
                self.hits += 1
                self.values.move_to_end(key)
                return self.values[key]
            made = self._making.get(key)
            mine = made is None
            if made is None:
                self.misses += 1
                made = self._making[key] = Future()
        if not mine:
            return made.result()
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                del self._making[key]
            made.set_exception(error)
            raise
        with self._lock:
            del self._making[key]
            self._keep(key, value)
        made.set_result(value)
        return value

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return key in self.values or key in self._making

    @property
    def room(self) -> int:
        """How many values of the usual size it holds; 2 while nobody knows."""
        with self._lock:
            return int(self.limit_bytes * len(self.values) / self.n_bytes) if self.n_bytes else 2

    def held(self) -> list[Hashable]:
        with self._lock:
            return list(self.values)

    def _keep(self, key: Hashable, value: T) -> None:
        if self.size(value) > self.limit_bytes:  # nothing has to go for what cannot stay
            return
        self.values[key] = value
        self.n_bytes += self.size(value)
        while self.n_bytes > self.limit_bytes:
            _, oldest = self.values.popitem(last=False)
            self.n_bytes -= self.size(oldest)


def memory_share(workers: int) -> int:
    """Bytes that one of this machine's `workers` may keep in its caches. A 16×16 tile of SDXL LoRAs of rank 64 wants 32
    of 0.37 GB."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # a container's limit; there is none, or it is "max"
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return int(total * SHARE / max(1, workers))
