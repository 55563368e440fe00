"""Long work as an iterable with a length, and a function over many items on threads. Torch-free, Ray-free."""

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


def parallel(function: Callable[[T], R], items: Iterable[T], threads: int, *, ordered: bool = True) -> Iterator[R]:
    """`function` of each item, on threads; results in the order of the items, or as they come.

    Memory is bounded: at most four items per thread are taken ahead, however many there are. The first exception is
    raised here, after the calls that are under way have returned; no further ones are started.
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
            for future in waiting:
                future.cancel()


def _take(waiting: "deque[Future[R]]", ordered: bool) -> Iterator[R]:
    if ordered:
        yield waiting.popleft().result()
        return
    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
        waiting.remove(future)
        yield future.result()
