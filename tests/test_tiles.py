"""The grid's cut and the policies on failures: pure functions, so plain examples."""

from collections import Counter
from itertools import pairwise

from service.jobs import BaseRef, Concept, Job, SampleSettings
from service.tiles import Limits, backoff_s, choose, cut, gives_up

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


def loras(tile: tuple[Job, ...]) -> int:
    return len({lora for job in tile for lora in (job.subject.lora_sha256, job.style.lora_sha256)})


def test_every_job_is_in_exactly_one_tile() -> None:
    jobs = grid(37, 21)[::2]  # a sparse grid
    counts = Counter(job.job_id for tile in cut(jobs, workers=4) for job in tile)
    assert counts == Counter(job.job_id for job in jobs)


def test_a_full_tile_loads_32_loras_for_256_pairs() -> None:
    tiles = cut(grid(32, 32), workers=1)
    assert [(len(tile), loras(tile)) for tile in tiles] == [(256, 32)] * 4


def test_small_grids_have_a_tile_for_every_worker() -> None:
    assert len(cut(grid(4, 4), workers=4)) == 4
    assert len(cut(grid(2, 2), workers=16)) == 4
    assert cut([], workers=3) == []


def test_neighbours_in_a_tile_share_a_lora() -> None:
    (tile,) = cut(grid(5, 5), workers=1)
    assert all(a.subject.id == b.subject.id or a.style.id == b.style.id for a, b in pairwise(tile))


def test_a_worker_takes_the_tile_whose_loras_it_holds() -> None:
    tiles = dict(enumerate(cut(grid(4, 4), workers=4)))
    held = frozenset(lora for job in tiles[2] for lora in (job.subject.lora_sha256, job.style.lora_sha256))
    assert choose(tiles, held, frozenset()) == 2
    assert choose(tiles, held, frozenset({2})) != 2
    assert choose(tiles, held, frozenset({0, 1, 2, 3})) == 2  # helps out where all tiles have a worker
    assert choose({0: ()}, held, frozenset()) is None


def test_bad_input_is_never_tried_again_and_the_rest_up_to_the_limit() -> None:
    limits = Limits(attempts=3)
    assert gives_up("BadInput", 1, limits)
    assert not gives_up("WorkerLost", 2, limits)
    assert gives_up("WorkerLost", 3, limits)


def test_backoff_grows_and_is_bounded() -> None:
    assert [backoff_s(attempt, jitter=1.0) for attempt in (1, 2, 3, 10)] == [1.0, 2.0, 4.0, 60.0]
    assert backoff_s(3, jitter=0.0) == 2.0
