"""What is seen of a catalog from elsewhere, with a run's own words and without them."""

import json
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta

import pytest

from service.catalog import Catalog
from service.standing import Standing
from service.watch import View, Watch
from tests.commands import ziplora
from tests.pictures import commit, id_of, job

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
RUN = Standing("20260501T115000-abcd", "running", 10, 4, 1, 2, "2026-05-01T11:50:00+00:00", "2026-05-01T11:59:30+00:00")


def say(catalog: Catalog, standing: Standing) -> None:
    catalog.store.put(f"runs/{standing.run_id}/standing.json", json.dumps(asdict(standing)).encode())


def test_it_goes_on_until_the_run_is_over_and_names_what_came_last(catalog: Catalog) -> None:
    say(catalog, replace(RUN, run_id="20250101T000000-old", state="finished"))
    say(catalog, RUN)
    commit(catalog, job("dog", "ink"))
    failed = job("fox", "ink")
    catalog.record_failure(id_of(failed), failed, "NaN", "BadInput", "", 1)
    views: list[View] = []

    def wait() -> None:
        commit(catalog, job(f"cat{len(views)}", "ink"))
        if len(views) == 3:
            say(catalog, replace(RUN, state="finished", committed=9))

    for view in Watch(catalog, wait):
        views.append(view)
    assert [view.merges for view in views] == [1, 2, 3, 4]
    assert [view.given_up for view in views] == [1] * 4
    assert {merge.subject for merge in views[-1].recent} == {"dog", "cat1", "cat2", "cat3"}
    assert views[-1].standing is not None
    assert (views[-1].standing.state, views[-1].left) == ("finished", 0)
    assert views[-1].per_minute is not None


def test_what_a_run_says_is_believed_as_long_as_it_speaks(local: Catalog) -> None:
    say(local, replace(RUN, eta_s=120.0))
    view = Watch(local, lambda: None, now=lambda: NOW).look()
    assert (view.running, view.stale, view.left, view.eta_s) == (True, False, 5, 90.0)
    later = Watch(local, lambda: None, now=lambda: NOW + timedelta(minutes=20)).look()
    assert (later.running, later.stale, later.eta_s) == (False, True, None)


@pytest.mark.parametrize("body", [b"{", b"[]", b"{}", json.dumps({**asdict(RUN), "updated": "soon"}).encode()])
def test_a_standing_that_cannot_be_read_is_none(local: Catalog, body: bytes) -> None:
    local.store.put("runs/x/standing.json", body)
    assert Watch(local, lambda: None).look().standing is None


def test_the_command_tells_it_in_lines(local: Catalog) -> None:
    commit(local, job("dog", "ink"))
    say(local, replace(RUN, state="interrupted"))
    shown = ziplora("watch", local.store.url)
    assert shown.returncode == 0, shown.stderr
    assert "1 merge, " in shown.stdout
    assert "5 of 10 done" in shown.stdout
    assert "interrupted" in shown.stdout
    assert "dog × ink" in shown.stdout
