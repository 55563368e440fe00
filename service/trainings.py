"""LoRAs that have to be trained before the pairs that use them: which are left, and who waits for which. Pure."""

from collections import deque
from collections.abc import Iterable, Sequence

from service.jobs import Job, TrainJob


class Trainings:
    """What is left to train, and the jobs that cannot start before."""

    def __init__(self, trainings: Iterable[TrainJob], jobs: Iterable[Job]) -> None:
        self._free = deque(trainings)
        self._waiting: dict[str, dict[str, Job]] = {job.job_id: {} for job in self._free}  # training → jobs by id
        self.ready: list[Job] = []  # those that wait for none
        for job in jobs:
            if not self._waits(job):
                self.ready.append(job)
            for training_id in self._of(job):
                self._waiting[training_id][job.job_id] = job

    @property
    def left(self) -> int:
        """Trainings without an end, under way or not."""
        return len(self._waiting)

    def take(self, workers: int, pairs: int) -> TrainJob | None:
        """A training for a free worker, one of so many, unless the last worker that does not train has `pairs` to do:
        those do not wait for what they do not need."""
        under_way = self.left - len(self._free)
        if not self._free or (pairs and under_way >= workers - 1):
            return None
        return self._free.popleft()

    def put_back(self, job: TrainJob) -> None:
        """Nobody trains it any more."""
        self._free.appendleft(job)

    def done(self, training_id: str) -> Sequence[Job]:
        """It is trained; the jobs that now wait for none."""
        jobs = self._waiting.pop(training_id).values()
        return [job for job in jobs if not self._waits(job)]

    def given_up(self, training_id: str) -> Sequence[Job]:
        """It will not be trained; the jobs that need it, which wait for no other any more."""
        jobs = list(self._waiting.pop(training_id).values())
        for job in jobs:
            for other in self._of(job):
                del self._waiting[other][job.job_id]
        return jobs

    def _of(self, job: Job) -> list[str]:
        """The trainings without an end that it needs, each once."""
        return [training_id for training_id in dict.fromkeys(job.trainings) if training_id in self._waiting]

    def _waits(self, job: Job) -> bool:
        return any(training_id in self._waiting for training_id in job.trainings)
