"""The control loop over both pools: one contract, real workers, real processes that are really killed."""

import dataclasses
import os
import signal
import threading
from collections.abc import Iterator

import psutil
import pytest

from service import events
from service.catalog import Catalog
from service.errors import BadInput
from service.faults import Limits
from service.jobs import Job
from service.messages import WorkerSettings
from service.metrics import Metrics
from service.outcomes import Progress
from service.pool import InlinePool, Pool
from service.ray_pool import RayPool
from service.run import run
from tests.commands import wait_until
from tests.grid import Grid
from tests.test_worker import jobs_of, settings


@pytest.fixture(params=["inline", "ray"])
def pool(request: pytest.FixtureRequest, grid: Grid) -> Iterator[Pool]:
    pool: Pool = InlinePool(settings(grid)) if request.param == "inline" else RayPool(settings(grid), size=2)
    yield pool
    pool.close()


class Seen(list[events.Event]):
    def of(self, kind: type) -> list[events.Event]:
        return [event for event in self if isinstance(event, kind)]


def drive(grid: Grid, pool: Pool, jobs: tuple[Job, ...], seen: Seen, **options: object) -> Progress:
    return run(jobs, pool, Catalog(grid.root / "catalog"), run_id="test", observers=[seen.append], **options)  # type: ignore[arg-type]


class TestPool:
    """The contract of every pool."""

    def test_every_job_is_committed_once_and_the_bad_one_is_given_up_with_its_reason(
        self, grid: Grid, pool: Pool
    ) -> None:
        manifest = grid.manifest(samples={"prompts": []})
        jobs = jobs_of(manifest)
        (grid.root / "oil.png").write_text("not a picture")  # after the plan has seen it
        seen, metrics = Seen(), Metrics("test")
        catalog = Catalog(grid.root / "catalog")
        progress = run(jobs, pool, catalog, run_id="test", observers=[seen.append, metrics.observe])
        assert {job.pair for job in progress.committed} == {"dog/ink", "cat/ink"}
        assert {job.pair for job, _ in progress.given_up} == {"dog/oil", "cat/oil"}
        assert [event.attempts for event in seen.of(events.JobGivenUp)] == [1, 1]  # type: ignore[attr-defined]
        assert catalog.committed() == {job.job_id for job in progress.committed}
        failures = list(catalog.failures())
        assert {failure.kind for failure in failures} == {"BadInput"}
        assert all("oil.png" in failure.reason for failure in failures)
        text = metrics.text().decode()
        assert 'ziplora_jobs{state="committed"} 2.0' in text
        assert 'ziplora_jobs{state="given_up"} 2.0' in text
        assert 'ziplora_attempts_total{outcome="BadInput"} 2.0' in text
        assert 'ziplora_stage_seconds_count{stage="merge"} 2.0' in text
        assert isinstance(seen[0], events.RunStarted)
        assert isinstance(seen[-1], events.RunFinished)
        assert (seen[-1].committed, seen[-1].given_up, seen[-1].left) == (2, 2, 0)


def test_ray_and_inline_give_the_same_catalog(grid: Grid) -> None:
    jobs = jobs_of(grid.manifest())
    digests = []
    for make in (InlinePool, lambda own: RayPool(own, size=2)):
        own = WorkerSettings(str(grid.root / f"catalog{len(digests)}"), str(grid.root / "base"), None, device="cpu")
        pool: Pool = make(own)  # type: ignore[operator]
        try:
            run(jobs, pool, Catalog(own.catalog), run_id="test")
        finally:
            pool.close()
        digests.append(Catalog(own.catalog).digest())
    assert digests[0] == digests[1]


def test_kill_9_of_an_actor_in_mid_merge_loses_no_pair(grid: Grid) -> None:
    jobs = jobs_of(grid.manifest(merge={"method": "ziplora", "steps": 20}, samples={"prompts": []}))
    pool, seen = RayPool(settings(grid), size=2), Seen()
    killed: list[str] = []

    def kill_the_first_that_works() -> None:
        wait_until(lambda: bool(seen.of(events.JobStarted)))
        victim = seen.of(events.JobStarted)[0]
        assert isinstance(victim, events.JobStarted)
        os.kill(pool.processes[victim.worker].pid, signal.SIGKILL)
        killed.append(victim.job.job_id)

    killer = threading.Thread(target=kill_the_first_that_works)
    killer.start()
    try:
        progress = drive(grid, pool, jobs, seen)
    finally:
        killer.join()
        pool.close()
    assert len(progress.committed) == 4
    assert progress.attempts == {job.job_id: 2 if job.job_id in killed else 1 for job in jobs}
    assert [event.returns for event in seen.of(events.WorkerGone)] == [True]  # type: ignore[attr-defined]
    assert {entry.job_id for entry in Catalog(grid.root / "catalog").entries()} == {job.job_id for job in jobs}


def test_a_worker_that_hangs_is_restarted_at_its_deadline(grid: Grid) -> None:
    jobs = jobs_of(grid.manifest(subjects=1, styles=1, samples={"prompts": []}))
    pool, seen = RayPool(settings(grid), size=1), Seen()
    stopped: list[int] = []

    def stop_it_once() -> None:
        wait_until(lambda: bool(seen.of(events.JobStarted)))
        stopped.append(pool.processes["worker-0"].pid)
        os.kill(stopped[0], signal.SIGSTOP)

    stopper = threading.Thread(target=stop_it_once)
    stopper.start()
    try:
        progress = drive(grid, pool, jobs, seen, limits=Limits(attempts=5, deadline_s=10))
    finally:
        stopper.join()
        pool.close()
    assert len(progress.committed) == 1
    first = seen.of(events.JobFailed)[0]
    assert isinstance(first, events.JobFailed)
    assert (first.kind, first.attempt, first.retry) == ("DeadlineExceeded", 1, True)
    wait_until(lambda: not psutil.pid_exists(stopped[0]) or psutil.Process(stopped[0]).status() == psutil.STATUS_ZOMBIE)


def test_a_base_that_does_not_load_ends_the_run_with_its_reason(grid: Grid) -> None:
    jobs = jobs_of(grid.manifest())
    (grid.root / "base/unet/config.json").write_text("{")
    for pool in (InlinePool(settings(grid)), RayPool(settings(grid), size=1)):
        try:
            with pytest.raises(BadInput, match=r"base .* does not load"):
                drive(grid, pool, jobs, Seen())  # type: ignore[arg-type]
        finally:
            pool.close()


def test_a_base_that_changed_after_the_plan_is_refused(grid: Grid) -> None:
    jobs = jobs_of(grid.manifest())
    planned_with = dataclasses.replace(settings(grid), base_digest=jobs[0].base.digest)
    config = grid.root / "base/scheduler/scheduler_config.json"
    config.write_text(config.read_text().replace("0.00085", "0.00086"))
    with pytest.raises(BadInput, match=r"has digest .*, the run was planned with .*: put the same files"):
        drive(grid, InlinePool(planned_with), jobs, Seen())
