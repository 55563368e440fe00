"""What is left of the grid, by priority and by the memory that it needs. No clock, no Ray.

Normally that is a single board of tiles.py, since all jobs are alike in both. A job that needs more memory than some
worker has lies on a board of its own, so that such a worker never sees it; one of a higher priority does, too.
"""

from collections.abc import Callable, Iterable, Sequence

from service.jobs import Job
from service.messages import Tile
from service.tiles import Board, cut


class Boards:
    """A worker gets the first that fits from the board of the highest priority; among equals, from the one that fewest
    workers have room for.

    need: bytes of a GPU's memory that a job is thought to need: a guess, so the worker with most memory may try each,
    once all are there (`complete`).
    """

    def __init__(self, jobs: Sequence[Job], workers: int, need: Callable[[Job], int] | None = None) -> None:
        self.complete = True  # no worker is still to come that may have more memory
        self.slowness: dict[str, float] = {}  # of workers that are slower or faster than the usual 1.0
        self._need = need or (lambda job: 0)
        self._needs = {self._need(job) for job in jobs}
        self._raised: dict[int, int] = {}  # need as guessed → as it turned out
        self._room: dict[str, int | None] = {}  # of a worker; None: it has no GPU, and nothing is too large for it
        self._apart: set[int] = set()  # needs, as guessed, that some worker has no room for
        self._boards: dict[tuple[int, int], Board] = {}  # (−priority, −need if apart) → board, in the order of these
        by_priority: dict[int, list[Job]] = {}
        for job in jobs:
            by_priority.setdefault(job.priority, []).append(job)
        for priority in sorted(by_priority, reverse=True):
            self._boards[-priority, 0] = Board(cut(by_priority[priority], workers), self.slowness)

    @property
    def left(self) -> int:
        return sum(board.left for board in self._boards.values())

    @property
    def loads(self) -> float:
        """LoRAs that workers will have to load for what is left."""
        return sum(board.loads for board in self._boards.values())

    def join(self, worker: str, room: int | None) -> None:
        """A worker is there, with so many bytes of a GPU's memory."""
        self._room[worker] = room
        self._part()

    def leave(self, worker: str) -> None:
        self._room.pop(worker, None)

    def fits(self, job: Job, worker: str) -> bool:
        return self._fits(self._need(job), worker)

    def too_large(self, job: Job, worker: str) -> bool:
        """Memory did not suffice for this job on this worker. True if others have more: they get all of its kind from
        now on, and the job is not to blame."""
        room = self._room.get(worker)
        if room is None or (self.complete and self._is_largest(room)):
            return False
        guessed = self._need(job)
        self._raised[guessed] = max(self._raised.get(guessed, 0), room + 1)
        self._part()
        return True

    def take(self, worker: str, n: int, held: Iterable[str] = ()) -> Tile | None:
        """At most `n` jobs, see Board.take."""
        for (_, need), board in self._boards.items():
            if board.left and self._fits(-need, worker):
                tile = board.take(worker, n, held)
                if tile is not None:
                    return tile
        return None

    def add(self, jobs: Sequence[Job]) -> None:
        """What came back from a worker that was lost."""
        by_board: dict[tuple[int, int], list[Job]] = {}
        for job in jobs:
            by_board.setdefault(self._key(job), []).append(job)
        for key, some in by_board.items():
            self._board(key).add(some)

    def admit(self, jobs: Sequence[Job], workers: int) -> None:
        """Jobs that had to wait for something until now."""
        self._needs |= {self._need(job) for job in jobs}
        self._part()
        by_board: dict[tuple[int, int], list[Job]] = {}
        for job in jobs:
            by_board.setdefault(self._key(job), []).append(job)
        for key, some in by_board.items():
            for block in cut(some, workers):
                self._board(key).add(block)

    def release(self, worker: str) -> None:
        """The worker's blocks are anybody's again."""
        for board in self._boards.values():
            board.release(worker)

    def remove(self, lora: str) -> list[Job]:
        """Take out, and return, every job that needs this LoRA."""
        return [job for board in self._boards.values() for job in board.remove(lora)]

    def _fits(self, need: int, worker: str) -> bool:
        room, need = self._room.get(worker), self._raised.get(need, need)
        return room is None or need <= room or (self.complete and self._is_largest(room))

    def _is_largest(self, room: int) -> bool:
        return all(other is not None and other <= room for other in self._room.values())

    def _key(self, job: Job) -> tuple[int, int]:
        need = self._need(job)
        return -job.priority, -need if need in self._apart else 0

    def _board(self, key: tuple[int, int]) -> Board:
        if key not in self._boards:
            self._boards[key] = Board(slowness=self.slowness)
            self._boards = dict(sorted(self._boards.items()))
        return self._boards[key]

    def _part(self) -> None:
        """Put what does not fit everybody onto boards of its own, once."""
        smallest = min((room for room in self._room.values() if room is not None), default=None)
        if smallest is None:
            return
        new = {need for need in self._needs - self._apart if self._raised.get(need, need) > smallest}
        if not new:
            return
        self._apart |= new
        apart = [job for board in self._boards.values() for job in board.pull(lambda job: self._need(job) in new)]
        by_board: dict[tuple[int, int], list[Job]] = {}
        for job in apart:
            by_board.setdefault(self._key(job), []).append(job)
        for key, some in by_board.items():
            for block in cut(some, len(self._room)):
                self._board(key).add(block)
