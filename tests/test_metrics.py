"""What a run exports: every event in its figures, and the table of metrics against what is really there."""

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service import errors, events
from service.jobs import TrainJob
from service.messages import TileDone
from service.metrics import FAILURES, Metrics
from tests.test_tiles import job

TABLE = Path(__file__).parent.parent / "deploy/METRICS.md"


def run_of_three(metrics: Metrics) -> None:
    """One job is committed, one given up after an attempt that did not count, one is left running."""
    good, bad, running = job(0, 0), job(0, 1), job(1, 0)
    training = TrainJob(good.base, "dog", "subject", (), (), {})
    for event in (
        events.RunStarted("run", "/catalog", 5, 2, 1),
        events.WorkerReady("worker-0", "cpu", 1.5),
        events.TileStarted("worker-0", 3),
        events.JobStarted(good, "worker-0", 1),
        events.JobCommitted(good, "worker-0", False, {"merge": 2.0, "commit": 0.5}, 1000, 5, {"style": 0.4}),
        events.JobStarted(bad, "worker-0", 1),
        events.JobFailed(bad, "worker-0", 1, "WorkerLost", "gone", retry=True, counts=False),
        events.JobStarted(bad, "worker-0", 1),
        events.JobFailed(bad, "worker-0", 1, "BadInput", "bad", retry=False),
        events.JobGivenUp(bad, "BadInput", "bad", 1),
        events.JobStarted(running, "worker-0", 1),
        events.WorkerStalled("worker-0", "the store is away"),
        events.TileFinished("worker-0", TileDone(frozenset(), 4.0, 3.0, {"lora": 2}, {"lora": 1}, 700)),
        events.Outlook(1, 1, 12.5, {}),
        events.TrainingStarted(training, "worker-0", 1),
        events.TrainingFailed(training, "worker-0", 1, "WorkerLost", "gone", retry=True),
        events.TrainingDone(training, "worker-0", False, {"train": 3.0}, 200, 4),
    ):
        metrics.observe(event)


def values(metrics: Metrics) -> dict[str, float]:
    families = text_string_to_metric_families(metrics.text().decode())
    return {
        sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_a_run_in_figures() -> None:
    now = [0.0]
    metrics = Metrics("1.2.3", clock=lambda: now[0])
    now[0] = 0.0
    run_of_three(metrics)
    now[0] = 6.0
    metrics.observe(events.WorkerGone("worker-0", "preempted", True))
    found = values(metrics)
    expected = {
        "ziplora_jobs left": 0,
        "ziplora_jobs running": 1,
        "ziplora_jobs committed": 3,
        "ziplora_jobs given_up": 1,
        "ziplora_attempts_total committed": 1,
        "ziplora_attempts_total BadInput": 1,
        "ziplora_returns_total WorkerLost": 1,
        "ziplora_given_up_total BadInput": 1,
        "ziplora_tiles_total": 1,
        "ziplora_stage_seconds_sum merge": 2.0,
        "ziplora_stage_seconds_sum train": 3.0,
        "ziplora_trainings_total trained": 1,
        "ziplora_trainings_total WorkerLost": 1,
        "ziplora_worker_busy_seconds_total": 3.0,
        "ziplora_worker_present_seconds_total": 6.0,
        "ziplora_busy_ratio": 0.5,
        "ziplora_pairs_per_second": pytest.approx(1 / 6),
        "ziplora_eta_seconds": 12.5,
        "ziplora_cache_requests_total lora hit": 2,
        "ziplora_cache_requests_total lora miss": 1,
        "ziplora_read_bytes_total": 700,
        "ziplora_written_bytes_total": 1200,
        "ziplora_worker_up worker-0": 0,
        "ziplora_worker_stalls_total": 1,
        "ziplora_build_info 1.2.3": 1,
    }
    assert {name: found[name] for name in expected} == expected


def test_every_kind_of_failure_has_its_series_from_the_start() -> None:
    """A query for the increase of a series that begins at 1 finds none: the alerts would not fire."""
    known = {
        name for name, one in vars(errors).items() if isinstance(one, type) and issubclass(one, errors.ServiceError)
    }
    ends_no_attempt = {"ServiceError", "StorageError", "JobError", "ManifestError", "RunStopped", "AlreadyCommitted"}
    assert set(FAILURES) == known - ends_no_attempt
    begun = values(Metrics("1.2.3"))
    for name in ("attempts", "returns", "given_up"):
        assert all(begun[f"ziplora_{name}_total {kind}"] == 0 for kind in FAILURES)


def test_the_table_lists_exactly_what_is_exported() -> None:
    listed = re.findall(r"^\| `(ziplora_\w+)` \| (\w+) \|", TABLE.read_text(), re.MULTILINE)
    metrics = Metrics("test")
    run_of_three(metrics)
    exported = {
        (f"{family.name}_total" if family.type == "counter" else family.name, family.type)
        for family in text_string_to_metric_families(metrics.text().decode())
        if not family.name.endswith("_created")
    }
    assert set(listed) == exported
    assert len(listed) == len(exported)


def test_every_label_in_the_table_is_there() -> None:
    rows = [line.split("|") for line in TABLE.read_text().splitlines() if line.startswith("| `ziplora_")]
    listed = {row[1].strip(" `"): set(re.findall(r"(?:^|; )(\w+)", row[3].strip())) for row in rows}
    metrics = Metrics("test")
    run_of_three(metrics)
    for family in text_string_to_metric_families(metrics.text().decode()):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        if not name.endswith("_created"):
            assert listed[name] == labels, name
