"""What a failure leads to. Pure functions and values: no clock, no waiting, no Ray.

An attempt counts against a job only when nothing but the job can be to blame for its end. A store that is away, a node
that was taken back, a neighbour in the same forward pass: these cost time, within a budget, and no attempts.
"""

import re
from collections import deque
from dataclasses import dataclass
from typing import Literal

BACKOFF_S = (1.0, 60.0)  # before the second attempt, and at most
STORE_BACKOFF_S = (5.0, 120.0)  # a store that is away or overloaded is asked less often
ELSEWHERE_S = 60.0  # how long a failed job waits for another worker than the one it failed on

Fault = Literal["its own", "one of several", "none of its"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Attempts per job before it is given up; seconds that one job may take, and that a store may be away; how often a
    job may come back through no fault of its own (a lost worker, a split) before it counts all the same. `copies`: how
    many idle workers may do a job as well that another is late with, 0 or 1."""

    attempts: int = 3
    deadline_s: float = 3600.0
    outage_s: float = 1800.0
    returns: int = 20
    copies: int = 1
    no_retry: frozenset[str] = frozenset({"BadInput"})


@dataclass(frozen=True, slots=True)
class History:
    """What a job has been through, this failure left out: attempts that counted, ends that did not, and seconds since
    the store first failed it without a success in between."""

    attempts: int = 0
    returns: int = 0
    store_away_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """`counts`: an attempt is used up. `elsewhere`: on another worker, while there is one. `alone`: without the
    neighbours that may be to blame instead."""

    retry: bool
    counts: bool
    wait_s: float = 0.0
    elsewhere: bool = False
    alone: bool = False


def after_failure(kind: str, fault: Fault, history: History, limits: Limits, jitter: float) -> Verdict:
    """What becomes of a job whose attempt ended with `kind`, the name of an error of service/errors.py.

    fault: whether it can only be the job's own, may be any of those that were merged with it, or is known to be none of
    its (the worker's node was taken back, the job had not begun). jitter: in [0, 1).
    """
    if kind in limits.no_retry:
        return Verdict(retry=False, counts=True)
    if kind == "Unavailable":
        away = history.store_away_s >= limits.outage_s
        return Verdict(not away, counts=False, wait_s=backoff_s(history.returns + 1, jitter, *STORE_BACKOFF_S))
    if history.returns < limits.returns:
        if fault == "none of its":
            return Verdict(retry=True, counts=False)
        if fault == "one of several":
            return Verdict(retry=True, counts=False, alone=True)
    attempts = history.attempts + 1
    return Verdict(
        retry=attempts < limits.attempts, counts=True, wait_s=backoff_s(attempts, jitter), elsewhere=True, alone=True
    )


def backoff_s(attempt: int, jitter: float, base_s: float = BACKOFF_S[0], limit_s: float = BACKOFF_S[1]) -> float:
    """Seconds before attempt + 1: exponential, with `jitter` in [0, 1) spreading it over the upper half."""
    return min(limit_s, base_s * 2 ** min(attempt - 1, 30)) * (0.5 + jitter / 2)


class Breaker:
    """Trips when most of the last attempts failed the same way, on several workers: what is wrong then is not the jobs,
    and going on would give up one after another for a reason that can be mended once."""

    def __init__(self, window: int = 40, least: int = 15, share: float = 0.75) -> None:
        self.least, self.share = least, share
        self._last: deque[tuple[str, str] | None] = deque(maxlen=window)  # (how, on which worker)

    def note(self, kind: str | None, reason: str = "", worker: str = "", workers: int = 1) -> str | None:
        """An attempt that ended, with None if well, on one of so many workers. What most failed with, if it is time to
        stop."""
        self._last.append(None if kind is None else (f"{kind}: {_gist(reason)}", worker))
        if kind is None or len(self._last) < self.least:
            return None
        same = [where for how, where in filter(None, self._last) if how == f"{kind}: {_gist(reason)}"]
        if len(same) < max(self.least, self.share * len(self._last)) or len(set(same)) < min(2, workers):
            return None
        return f"{len(same)} of the last {len(self._last)} attempts failed the same way ({kind}: {reason})"


def _gist(reason: str) -> str:
    """A reason without what differs from job to job: names of pairs, paths, numbers and digests."""
    return re.sub(r"\S*[/\d]\S*", "#", reason)[:120]
