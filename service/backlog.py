"""The work of a run that nobody has in hand: what is tried again, trainings that pairs wait for, what is left of the
grid. No clock, no Ray."""

from collections.abc import Callable, Iterable, Sequence

from service.boards import Boards
from service.faults import Limits
from service.jobs import Job, TrainJob, Work
from service.messages import Tile
from service.retries import Retries
from service.trainings import Trainings


class Backlog:
    """workers: how many there will be. need: bytes of a GPU's memory that a job is thought to need."""

    def __init__(
        self,
        jobs: Sequence[Job],
        trainings: Sequence[TrainJob],
        workers: int,
        need: Callable[[Job], int] | None,
        limits: Limits,
    ) -> None:
        self.trainings = Trainings(trainings, jobs)
        self.board = Boards(self.trainings.ready, workers, need)
        self.retries = Retries(limits)

    def before_the_grid(self, worker: str, now: float, workers: int) -> Tile | None:
        """What goes first for one of so many workers: jobs to be tried again whose time has come, else a training."""
        jobs = self.retries.take(worker, now, workers == 1, lambda job: self._fits(job, worker))
        if jobs:
            return Tile(jobs)
        training = self.trainings.take(workers, self.board.left)
        return None if training is None else Tile((training,))

    def put_back(self, work: Iterable[Work]) -> None:
        """Nobody has it in hand any more, and nothing counts against it."""
        jobs = []
        for job in work:
            if isinstance(job, TrainJob):
                self.trainings.put_back(job)
            else:
                jobs.append(job)
        self.board.add(jobs)

    def remove(self, lora: str) -> list[Work]:
        """Take out, and return, every job that needs this LoRA, and those that wait together with one."""
        return [*self.board.remove(lora), *self.retries.remove(lora)]

    def too_large(self, job: Work, worker: str) -> bool:
        """See Boards.too_large; a training goes wherever it is sent."""
        return isinstance(job, Job) and self.board.too_large(job, worker)

    def _fits(self, job: Work, worker: str) -> bool:
        return isinstance(job, TrainJob) or self.board.fits(job, worker)
