"""What each worker has in hand, as the control loop keeps it, and how late it is with that."""

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
