"""Long work as an iterable with a length, and a function over many items on threads. Torch-free, Ray-free."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Steps(Generic[T]):
    """`len()` steps of work; iterating does them and yields one result each. A progress bar or a test drives it."""

    n: int
    start: Callable[[], Iterator[T]]

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[T]:
        return self.start()


def parallel(
    function: Callable[[T], R],
    items: Iterable[T],
    threads: int,
    *,
    ordered: bool = True,
    stop: threading.Event | None = None,
) -> Iterator[R]:
    """`function` of each item, on threads; results in the order of the items, or as they come.

    Memory is bounded: at most four items per thread are taken ahead, however many there are. When it ends early, by an
    exception or because nobody takes further results, no further calls are started, `stop` is set so that long ones can
    notice, and the calls under way are waited for.
    """
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= 4 * threads:
                    yield from _take(waiting, ordered)
            while waiting:
                yield from _take(waiting, ordered)
        finally:
            if stop is not None:
                stop.set()
            for future in waiting:
                future.cancel()


def _take(waiting: "deque[Future[R]]", ordered: bool) -> Iterator[R]:
    if ordered:
        yield waiting.popleft().result()
        return
    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
        waiting.remove(future)
        yield future.result()
