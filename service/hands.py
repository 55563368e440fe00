"""The workers of a run as the control loop keeps them: who has nothing to do, who rests, what each has in hand, and how
late it is with that."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from service.jobs import Work


@dataclass(slots=True)
class Hand:
    """`given`: jobs without a result, by id; `begun` of them were announced, `now` are being merged since
    `merging_since`; `tile` are the ids of its current tile; `done_elsewhere` of jobs that it has and a copy on another
    worker has settled. `since`: its last commit, or when it began to work."""

    given: dict[str, Work] = field(default_factory=dict)
    tile: tuple[str, ...] = ()
    begun: set[str] = field(default_factory=set)
    now: tuple[str, ...] = ()
    done_elsewhere: set[str] = field(default_factory=set)
    since: float = 0.0
    merging_since: float = 0.0
    held: frozenset[str] = frozenset()
    side_by_side: int = 1
    leaving: bool = False
    failures: int = 0  # of jobs, one after another


class Hands:
    """The workers that are ready, in the order in which they came."""

    def __init__(self) -> None:
        self.of: dict[str, Hand] = {}
        self.free: dict[str, None] = {}  # to be fed
        self.resting: dict[str, None] = {}  # free, and there was nothing for them
        self.sick: dict[str, float] = {}  # worker → until when it rests
        self.copied: set[str] = set()  # jobs that two workers were given

    def join(self, worker: str) -> None:
        self.of[worker] = Hand()
        self.free[worker] = None

    def leave(self, worker: str) -> Hand | None:
        """What it had in hand; None if it never was ready."""
        self.free.pop(worker, None)
        self.resting.pop(worker, None)
        return self.of.pop(worker, None)

    def wake(self) -> None:
        """There is something new to do: those at rest are to be fed again."""
        self.free |= self.resting
        self.resting.clear()

    def twin(self, job_id: str, worker: str) -> str | None:
        """The other worker that has the job in hand."""
        if job_id not in self.copied:
            return None
        return next((other for other, hand in self.of.items() if other != worker and job_id in hand.given), None)

    def ended(self, job_id: str) -> None:
        """The job is over; whoever has a copy of it goes on with that for nothing."""
        if job_id in self.copied:
            for hand in self.of.values():
                if hand.given.pop(job_id, None) is not None:
                    hand.begun.discard(job_id)
                    hand.done_elsewhere.add(job_id)


def late_jobs(hand: Hand, now: float, job_s: Callable[[Work], float | None]) -> Iterator[tuple[float, Work]]:
    """(seconds until it will be done, job) of what is being merged or waits behind that. job_s: what a job takes this
    worker, None while nobody knows. What takes longer than it should will take as long again."""
    seconds = 0.0
    for job_id in dict.fromkeys((*hand.now, *hand.tile)):
        job = hand.given.get(job_id)
        own_s = None if job is None else job_s(job)
        if job is None or own_s is None or (job_id in hand.begun and job_id not in hand.now):
            continue  # done, of an unknown length, or being uploaded
        if job_id in hand.now:
            expected, passed = own_s * len(hand.now), now - hand.merging_since
            seconds = expected - passed if passed < expected else passed
        else:
            seconds += own_s
        yield seconds, job
