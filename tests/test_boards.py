"""Who gets which jobs where they differ in priority, or in the memory that they need."""

import dataclasses
from collections import Counter

from service.boards import Boards
from service.jobs import Job
from tests.test_tiles import grid

GIB = 2**30
NEEDS = {"direct": 4 * GIB, "ziplora": 20 * GIB}


def jobs_of(method: str, priority: int = 0) -> list[Job]:
    return [dataclasses.replace(job, method=method, priority=priority) for job in grid(4, 4)]


def need(job: Job) -> int:
    return NEEDS[job.method]


def all_of(boards: Boards, worker: str, n: int = 3) -> list[Job]:
    taken: list[Job] = []
    while tile := boards.take(worker, n):
        taken += tile.jobs
    return taken


def test_what_has_priority_goes_first() -> None:
    boards = Boards([*jobs_of("direct"), *jobs_of("ziplora", priority=2)], workers=2)
    assert boards.left == 32
    assert [job.method for job in all_of(boards, "a")] == ["ziplora"] * 16 + ["direct"] * 16
    boards.add(jobs_of("direct")[:1])  # what comes back keeps its place
    boards.add(jobs_of("ziplora", priority=2)[:1])
    assert [job.method for job in all_of(boards, "b")] == ["ziplora", "direct"]


def test_a_small_gpu_never_gets_what_does_not_fit_and_a_large_one_begins_with_it() -> None:
    boards = Boards([*jobs_of("direct"), *jobs_of("ziplora")], 2, need)
    boards.join("large", 80 * GIB)
    boards.join("small", 16 * GIB)
    small, first = boards.take("small", 5), boards.take("large", 5)
    assert small is not None
    assert first is not None
    assert {job.method for job in small.jobs} == {"direct"}
    assert {job.method for job in first.jobs} == {"ziplora"}
    rest = [*all_of(boards, "small"), *all_of(boards, "large")]
    assert Counter([*small.jobs, *first.jobs, *rest]) == Counter([*jobs_of("direct"), *jobs_of("ziplora")])
    assert not boards.fits(jobs_of("ziplora")[0], "small")


def test_alike_workers_share_one_board_so_that_both_methods_of_a_pair_stay_together() -> None:
    boards = Boards([*jobs_of("direct"), *jobs_of("ziplora")], 1, need)
    boards.join("a", 80 * GIB)
    boards.join("b", 24 * GIB)
    tile = boards.take("a", 2)
    assert tile is not None
    assert {(job.pair, job.method) for job in tile.jobs} == {
        ("subject0/style0", "direct"),
        ("subject0/style0", "ziplora"),
    }


def test_the_need_is_a_guess_so_the_largest_worker_may_try() -> None:
    boards = Boards(jobs_of("ziplora"), 1, need)
    boards.join("small", 8 * GIB)
    boards.join("smaller", 6 * GIB)
    assert boards.take("smaller", 1) is None
    assert boards.take("small", 1) is not None
    boards.leave("small")
    assert boards.take("smaller", 1) is not None
    boards.join("no GPU", None)
    assert boards.take("smaller", 1) is None
    assert boards.take("no GPU", 1) is not None


def test_where_memory_did_not_suffice_only_larger_workers_get_the_rest_of_the_kind() -> None:
    boards = Boards([*jobs_of("direct"), *jobs_of("ziplora")], 2, need)
    boards.join("large", 80 * GIB)
    boards.join("small", 24 * GIB)
    failed = jobs_of("ziplora")[0]
    assert boards.too_large(failed, "small")
    assert not boards.fits(failed, "small")
    assert {job.method for job in all_of(boards, "small")} == {"direct"}
    assert not boards.too_large(failed, "large")  # no larger one is there: then it is the job that is too large
    assert {job.method for job in all_of(boards, "large")} == {"ziplora"}
    assert boards.left == 0


def test_jobs_of_a_lora_leave_every_board() -> None:
    boards = Boards([*jobs_of("direct"), *jobs_of("ziplora", priority=1)], 2)
    assert len(boards.remove("style0")) == 8
    assert boards.left == 24
