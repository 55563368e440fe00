"""The grid cut into blocks that share LoRAs, and what a failure leads to. Pure functions: no clock, no waiting, no Ray.

A worker's cost is loading and calibrating each LoRA once plus merging each pair. A near-square block of the grid
needs the fewest LoRAs per pair: 16×16 calibrates 32 LoRAs for 256 pairs, where a row of 256 would calibrate 257.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from service.jobs import Job

TILE_SIDE = 16


@dataclass(frozen=True, slots=True)
class Limits:
    """Attempts per job before it is given up, by kind of failure, and seconds that one job may take."""

    attempts: int = 3
    deadline_s: float = 3600.0
    no_retry: frozenset[str] = frozenset({"BadInput", "StoreFull", "AccessDenied"})


def cut(jobs: Sequence[Job], workers: int, side: int = TILE_SIDE) -> list[tuple[Job, ...]]:
    """Blocks of at most side×side pairs, in the manifest's order, and at least `workers` of them while there are
    that many pairs.

    Within a block jobs go through it row by row in serpentine order, so that neighbours share a LoRA.
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

    def serpentine(job: Job) -> tuple[int, int]:
        row, column = rows[job.subject.id], columns[job.style.id]
        return row, column if row % 2 == 0 else -column

    return [tuple(sorted(block, key=serpentine)) for block in blocks.values()]


def choose(tiles: Mapping[int, Sequence[Job]], held: frozenset[str], taken: frozenset[int]) -> int | None:
    """Which tile a worker turns to next: the one whose LoRAs it holds most of, untouched tiles before those that
    another works on.

    `held` are sha256 of LoRAs in the worker's cache; `taken` the tiles that have a worker. None when there is no work.
    """

    def merit(number: int) -> tuple[bool, int, int]:
        loras = {lora for job in tiles[number] for lora in (job.subject.lora_sha256, job.style.lora_sha256)}
        return number not in taken, len(loras & held), -number

    return max((number for number, jobs in tiles.items() if jobs), key=merit, default=None)


def gives_up(kind: str, attempts: int, limits: Limits) -> bool:
    """Whether a job that failed `attempts` times, the last time with `kind`, is not tried again."""
    return kind in limits.no_retry or attempts >= limits.attempts


def backoff_s(attempt: int, jitter: float, base_s: float = 1.0, limit_s: float = 60.0) -> float:
    """Seconds before attempt + 1: exponential, with `jitter` in [0, 1) spreading it over the upper half."""
    return min(limit_s, base_s * 2 ** (attempt - 1)) * (0.5 + jitter / 2)
