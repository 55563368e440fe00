"""The control loop under every fault, in virtual time: exact attempts, nothing lost, nothing committed twice."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from service import events
from service.catalog import Catalog
from service.errors import RunStopped
from service.faults import Limits
from service.jobs import Job
from service.metrics import Metrics
from service.outcomes import Progress
from service.run import run
from tests.bench.chaos import chaos
from tests.bench.simulated import SimulatedPool, World, grid
from tests.test_metrics import values

LIMITS = Limits(attempts=3)


class Run:
    """Jobs of a grid through the real loop, by simulated workers."""

    def __init__(self, path: Path, world: World, jobs: list[Job], workers: int = 3, limits: Limits = LIMITS) -> None:
        self.pool, self.catalog, self.seen = SimulatedPool(workers, world), Catalog(path), list[events.Event]()
        self.jobs, self.limits, self.metrics = jobs, limits, Metrics("test", self.pool.clock)

    need: Callable[[Job], int] | None = None

    def drive(self) -> Progress:
        self.progress = run(
            self.jobs,
            self.pool,
            self.catalog,
            run_id="test",
            limits=self.limits,
            need=self.need,
            observers=[self.seen.append, self.metrics.observe],
            clock=self.pool.clock,
        )
        assert self.progress.left == 0
        assert Counter(self.progress.committed) + Counter(job for job, _ in self.progress.given_up) == Counter(
            self.jobs
        )
        return self.progress

    def attempts(self) -> dict[str, int]:
        return {
            job.pair: self.progress.attempts[job.job_id] for job in self.jobs if job.job_id in self.progress.attempts
        }

    def failed(self, *, counts: bool) -> list[events.JobFailed]:
        return [event for event in self.seen if isinstance(event, events.JobFailed) and event.counts == counts]


@pytest.mark.parametrize("side_by_side", [1, 2, 8])
def test_a_poison_pair_is_isolated_and_its_neighbours_lose_no_attempt(tmp_path: Path, side_by_side: int) -> None:
    world = World(poison=frozenset({"subject2/style3"}), side_by_side=side_by_side)
    made = Run(tmp_path, world, grid(6, 6))
    progress = made.drive()
    assert [job.pair for job, _ in progress.given_up] == ["subject2/style3"]
    assert made.attempts() == {job.pair: 3 if job.pair == "subject2/style3" else 1 for job in made.jobs}
    (failure,) = made.catalog.failures()
    assert (failure.kind, failure.attempts) == ("WorkerLost", 3)
    assert {event.job.pair for event in made.failed(counts=True)} == {"subject2/style3"}


def test_a_worker_that_hangs_is_ended_at_its_deadline_and_only_its_job_pays(tmp_path: Path) -> None:
    limits = Limits(deadline_s=500, copies=0)
    made = Run(tmp_path, World(hangs=frozenset({"subject1/style1"})), grid(4, 4), limits=limits)
    made.drive()
    assert made.attempts() == {job.pair: 2 if job.pair == "subject1/style1" else 1 for job in made.jobs}
    assert [event.kind for event in made.failed(counts=True)] == ["DeadlineExceeded"]


def test_what_hangs_at_the_end_is_done_by_an_idle_worker(tmp_path: Path) -> None:
    jobs = grid(4, 4)
    last = jobs[-1].pair
    made = Run(tmp_path, World(hangs=frozenset({last})), jobs, limits=Limits(deadline_s=5000))
    made.drive()
    assert set(made.attempts().values()) == {1}
    assert made.pool.now < 1000
    assert not made.failed(counts=True)
    found = values(made.metrics)
    assert [found[f"ziplora_jobs {state}"] for state in ("left", "running", "committed")] == [0, 0, 16]


def test_nobody_waits_for_a_straggler_at_the_end(tmp_path: Path) -> None:
    ends = []
    for copies in (0, 1):
        limits = Limits(copies=copies)
        made = Run(tmp_path / str(copies), World(slow_share=0.3), grid(20, 20), workers=8, limits=limits)
        assert {one.slowness for one in made.pool.workers.values()} == {1.0, 10.0}
        made.drive()
        assert set(made.attempts().values()) == {1}
        assert len(made.pool.done) == 400
        ends.append(made.pool.now)
    assert ends[1] < 0.8 * ends[0]


def test_a_copy_that_dies_leaves_the_job_to_the_other(tmp_path: Path) -> None:
    """Crashes of stragglers and helpers alike: attempts add up, and nothing is done or reported twice."""
    world = World(slow_share=0.5, crashes_per_hour=20.0)
    made = Run(tmp_path, world, grid(6, 6), workers=12, limits=Limits(attempts=50))
    made.drive()
    assert made.pool.losses > 3
    failed = Counter(event.job.pair for event in made.failed(counts=True))
    assert made.attempts() == {job.pair: failed[job.pair] + 1 for job in made.jobs}
    commits = Counter(event.job.pair for event in made.seen if isinstance(event, events.JobCommitted))
    assert set(commits.values()) == {1}
    found = values(made.metrics)
    assert [found[f"ziplora_jobs {state}"] for state in ("left", "running", "committed")] == [0, 0, 36]


def test_nodes_that_are_taken_back_cost_no_attempt(tmp_path: Path) -> None:
    made = Run(tmp_path, World(preemptions_per_hour=30.0), grid(8, 8))
    progress = made.drive()
    assert len(progress.committed) == 64
    assert made.pool.losses > 3
    assert set(progress.attempts.values()) == {1}
    assert not made.failed(counts=True)


def test_a_notice_lets_the_worker_end_what_it_does(tmp_path: Path) -> None:
    world = World(preemptions_per_hour=20.0, drained_share=1.0, notice_s=1e6)
    made = Run(tmp_path, world, grid(8, 8), workers=4)
    made.drive()
    gone = [event for event in made.seen if isinstance(event, events.WorkerGone)]
    assert gone
    assert all("drained" in event.reason for event in gone)
    assert made.pool.losses == 0
    assert not made.failed(counts=True)
    assert not made.failed(counts=False)


def test_a_store_that_is_away_costs_time_only(tmp_path: Path) -> None:
    made = Run(tmp_path, World(outages=((200.0, 1500.0),)), grid(6, 6))
    progress = made.drive()
    assert len(progress.committed) == 36
    assert set(progress.attempts.values()) == {1}
    assert {event.kind for event in made.failed(counts=False)} == {"Unavailable"}  # beyond the workers' own patience
    assert 1500 < made.pool.now < 2500
    assert any(isinstance(event, events.WorkerStalled) for event in made.seen)


def test_a_store_that_stays_away_ends_the_run(tmp_path: Path) -> None:
    made = Run(tmp_path, World(outages=((100.0, 1e9),), patience_s=60), grid(12, 12), limits=Limits(outage_s=1000))
    with pytest.raises(RunStopped, match=r"failed the same way \(Unavailable: the store does not answer\)"):
        made.drive()
    assert made.pool.now < 10_000


def test_a_broken_lora_is_one_reason_for_all_its_pairs(tmp_path: Path) -> None:
    made = Run(tmp_path, World(broken=frozenset({"style3"})), grid(20, 5))
    progress = made.drive()
    assert {job.pair for job, _ in progress.given_up} == {f"subject{i}/style3" for i in range(20)}
    assert {reason for _, reason in progress.given_up} == {"style3 is no LoRA"}
    assert len(made.failed(counts=True)) < 12  # those that workers had in hand in that moment
    assert values(made.metrics)["ziplora_jobs given_up"] == 20
    assert {failure.reason for failure in made.catalog.failures()} == {"style3 is no LoRA"}


def test_out_of_memory_is_tried_elsewhere_and_then_given_up(tmp_path: Path) -> None:
    made = Run(tmp_path, World(fails={"subject0/style0": ("OutOfMemory", "too large")}), grid(5, 5))
    progress = made.drive()
    assert [job.pair for job, _ in progress.given_up] == ["subject0/style0"]
    tried = [event.worker for event in made.failed(counts=True)]
    assert len(tried) == 3
    assert tried[0] != tried[1] != tried[2]


SMALL_AND_LARGE = World(
    rooms={"worker-0": 16 * 2**30, "worker-1": 16 * 2**30, "worker-2": 80 * 2**30}, needs={"ziplora": 20 * 2**30}
)


@pytest.mark.parametrize("guess", [0, 30 * 2**30], ids=["too low", "high enough"])
def test_what_does_not_fit_small_gpus_goes_to_large_ones_and_costs_no_attempt(tmp_path: Path, guess: int) -> None:
    """Two methods, of which one needs more memory than two of three workers have."""
    large = grid(6, 6)
    jobs = [*large, *(dataclasses.replace(job, method="direct") for job in large)]
    made = Run(tmp_path, SMALL_AND_LARGE, jobs)
    made.need = lambda job: guess if job.method == "ziplora" else 0
    progress = made.drive()
    assert len(progress.committed) == 72
    assert set(progress.attempts.values()) == {1}
    assert not made.failed(counts=True)
    by_method = {(event.job.method, event.worker) for event in made.seen if isinstance(event, events.JobCommitted)}
    assert {worker for method, worker in by_method if method == "ziplora"} == {"worker-2"}
    assert len({worker for method, worker in by_method if method == "direct"}) > 1
    returned = made.failed(counts=False)
    assert not returned if guess else 0 < len(returned) < 36  # those that they had in hand when they found out


def test_what_fits_nobody_is_tried_on_the_largest_and_given_up(tmp_path: Path) -> None:
    world = dataclasses.replace(SMALL_AND_LARGE, needs={"ziplora": 200 * 2**30})
    made = Run(tmp_path, world, grid(2, 2))
    made.need = lambda job: 100 * 2**30
    progress = made.drive()
    assert len(progress.given_up) == 4
    assert {event.worker for event in made.failed(counts=True)} == {"worker-2"}
    assert {failure.kind for failure in made.catalog.failures()} == {"OutOfMemory"}


def test_when_most_fail_for_one_reason_the_run_stops_and_says_so(tmp_path: Path) -> None:
    made = Run(tmp_path, World(fails={"*": ("StoreFull", "no space left at /x/1")}), grid(30, 30))
    with pytest.raises(RunStopped, match=r"15 of the last 15 attempts.*StoreFull: no space left.*900 jobs are left"):
        made.drive()
    assert values(made.metrics)["ziplora_jobs left"] > 890


def test_a_sick_worker_harms_nobody(tmp_path: Path) -> None:
    made = Run(tmp_path, World(sick=frozenset({"worker-1"})), grid(12, 12), workers=4)
    progress = made.drive()
    assert len(progress.committed) == 144
    assert max(progress.attempts.values()) == 2
    assert len(made.failed(counts=True)) < 20  # it rests, longer each time


def test_metrics_add_up_whatever_happens(tmp_path: Path) -> None:
    world = World(
        preemptions_per_hour=10.0, crashes_per_hour=10.0, poison=frozenset({"subject1/style1"}), side_by_side=4
    )
    made = Run(tmp_path, world, grid(8, 8), workers=5)
    made.drive()
    found = values(made.metrics)
    states = {state: found[f"ziplora_jobs {state}"] for state in ("left", "running", "committed", "given_up")}
    given_up = len(made.progress.given_up)
    assert states == {"left": 0, "running": 0, "committed": 64 - given_up, "given_up": given_up}


def test_the_estimate_at_half_time_is_right_on_a_steady_run(tmp_path: Path) -> None:
    made = Run(tmp_path, World(), grid(20, 20), workers=4)
    thought: list[tuple[float, float]] = []

    def look(event: events.Event) -> None:
        if isinstance(event, events.Outlook) and event.left <= 200 and event.seconds is not None:
            thought.append((made.pool.now, event.seconds))

    run(made.jobs, made.pool, made.catalog, run_id="test", observers=[look], clock=made.pool.clock, prior_s=1.0)
    at, seconds = thought[0]
    assert seconds == pytest.approx(made.pool.now - at, rel=0.2)


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    world = World(preemptions_per_hour=10.0, crashes_per_hour=5.0, slow_share=0.3)
    ends = []
    for name in ("a", "b"):
        made = Run(tmp_path / name, world, grid(6, 6))
        made.drive()
        ends.append((made.pool.now, made.attempts(), len(made.seen)))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("seed", range(4))
def test_chaos(tmp_path: Path, seed: int) -> None:
    figures = chaos(seed, tmp_path)
    assert figures["committed"] + figures["given up"] == figures["jobs"]


def test_loras_are_loaded_less_often_than_square_tiles_would_from_scratch(tmp_path: Path) -> None:
    made = Run(tmp_path, dataclasses.replace(World(), cached_loras=40), grid(48, 48), workers=3)
    made.drive()
    assert made.pool.loads / len(made.jobs) < 1.3 * 2 / 16
