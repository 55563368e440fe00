"""Commits behind the worker's back, and a store that is away for a while."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from service.catalog import Catalog
from service.errors import NotFound, Unavailable
from service.messages import JobResult
from service.translation import failed
from service.uploads import Made, PatientStore, Uploads
from tests.test_tiles import job


def away(times: int) -> Callable[[], str]:
    left = [times]

    def call() -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise Unavailable("no answer")
        return "there"

    return call


class TestPatientStore:
    def test_it_asks_again_until_there_is_an_answer(self) -> None:
        store = PatientStore(patience_s=30)
        assert store.call(away(1)) == "there"
        assert store.trouble is None

    def test_its_patience_ends(self) -> None:
        store = PatientStore(patience_s=0.2)
        with pytest.raises(Unavailable):
            store.call(away(100))
        assert store.trouble == "no answer"

    def test_other_errors_are_not_waited_for(self) -> None:
        def missing() -> str:
            raise NotFound("gone")

        with pytest.raises(NotFound):
            PatientStore(patience_s=30).call(missing)


def made(number: int, name: str = "merged.safetensors") -> Made:
    one = job(number, 0)
    return Made(one, {name: b"tensors"}, {}, JobResult(one.job_id, "committed", stages={"merge": 2.0}, peak_bytes=5))


class TestUploads:
    def test_results_come_when_the_commit_stands(self, tmp_path: Path) -> None:
        catalog = Catalog(tmp_path)
        uploads = Uploads(catalog, PatientStore(1))
        for number in range(3):
            uploads.start(made(number))
        results: list[JobResult] = []
        while uploads.pending:
            results += uploads.finished(timeout_s=5)
        assert {result.job_id for result in results} == catalog.committed()
        assert all(set(result.stages) == {"merge", "commit"} and result.n_bytes == 7 for result in results)
        assert catalog.entry(results[0].job_id).report["stages"] == {"merge": 2.0}
        assert uploads.finished(timeout_s=5) == []

    def test_what_is_committed_already_and_what_fails_are_results_too(self, tmp_path: Path) -> None:
        uploads = Uploads(Catalog(tmp_path), PatientStore(1))
        results = []
        for one in (made(0), made(0), made(1, name="../merged")):
            uploads.start(one)
            results += uploads.finished(timeout_s=20)
        assert [result.status for result in results] == ["committed", "already", "failed"]
        assert "../merged" in str(results[2].reason)
        assert results[2].traceback


def test_an_error_of_ours_keeps_its_name_and_others_are_defects() -> None:
    class Special(Unavailable):
        pass

    assert failed(job(0, 0), Special("x"), {}).kind == "Unavailable"
    defect = failed(job(0, 0), ZeroDivisionError("x"), {})
    assert (defect.kind, defect.reason) == ("Defect", "ZeroDivisionError: x")


def test_uploading_does_not_hold_up_its_caller(tmp_path: Path) -> None:
    class Slow(PatientStore):
        def call(self, function):  # type: ignore[no-untyped-def]
            time.sleep(0.3)
            return super().call(function)

    uploads = Uploads(Catalog(tmp_path), Slow(1))
    started = time.monotonic()
    uploads.start(made(0))
    assert uploads.finished() == []
    assert time.monotonic() - started < 0.25
    assert len(uploads.finished(timeout_s=10)) == 1
