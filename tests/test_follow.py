"""Pulling while a batch fills the catalog."""

from pathlib import Path

from service.catalog import Catalog
from service.choose import choose
from service.follow import follow
from service.pull import PullOptions
from tests.catalogs import fill, id_of, identity

EVERYTHING = ("*", "*", "*")


def test_what_is_committed_meanwhile_comes_too_until_a_run_ends(catalog: Catalog, tmp_path: Path) -> None:
    catalog.store.put("runs/earlier/summary.json", b"{}")
    fill(catalog, identity("dog"))
    rounds = []

    def wait() -> None:
        rounds.append(sorted(path.name.partition("__")[0] for path in (tmp_path / "out").glob("*.safetensors")))
        fill(catalog, identity(f"new{len(rounds)}"), identity(f"new{len(rounds)}", style="oil"))
        catalog.store.put(f"entries/{str(len(rounds)) * 64}.json", b"{")
        if len(rounds) == 2:
            catalog.store.put("runs/this/summary.json", b"{}")

    patterns = ("*", "water*", "*")
    pulled = list(follow(catalog, tmp_path / "out", PullOptions(), patterns, lambda found: choose(found), wait))
    assert rounds == [["dog"], ["dog", "new1"]]
    assert {path.name.partition("__")[0] for path in (tmp_path / "out").iterdir()} == {"dog", "new1", "new2"}
    assert [item.state for item in pulled].count("pulled") == 9
    assert [item.name for item in pulled if item.state == "failed"] == ["1" * 64, "2" * 64]


def test_what_failed_is_tried_again(local: Catalog, tmp_path: Path) -> None:
    (entry,) = fill(local, identity())
    item = entry.objects["merged.png"]
    local.store.put(item.key, b"damaged")

    def wait() -> None:
        local.store.put(item.key, b"png of " + id_of(identity()).encode())
        local.store.put("runs/this/summary.json", b"{}")

    pulled = list(follow(local, tmp_path / "out", PullOptions(), EVERYTHING, lambda found: choose(found), wait))
    assert [found.state for found in pulled if found.name == "merged.png"] == ["failed", "pulled"]


def test_the_best_so_far(local: Catalog, tmp_path: Path) -> None:
    def commit(method: str, alignment: float) -> None:
        job = identity(method=method)
        report = {"scores": {"style_alignment": alignment, "subject_alignment": alignment}}
        local.commit(id_of(job), job, {"merged.safetensors": method.encode()}, report)

    def wait() -> None:
        commit("ties", 0.1)
        commit("ziplora", 0.9)
        local.store.put("runs/this/summary.json", b"{}")

    commit("direct", 0.5)
    pulled = follow(local, tmp_path, PullOptions(), ("*", "*", "best"), lambda found: choose(found, best=True), wait)
    assert [item.path.read_bytes() for item in pulled] == [b"direct", b"ziplora"]
