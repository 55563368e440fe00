"""What a failure leads to: pure functions, so plain examples."""

import pytest

from service.faults import Breaker, History, Limits, after_failure, backoff_s

LIMITS = Limits(attempts=3, outage_s=600, returns=5)


def test_bad_input_is_never_tried_again_and_the_rest_up_to_the_limit() -> None:
    assert not after_failure("BadInput", "its own", History(), LIMITS, 0.5).retry
    for kind in ("WorkerLost", "OutOfMemory", "DeadlineExceeded", "Defect", "StoreFull", "AccessDenied"):
        verdicts = [after_failure(kind, "its own", History(attempts), LIMITS, 0.5) for attempts in (0, 1, 2)]
        assert [verdict.retry for verdict in verdicts] == [True, True, False]
        assert all(verdict.counts and verdict.elsewhere for verdict in verdicts)


def test_what_is_not_the_jobs_fault_costs_no_attempt_but_not_for_ever() -> None:
    for fault in ("none of its", "one of several"):
        verdict = after_failure("WorkerLost", fault, History(attempts=2, returns=4), LIMITS, 0.5)  # type: ignore[arg-type]
        assert (verdict.retry, verdict.counts) == (True, False)
        at_last = after_failure("WorkerLost", fault, History(attempts=2, returns=5), LIMITS, 0.5)  # type: ignore[arg-type]
        assert (at_last.retry, at_last.counts) == (False, True)


def test_a_store_that_is_away_costs_time_within_a_budget() -> None:
    away = [after_failure("Unavailable", "its own", History(2, 0, s), LIMITS, 0.5) for s in (0, 599, 600)]
    assert [verdict.retry for verdict in away] == [True, True, False]
    assert not any(verdict.counts for verdict in away)
    waits = [after_failure("Unavailable", "its own", History(0, n), LIMITS, 0.0).wait_s for n in range(8)]
    assert waits == sorted(waits)
    assert waits[0] == 2.5
    assert waits[-1] == 60


def test_backoff_grows_and_is_bounded() -> None:
    assert [backoff_s(attempt, jitter=1.0) for attempt in (1, 2, 3, 10, 10_000)] == [1.0, 2.0, 4.0, 60.0, 60.0]
    assert backoff_s(3, jitter=0.0) == 2.0


class TestBreaker:
    def test_it_trips_when_most_fail_the_same_way(self) -> None:
        breaker = Breaker()
        notes = [breaker.note("StoreFull", f"s3://b/pairs/{i}/x answered 507 on writing") for i in range(15)]
        assert notes[:14] == [None] * 14
        assert str(notes[14]).startswith("15 of the last 15 attempts failed the same way (StoreFull: s3://b/pairs/14/x")

    def test_different_reasons_or_some_successes_do_not_trip_it(self) -> None:
        breaker = Breaker()
        for i in range(200):
            assert breaker.note("BadInput", ("no picture", "not finite")[i % 2]) is None
        breaker = Breaker()
        for i in range(200):
            assert breaker.note(*(("Defect", "it broke") if i % 3 else (None,))) is None  # type: ignore[arg-type]

    def test_one_worker_among_several_does_not_trip_it(self) -> None:
        breaker = Breaker()
        for _ in range(100):
            assert breaker.note("AccessDenied", "clocks differ", "worker-3", workers=4) is None
        assert breaker.note("AccessDenied", "clocks differ", "worker-2", workers=4)

    def test_what_is_long_past_does_not_count(self) -> None:
        breaker = Breaker()
        for _ in range(14):
            breaker.note("Defect", "it broke")
        for _ in range(40):
            breaker.note(None)
        assert [breaker.note("Defect", "it broke") for _ in range(14)] == [None] * 14


@pytest.mark.parametrize("kind", ["WorkerLost", "DeadlineExceeded"])
def test_the_same_kind_counts_only_when_it_can_be_no_other_job(kind: str) -> None:
    assert after_failure(kind, "one of several", History(), LIMITS, 0.5).alone
    assert after_failure(kind, "its own", History(), LIMITS, 0.5).counts
