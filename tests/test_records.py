"""Failures written down behind the control loop's back."""

from pathlib import Path

from service.catalog import Catalog
from service.records import FailureRecords
from tests.test_tiles import job


def test_failures_are_written_and_cleared_when_the_job_is_done_after_all(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    records = FailureRecords(catalog)
    for number in range(50):
        records.write(job(number, 0), f"reason {number}", "Defect", "traceback", 3)
    records.close()
    found = {failure.job_id: failure for failure in catalog.failures()}
    assert len(found) == 50
    assert found[job(7, 0).job_id].reason == "reason 7"
    assert found[job(7, 0).job_id].inputs["subject"] == "/subject7"

    later = FailureRecords(catalog)
    later.clear(job(7, 0))
    later.clear(job(99, 0))  # never failed: no request
    later.close()
    assert len(list(catalog.failures())) == 49


def test_a_store_that_cannot_be_written_hides_no_outcome(tmp_path: Path) -> None:
    (tmp_path / "catalog").write_text("not a directory")
    records = FailureRecords(Catalog(tmp_path / "catalog"))
    records.write(job(0, 0), "reason", "Defect", "", 1)
    records.close()
