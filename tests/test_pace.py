"""How long things take, learned from what finished."""

import pytest

from service.pace import HUNG_S, Pace

STAGES = {"fetch": 1.0, "merge": 8.0, "sample": 1.0, "commit": 5.0}


def taught(pace: Pace, worker: str, seconds: float, n: int = 20, method: str = "ziplora") -> Pace:
    for _ in range(n):
        pace.learn(method, worker, {"merge": seconds})
    return pace


def test_a_guess_holds_until_jobs_say_better() -> None:
    pace = Pace(prior_s=100.0)
    assert pace.job_s("ziplora") == 100.0
    pace.learn("ziplora", "a", {"merge": 10.0})
    assert pace.job_s("ziplora") == pytest.approx(55.0)
    assert taught(pace, "a", 10.0, n=200).job_s("ziplora") == pytest.approx(10.0, rel=0.1)
    assert Pace().job_s("ziplora") is None
    assert Pace(prior_s=1e-6).learned_s("ziplora", "a") is None  # no tile is made on a guess


def test_what_runs_behind_the_next_job_costs_nothing() -> None:
    pace = Pace()
    pace.learn("ziplora", "a", STAGES)
    assert pace.job_s("ziplora") == 10.0
    assert pace.stages() == STAGES


def test_methods_have_their_own_times() -> None:
    pace = taught(taught(Pace(), "a", 10.0), "a", 0.1, method="direct")
    assert pace.job_s("ziplora") == pytest.approx(10.0, rel=0.3)
    assert pace.job_s("direct") == pytest.approx(0.1, rel=0.3)


def test_a_straggler_is_known_and_does_not_change_what_is_usual() -> None:
    pace = taught(Pace(), "quick", 10.0, n=50)
    taught(pace, "slow", 100.0, n=20)
    assert pace.slowness("slow") > 5
    assert pace.slowness("quick") == pytest.approx(1.0, rel=0.1)
    usual, own = pace.job_s("ziplora"), pace.job_s("ziplora", "slow")
    assert usual is not None
    assert own is not None
    assert usual < 25
    assert own == pytest.approx(100, rel=0.5)
    pace.forget("slow")  # its name goes to another machine
    assert pace.slowness("slow") == 1.0


def test_a_worker_is_hung_after_many_times_what_it_should_take() -> None:
    pace = Pace(prior_s=10.0)
    assert pace.deadline_s("ziplora", "a", 1, limit_s=3600) == 3600  # a guess ends nobody's work
    taught(pace, "a", 10.0, n=100)
    assert pace.deadline_s("ziplora", "a", 1, limit_s=3600) == pytest.approx(200, rel=0.1)
    assert pace.deadline_s("ziplora", "a", 4, limit_s=3600) == pytest.approx(800, rel=0.1)
    assert pace.deadline_s("ziplora", "a", 1, limit_s=20) == 20
    assert taught(Pace(), "a", 0.01).deadline_s("ziplora", "a", 1, limit_s=3600) == HUNG_S


def test_the_end_is_the_work_left_over_the_workers_speeds() -> None:
    pace = taught(Pace(), "a", 10.0, n=100)
    assert pace.seconds_left({"ziplora": 100}, ["a", "b"]) == pytest.approx(500, rel=0.01)
    assert pace.seconds_left({"ziplora": 100, "direct": 1}, ["a"]) is None
    assert pace.seconds_left({"ziplora": 100}, []) is None


def test_what_is_done_once_per_lora_is_not_expected_of_every_pair() -> None:
    pace = Pace()
    for loads in (2, 1, 1, 0):  # the first pairs calibrate, the later ones find it done
        pace.learn("ziplora", "a", {"calibrate": 30.0 * loads, "merge": 10.0})
        pace.learn_loads(loads)
    assert pace.seconds_left({"ziplora": 10}, ["a"], loads=0) == pytest.approx(100.0)
    assert pace.seconds_left({"ziplora": 10}, ["a"], loads=2) == pytest.approx(160.0)


def test_time_lost_between_stages_counts_and_who_leaves_is_missed_at_once() -> None:
    pace = Pace()
    for _ in range(20):
        pace.learn("ziplora", "a", {"merge": 10.0}, passed_s=12.5)
    assert pace.seconds_left({"ziplora": 100}, ["a"]) == pytest.approx(1250)
    both, one = (pace.seconds_left({"ziplora": 100}, workers) for workers in (["a", "b"], ["a"]))
    assert both is not None
    assert one is not None
    assert one == pytest.approx(2 * both, rel=0.02)
