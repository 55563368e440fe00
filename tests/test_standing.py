"""How far a run is, as its catalog says it while it goes on."""

from types import SimpleNamespace
from typing import Any

from service import events
from service.catalog import Catalog
from service.standing import StandingRecord, latest_standing
from service.storage import Store
from tests.commands import wait_until, ziplora

JOB: Any = SimpleNamespace(job_id="0" * 64)  # observers only count
DIGEST = "0123456789abcdef"


def test_it_follows_the_run_and_says_when_it_will_end(store: Store) -> None:
    catalog = Catalog(store)
    assert latest_standing(catalog, DIGEST) is None
    record = StandingRecord(catalog, f"20260101T000000-{DIGEST[:8]}", every_s=0.02)
    record.observe(events.RunStarted("run", store.url, jobs=10, committed=2, workers=1))
    record.observe(events.WorkerReady("worker-0", "cpu", 1.0))
    for _ in range(3):
        record.observe(events.JobCommitted(JOB, "worker-0", already=False))
    record.observe(events.Outlook(left=5, workers=1, seconds=50.0, stages={}))
    record.observe(events.JobGivenUp(JOB, "BadInput", "no picture", 1))
    wait_until(lambda: (now := latest_standing(catalog, DIGEST)) is not None and now.given_up == 1)
    now = latest_standing(catalog, DIGEST)
    assert now is not None
    assert (now.state, now.jobs, now.committed, now.left, now.workers) == ("running", 10, 5, 4, 1)
    assert now.eta_s == 50.0  # the control loop's own estimate
    record.observe(events.RunFinished(3, 1, 4, 120.0, interrupted=True))
    record.close(committed=6)
    last = latest_standing(catalog, DIGEST)
    assert last is not None
    assert (last.state, last.committed, last.left) == ("interrupted", 6, 3)
    assert latest_standing(catalog, "f" * 64) is None


def test_the_newest_run_counts_and_what_is_no_record_does_not(store: Store) -> None:
    catalog = Catalog(store)
    for day, jobs in (("01", 1), ("02", 2)):
        record = StandingRecord(catalog, f"202601{day}T000000-{DIGEST[:8]}")
        record.observe(events.RunStarted("run", store.url, jobs=jobs, committed=0, workers=1))
        record.close()
    store.put(f"runs/20260103T000000-{DIGEST[:8]}/standing.json", b"[]")
    now = latest_standing(catalog, DIGEST)
    assert now is not None
    assert now.jobs == 2


def test_retry_forgets_what_matches(store: Store) -> None:
    catalog = Catalog(store)
    for number, (style, kind) in enumerate((("ink", "OutOfMemory"), ("oil", "OutOfMemory"), ("oil", "BadInput"))):
        job = {"subject": {"id": "dog"}, "style": {"id": style}, "method": "ziplora"}
        catalog.record_failure(f"{number:064x}", job, "why", kind, "", 3)
    done = ziplora("retry", store.url, "--kind", "OutOf*", "--style", "o*")
    assert done.returncode == 0, done.stderr
    assert "1 job will be tried again (1 OutOfMemory) by the next run or submit of their manifest" in done.stdout
    assert {failure.job_id[-1] for failure in catalog.failures()} == {"0", "2"}
    assert ziplora("retry", store.url, "--style", "wax").returncode == 2
