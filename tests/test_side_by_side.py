"""How many pairs share a forward pass, from what merges needed."""

from service.side_by_side import MOST, REGROW, SideBySide

GB = 10**9


def test_on_a_cpu_it_is_one_and_stays_one() -> None:
    one = SideBySide(0, on_gpu=False)
    for _ in range(100):
        one.fitted(1, 0, 0)
    assert one.size == 1


def test_a_gpu_takes_what_its_free_memory_holds() -> None:
    for free, expected in ((20 * GB, 3), (60 * GB, 9), (1000 * GB, MOST), (3 * GB, 1)):
        learned = SideBySide(0, on_gpu=True)
        learned.fitted(1, 5 * GB, free)
        assert learned.size == expected


def test_too_many_halves_and_it_grows_back_one_by_one() -> None:
    sizes = SideBySide(0, on_gpu=True)
    sizes.fitted(1, 5 * GB, 60 * GB)
    sizes.too_many(9)
    assert sizes.size == 4
    seen = []
    for _ in range(3 * REGROW):
        sizes.fitted(sizes.size, sizes.size * 5 * GB, 60 * GB)
        seen.append(sizes.size)
    assert seen == sorted(seen)
    assert seen[-1] == 7
    sizes.too_many(1)
    assert sizes.size == 1


def test_a_fixed_number_is_kept_unless_it_does_not_fit() -> None:
    fixed = SideBySide(4, on_gpu=False)
    assert fixed.size == 4
    fixed.fitted(4, 0, 0)
    assert fixed.size == 4
    fixed.too_many(4)
    assert fixed.size == 2


def test_the_last_few_jobs_of_a_tile_say_nothing_about_more() -> None:
    sizes = SideBySide(0, on_gpu=True)
    sizes.fitted(1, 5 * GB, 60 * GB)
    sizes.fitted(2, 10 * GB, 20 * GB)
    assert sizes.size == 9
