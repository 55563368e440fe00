"""The grid cut into blocks that share LoRAs, and who gets which part of them. No clock, no waiting, no Ray.

A worker's cost is loading and calibrating each LoRA once plus merging each pair. A near-square block of the grid
needs the fewest LoRAs per pair: 16×16 calibrates 32 LoRAs for 256 pairs, where a row of 256 would calibrate 257.
A block is where a worker stays; a tile is the part of it that it is given at a time.
"""

import heapq
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice

from service.jobs import Job
from service.messages import Tile

TILE_SIDE = 16
TILE_S = (2.0, 120.0)  # seconds of work in a tile: less costs calls, more makes the end of a run ragged
TILES_AT_THE_END = 4  # for each worker, in what is left: so tiles shrink as the end comes near
LOOKS = 8  # blocks looked at for each LoRA that a worker holds
COPY_GAIN = 1.5  # a second worker is given a job that takes its holder so many times what it would take the second
WORTH_S = 300.0  # of work for each worker, before one more is worth its start


def cut(jobs: Sequence[Job], workers: int, side: int = TILE_SIDE) -> list[tuple[Job, ...]]:
    """Blocks of at most side×side pairs, in the manifest's order, and at least `workers` of them while there are
    that many pairs. Neighbours that a sparse grid leaves nearly empty are joined while they need no more LoRAs than a
    full block.

    Within a block, jobs follow a space-filling curve: any stretch of it is nearly square, so that a worker with a small
    cache, a thief and the next tile all find neighbours that share LoRAs.
    """
    if not jobs:
        return []
    pairs = len({(job.subject.id, job.style.id) for job in jobs})
    side = max(1, min(side, math.isqrt(max(1, pairs // max(1, workers)))))
    rows = {subject: i for i, subject in enumerate(dict.fromkeys(job.subject.id for job in jobs))}
    columns = {style: i for i, style in enumerate(dict.fromkeys(job.style.id for job in jobs))}
    blocks: dict[tuple[int, int], list[Job]] = {}
    for job in jobs:
        block = (rows[job.subject.id] // side, columns[job.style.id] // side)
        blocks.setdefault(block, []).append(job)

    def place(job: Job) -> tuple[int, str]:
        row, column = rows[job.subject.id], columns[job.style.id]
        height, width = (min(side, len(axis) - i // side * side) for axis, i in ((rows, row), (columns, column)))
        return curve(height, width)[row % side, column % side], job.method

    ordered = {block: sorted(found, key=place) for block, found in blocks.items()}
    return [tuple(block) for block in _joined(ordered, side)]


def _joined(blocks: dict[tuple[int, int], list[Job]], side: int) -> Iterator[list[Job]]:
    """Blocks of one band of subjects, put together with the next of that band while both fit into one."""
    bands: dict[int, list[list[Job]]] = {}
    for (band, _), jobs in blocks.items():
        last = bands.setdefault(band, [])
        if last and _fits(last[-1], jobs, side):
            last[-1].extend(jobs)
        else:
            last.append(jobs)
    for band_blocks in bands.values():
        yield from band_blocks


def _fits(left: Sequence[Job], right: Sequence[Job], side: int) -> bool:
    return len(left) + len(right) <= side * side and len(loras([*left, *right])) <= 2 * side


def loras(jobs: Iterable[Job]) -> set[str]:
    """sha256 of all LoRAs that the jobs need."""
    return {lora for job in jobs for lora in job.loras}


@cache
def curve(height: int, width: int) -> dict[tuple[int, int], int]:
    """Place of each cell (row, column) on a Hilbert curve over a rectangle of any size.

    Cells next to each other on it are next to each other in the grid, but for one diagonal step where the longer side
    is odd and the shorter even (J. Červený's generalisation, github.com/jakubcerveny/gilbert).
    """
    cells = _curve(0, 0, width, 0, 0, height) if width >= height else _curve(0, 0, 0, height, width, 0)
    return {(y, x): place for place, (x, y) in enumerate(cells)}


def _curve(x: int, y: int, ax: int, ay: int, bx: int, by: int) -> Iterator[tuple[int, int]]:
    """Cells of the rectangle that `a` (major axis) and `b` span from (x, y)."""
    width, height = abs(ax + ay), abs(bx + by)
    dax, day, dbx, dby = (_sign(v) for v in (ax, ay, bx, by))
    if height == 1 or width == 1:
        step_x, step_y = (dax, day) if height == 1 else (dbx, dby)
        yield from ((x + i * step_x, y + i * step_y) for i in range(max(width, height)))
        return
    ax2, ay2, bx2, by2 = int(ax / 2), int(ay / 2), int(bx / 2), int(by / 2)
    if 2 * width > 3 * height:  # long: two parts
        if abs(ax2 + ay2) % 2 and width > 2:
            ax2, ay2 = ax2 + dax, ay2 + day
        yield from _curve(x, y, ax2, ay2, bx, by)
        yield from _curve(x + ax2, y + ay2, ax - ax2, ay - ay2, bx, by)
        return
    if abs(bx2 + by2) % 2 and height > 2:
        bx2, by2 = bx2 + dbx, by2 + dby
    yield from _curve(x, y, bx2, by2, ax2, ay2)
    yield from _curve(x + bx2, y + by2, ax, ay, bx - bx2, by - by2)
    yield from _curve(x + ax - dax + bx2 - dbx, y + ay - day + by2 - dby, -bx2, -by2, ax2 - ax, ay2 - ay)


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)


def tile_size(job_s: float | None, left: int, workers: int, side_by_side: int) -> int:
    """Jobs in a worker's next tile, from the seconds that one takes it: TILE_S of work, less as the end comes near,
    so that no worker idles while another has much to do. A single one while nobody knows how long a job takes."""
    if job_s is None:
        return max(1, side_by_side)
    job_s = max(job_s, 1e-3)
    seconds = min(max(left * job_s / (TILES_AT_THE_END * max(1, workers)), TILE_S[0]), TILE_S[1])
    return max(1, side_by_side, int(seconds / job_s)) if left > workers else 1


def copies(late: Iterable[tuple[float, Job]], idle: Iterable[tuple[float, str]]) -> Iterator[tuple[str, Job]]:
    """(worker, job) for jobs of others that idle workers shall do as well. The first entry in the catalog counts, so a
    copy costs nothing but the idle worker's time.

    late: seconds until a job's holder will have done it, as far as is known. idle: seconds that a job takes a worker.
    The latest go to the fastest, while that is well before the holder would be done.
    """
    order = sorted(late, key=lambda one: -one[0])
    for (seconds, job), (own_s, worker) in zip(order, sorted(idle), strict=False):
        if seconds < COPY_GAIN * own_s:
            return
        yield worker, job


def workers_wanted(work_s: float | None, jobs: int) -> int:
    """How many workers the work left is worth: each shall have WORTH_S of it, and a job at least. work_s: seconds on
    one worker; None while nobody knows, and then no more than one."""
    if work_s is None:
        return min(1, jobs)
    return min(jobs, math.ceil(work_s / WORTH_S))


class Board:
    """What is left of the grid. Every operation costs the jobs that it moves and a logarithm of the blocks, never a
    look at all of them: a million pairs have four thousand blocks."""

    def __init__(self, blocks: Iterable[Sequence[Job]] = (), slowness: Mapping[str, float] | None = None) -> None:
        self.left = 0
        self.slowness = {} if slowness is None else slowness  # of workers that are not as fast as the usual 1.0
        self._blocks: dict[int, deque[Job]] = {}
        self._free: dict[int, None] = {}  # blocks that nobody works on, in order
        self._needing: dict[str, dict[int, None]] = {}  # LoRA → free blocks that need it
        self._own: dict[str, int] = {}  # worker → block
        self._worker: dict[int, str] = {}  # block → worker
        self._longest: list[tuple[float, int]] = []  # a heap of (−work left, block), corrected when it is looked at
        self._numbers = 0
        self._loras: dict[int, int] = {}  # free block → LoRAs that it needs
        self._free_loads = 0  # their sum
        self._new: dict[int, float] = {}  # block at work → LoRAs that are new to its worker, per job
        for block in blocks:
            self.add(block)

    @property
    def loads(self) -> float:
        """LoRAs that workers will have to load for what is left."""
        return self._free_loads + sum(len(self._blocks[number]) * new for number, new in self._new.items())

    def add(self, jobs: Sequence[Job]) -> None:
        """A block of work that nobody has: at the start, or what came back from a worker that was lost."""
        if not jobs:
            return
        number = self._numbers
        self._numbers += 1
        self._blocks[number] = deque(jobs)
        self.left += len(jobs)
        self._set_free(number)

    def take(self, worker: str, n: int, held: Iterable[str] = (), ahead: int = 4) -> Tile | None:
        """At most `n` jobs for a worker, and those it will get next if nobody takes them: from its own block, else from
        the free block that shares most with the LoRAs it holds, else the second half of what most work is left of."""
        number = self._own.get(worker)
        if number is None:
            number = self._choose(held)
            if number is None:
                number = self._steal()
            if number is None:
                return None
            self._claim(worker, number, held)
        block = self._blocks[number]
        jobs = tuple(block.popleft() for _ in range(min(n, len(block))))
        self.left -= len(jobs)
        following = tuple(islice(block, ahead))
        if not block:
            self._drop(number)
        return Tile(jobs, following)

    def release(self, worker: str) -> None:
        """The worker's block is anybody's again."""
        number = self._own.pop(worker, None)
        if number is not None:
            del self._worker[number]
            self._set_free(number)

    def remove(self, lora: str) -> list[Job]:
        """Take out, and return, every job that needs this LoRA."""
        needing = [*self._needing.get(lora, ()), *self._worker]
        return self._pull(needing, lambda job: lora in job.loras)

    def pull(self, wanted: Callable[[Job], bool]) -> list[Job]:
        """Take out, and return, every such job. Looks at all of them."""
        return self._pull(list(self._blocks), wanted)

    def _pull(self, numbers: Iterable[int], wanted: Callable[[Job], bool]) -> list[Job]:
        removed: list[Job] = []
        for number in numbers:
            free, block = number in self._free, self._blocks[number]
            kept = [job for job in block if not wanted(job)]
            if len(kept) == len(block):
                continue
            removed += [job for job in block if wanted(job)]
            if free:
                self._unset_free(number)
            block.clear()
            block.extend(kept)
            if not block:
                self._drop(number)
            elif free:
                self._set_free(number)
        self.left -= len(removed)
        return removed

    def _choose(self, held: Iterable[str]) -> int | None:
        shared: Counter[int] = Counter()
        for lora in held:
            shared.update(islice(self._needing.get(lora, ()), LOOKS))
        if shared:
            return max(shared, key=lambda number: (shared[number], -number))
        return next(iter(self._free), None)

    def _steal(self) -> int | None:
        """Cut the block that takes longest still, and give back the number of its second half."""
        while self._longest:
            work, number = self._longest[0]
            if number not in self._worker:
                heapq.heappop(self._longest)
            elif -work > self._work(number) + 1e-9:  # some of it was done since
                heapq.heapreplace(self._longest, (-self._work(number), number))
            else:
                block = self._blocks[number]
                stolen = [block.pop() for _ in range((len(block) + 1) // 2)][::-1]
                self.left -= len(stolen)
                if not block:
                    self._drop(number)
                self.add(stolen)
                return self._numbers - 1
        return None

    def _work(self, number: int) -> float:
        return len(self._blocks[number]) * self.slowness.get(self._worker[number], 1.0)

    def _set_free(self, number: int) -> None:
        self._free[number] = None
        needed = loras(self._blocks[number])
        self._loras[number] = len(needed)
        self._free_loads += len(needed)
        self._new.pop(number, None)
        for lora in needed:
            self._needing.setdefault(lora, {})[number] = None

    def _unset_free(self, number: int) -> None:
        if self._free.pop(number, 0) is None:
            self._free_loads -= self._loras.pop(number)
            for lora in loras(self._blocks[number]):
                self._needing.get(lora, {}).pop(number, None)

    def _claim(self, worker: str, number: int, held: Iterable[str]) -> None:
        self._unset_free(number)
        self._new[number] = len(loras(self._blocks[number]).difference(held)) / len(self._blocks[number])
        self._own[worker], self._worker[number] = number, worker
        heapq.heappush(self._longest, (-self._work(number), number))

    def _drop(self, number: int) -> None:
        """An empty block is nobody's."""
        if self._free.pop(number, 0) is None:
            self._free_loads -= self._loras.pop(number)
        self._new.pop(number, None)
        worker = self._worker.pop(number, None)
        if worker is not None:
            del self._own[worker]
        del self._blocks[number]
