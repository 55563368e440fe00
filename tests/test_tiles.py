"""The grid's cut and who gets which part of it: pure, so plain examples."""

import random
from collections import Counter
from itertools import pairwise

import pytest

from service.jobs import BaseRef, Concept, Job, SampleSettings
from service.tiles import Board, copies, curve, cut, loras, tile_size, workers_wanted

BASE = BaseRef("/base", None, "b" * 64, "sdxl")
SAMPLES = SampleSettings((), (), 50, 5.0, 64, 64)


def job(subject: int, style: int) -> Job:
    concepts = [
        Concept(f"{role}{number}", role, f"/{role}{number}", f"{role}{number}", "prompt", "trigger")  # type: ignore[arg-type]
        for role, number in (("subject", subject), ("style", style))
    ]
    return Job(BASE, concepts[0], concepts[1], "direct", {}, 0, SAMPLES)


def grid(subjects: int, styles: int) -> list[Job]:
    return [job(subject, style) for subject in range(subjects) for style in range(styles)]


def test_every_job_is_in_exactly_one_tile() -> None:
    jobs = grid(37, 21)[::2]  # a sparse grid
    counts = Counter(job.job_id for tile in cut(jobs, workers=4) for job in tile)
    assert counts == Counter(job.job_id for job in jobs)


def test_a_full_tile_loads_32_loras_for_256_pairs() -> None:
    tiles = cut(grid(32, 32), workers=1)
    assert [(len(tile), len(loras(tile))) for tile in tiles] == [(256, 32)] * 4


def test_small_grids_have_a_tile_for_every_worker() -> None:
    assert len(cut(grid(4, 4), workers=4)) == 4
    assert len(cut(grid(2, 2), workers=16)) == 4
    assert cut([], workers=3) == []


def test_neighbours_in_a_tile_share_a_lora() -> None:
    (tile,) = cut(grid(5, 5), workers=1)
    assert all(a.subject.id == b.subject.id or a.style.id == b.style.id for a, b in pairwise(tile))


def take_all(board: Board, worker: str, n: int = 7) -> list[Job]:
    jobs: list[Job] = []
    while tile := board.take(worker, n, loras(jobs)):
        assert 0 < len(tile.jobs) <= n
        jobs += tile.jobs
    return jobs


class TestCurve:
    @pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (7, 1), (5, 5), (16, 16), (3, 16), (16, 5), (13, 8)])
    def test_it_visits_every_cell_once_and_moves_to_neighbours(self, height: int, width: int) -> None:
        places = curve(height, width)
        assert sorted(places.values()) == list(range(height * width))
        cells = sorted(places, key=places.__getitem__)
        steps = [abs(a[0] - b[0]) + abs(a[1] - b[1]) for a, b in pairwise(cells)]
        assert set(steps) <= {1, 2}
        assert steps.count(2) <= 1

    def test_any_stretch_of_it_is_nearly_square(self) -> None:
        (block,) = cut(grid(16, 16), workers=1)
        for first in range(0, 240, 16):
            assert len(loras(block[first : first + 16])) <= 10  # a row of 16 would need 17, a square needs 8


def test_a_sparse_grid_is_joined_into_blocks_that_are_worth_it() -> None:
    jobs = random.Random(0).sample(grid(160, 160), 256)  # two or three pairs in each of a hundred blocks of 16×16
    tiles = cut(jobs, workers=1)
    assert Counter(job for tile in tiles for job in tile) == Counter(jobs)
    assert len(tiles) < 50
    assert all(len(loras(tile)) <= 32 for tile in tiles)


