"""The gallery kept up while a run goes on: it follows, and can neither hold up nor fail the run."""

import json
from pathlib import Path
from typing import Any, cast

import pytest

from service import events
from service.catalog import Catalog
from service.errors import NotFound, Unavailable
from service.jobs import Job
from service.live import LiveGallery
from service.storage import LocalStore
from tests.commands import wait_until
from tests.pictures import commit, job

ANY = cast(Job, None)  # which one it was is not asked


def said(catalog: Catalog, name: str) -> Any:
    try:
        body = catalog.store.get(f"pages/{name}.js").decode()
    except NotFound:
        return None
    return json.loads(body.removeprefix(f"ziplora.take.{name}(").removesuffix(");\n"))


def test_pages_follow_a_run_to_its_end(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    live = LiveGallery(catalog, every_s=0.01)
    live.observe(events.RunStarted("run", str(tmp_path), jobs=3, committed=0, workers=1))
    commit(catalog, job("dog", "ink"))
    live.observe(events.JobCommitted(ANY, "w", already=False))
    live.observe(events.JobGivenUp(ANY, "BadInput", "NaN", 1))
    wait_until(lambda: (said(catalog, "live") or {}).get("given_up") == 1)
    wait_until(lambda: len(said(catalog, "catalog")["cells"]) == 1)
    seen = said(catalog, "live")
    assert (seen["state"], seen["jobs"], seen["committed"]) == ("running", 3, 1)
    commit(catalog, job("dog", "oil"))
    live.observe(events.JobCommitted(ANY, "w", already=False))
    live.observe(events.RunFinished(2, 1, 0, 9.0, interrupted=False))
    live.close()
    assert said(catalog, "live")["state"] == "finished"
    assert live.finish().cells == 2
    assert said(catalog, "live")["digest"] == said(catalog, "catalog")["digest"] == catalog.digest()


def test_what_is_left_tells_an_open_page_how_the_run_ended(tmp_path: Path) -> None:
    live = LiveGallery(Catalog(tmp_path), every_s=0.01)
    live.observe(events.RunStarted("run", "", jobs=3, committed=1, workers=1))
    live.observe(events.RunFinished(0, 0, 2, 9.0, interrupted=True))
    live.close()
    assert said(Catalog(tmp_path), "live")["state"] == "interrupted"


def test_a_store_that_fails_costs_the_run_nothing(tmp_path: Path) -> None:
    class Full(LocalStore):
        def put(self, key: str, body: bytes | Path, **options: Any) -> None:
            if key.startswith(("pages/", "index")):
                raise Unavailable("try later")
            super().put(key, body, **options)

    catalog = Catalog(Full(tmp_path))
    live = LiveGallery(catalog, every_s=0.01)
    live.observe(events.RunStarted("run", "", jobs=1, committed=0, workers=1))
    commit(catalog, job("dog", "ink"))
    live.observe(events.JobCommitted(ANY, "w", already=False))
    live.close()
    with pytest.raises(Unavailable):  # at the end of a run the user is told
        live.finish()


def test_a_run_that_never_began_leaves_no_word(tmp_path: Path) -> None:
    LiveGallery(Catalog(tmp_path)).close()
    assert list(LocalStore(tmp_path).list()) == []