class TestBoard:
    def test_a_worker_stays_in_its_block_and_then_goes_where_it_holds_most(self) -> None:
        board = Board(cut(grid(8, 8), workers=16))  # 2×2 blocks
        first = board.take("a", 3)
        assert first is not None
        assert len(first.jobs) == 3
        assert len(first.ahead) == 1
        second = board.take("a", 3)
        assert second is not None
        assert second.jobs == first.ahead
        held = loras([*first.jobs, *second.jobs])
        third = board.take("a", 3, held)
        assert third is not None
        assert len(loras(third.jobs) & held) >= 1

    def test_all_is_given_out_once_whoever_takes_it(self) -> None:
        jobs, board = grid(20, 20), Board(cut(grid(20, 20), workers=3))
        taken: list[Job] = []
        for turn in range(1000):
            tile = board.take(f"worker-{turn % 5}", 1 + turn % 9)
            if tile is None:
                break
            taken += tile.jobs
        assert Counter(taken) == Counter(jobs)
        assert board.left == 0
        assert board.take("late", 1) is None

    def test_with_nothing_free_the_longest_work_is_shared(self) -> None:
        board = Board([grid(8, 8)])
        first = board.take("slow", 1)
        assert first is not None
        tile = board.take("idle", 100)
        assert tile is not None
        assert len(tile.jobs) == 32  # half of what the other has not begun
        rest = take_all(board, "slow")
        assert Counter([*first.jobs, *tile.jobs, *rest]) == Counter(grid(8, 8))

    def test_the_slow_are_robbed_first(self) -> None:
        board = Board([grid(4, 4), grid(4, 5)])
        board.slowness["slow"] = 10.0
        for worker in ("slow", "quick"):
            board.take(worker, 1)
        tile = board.take("idle", 100)
        assert tile is not None
        assert len(tile.jobs) == 8  # of the 15 that the slow one has left, not of the 19 of the quick one

    def test_what_a_lost_worker_had_is_anybodys(self) -> None:
        board = Board([grid(4, 4)])
        tile = board.take("dead", 4)
        assert tile is not None
        board.add(tile.jobs)
        board.release("dead")
        assert Counter(take_all(board, "other")) == Counter(grid(4, 4))

    def test_every_job_of_a_lora_is_taken_out(self) -> None:
        board = Board(cut(grid(6, 6), workers=4))
        board.take("a", 1)
        removed = board.remove("subject5")
        assert {one.pair for one in removed} == {f"subject5/style{i}" for i in range(6)}
        assert not any(one.subject.id == "subject5" for one in take_all(board, "b"))
        assert board.left == 0


def test_tiles_shrink_towards_the_end_and_start_small_where_nothing_is_known() -> None:
    assert tile_size(None, left=1000, workers=4, side_by_side=1) == 1
    sizes = [tile_size(10.0, left, workers=4, side_by_side=1) for left in (10_000, 1000, 100, 10, 3)]
    assert sizes == [12, 12, 6, 1, 1]
    assert tile_size(0.0, left=10**6, workers=4, side_by_side=1) > 1000  # no-op work goes out in bulk
    assert tile_size(10.0, left=1000, workers=4, side_by_side=16) == 16


def test_the_latest_jobs_are_copied_to_the_fastest_idle_workers_while_that_gains_time() -> None:
    early, late, latest = grid(1, 3)
    idle = [(30.0, "slow"), (10.0, "quick"), (10.0, "quick too")]
    found = list(copies([(14.0, early), (90.0, late), (200.0, latest)], idle))
    assert found == [("quick", latest), ("quick too", late)]  # the early one is as good as done
    assert list(copies([(40.0, late)], [(30.0, "slow")])) == []


def test_one_more_worker_is_wanted_for_every_few_minutes_of_work() -> None:
    assert workers_wanted(None, jobs=50) == 1
    assert workers_wanted(10.0, jobs=50) == 1
    assert workers_wanted(3000.0, jobs=50) == 10
    assert workers_wanted(1e6, jobs=50) == 50
    assert workers_wanted(0.0, jobs=0) == 0


def test_the_loras_still_to_load_are_counted() -> None:
    board = Board(cut(grid(8, 8), workers=4))  # four blocks of 4×4
    assert board.loads == 4 * 8
    tile = board.take("a", 4)
    assert tile is not None
    assert board.loads == 3 * 8 + 8 * 12 / 16
    take_all(board, "a")
    assert board.loads == 0
