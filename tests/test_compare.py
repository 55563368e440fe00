"""Two catalogs compared, and one copied into the other, between a directory and a real S3 server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.catalog import Catalog
from service.compare import changed_fields
from service.errors import Corrupted, Unavailable
from service.storage import LocalStore
from service.trained import TrainedLoRAs
from tests.catalogs import SUBJECT_LORA, UNUSED_LORA, files_of, fill, id_of, identity, trained
from tests.conftest import Swift


def test_equal_content_is_no_difference(local: Catalog, tmp_path: Path) -> None:
    other = Catalog(tmp_path / "other")
    fill(local, identity("dog"), identity("cat"))
    fill(other, identity("cat"), identity("dog"))
    assert local.differences(other) == []
    assert local.digest() == other.digest()


def test_every_kind_of_difference_is_named(local: Catalog, tmp_path: Path) -> None:
    other = Catalog(tmp_path / "other")
    same, changed, first, second = identity("same"), identity("changed"), identity("first"), identity("second")
    fill(local, same, changed, first, identity("redone", seed=0))
    fill(other, same, second, identity("redone", seed=1))
    other.commit(id_of(changed), changed, {**files_of(changed), "merged.png": b"other", "new.txt": b""}, {})
    found = {item.subject: item for item in local.differences(other)}
    assert {subject: item.kind for subject, item in found.items()} == {
        "changed": "objects differ", "first": "only first", "second": "only second", "redone": "made otherwise"
    }  # fmt: skip
    assert found["changed"].details == ("merged.png", "new.txt")
    assert found["redone"].details == ("seed: 0 → 1",)
    assert found["first"].job_ids == (id_of(first),)
    assert len(other.differences(local)) == 4


def test_trained_loras_are_compared_too(local: Catalog, tmp_path: Path) -> None:
    other = Catalog(tmp_path / "other")
    trained(local), trained(other)
    trained(local, "6" * 64, "fox", steps=4), trained(other, "6" * 64, "fox", steps=5)
    trained(local, "7" * 64, "ink", "style", steps=4), trained(other, "8" * 64, "ink", "style", steps=5)
    trained(local, UNUSED_LORA, "oil", "style")
    assert [(item.pair, item.kind, item.details) for item in local.differences(other)] == [
        ("styles.ink", "made otherwise", ("settings.steps: 4 → 5",)),
        ("styles.oil", "only first", ()),
        ("subjects.fox", "objects differ", ("lora.safetensors",)),
    ]


def test_changed_fields_are_named_with_their_place() -> None:
    one = {"knobs": {"steps": 100, "lr": 0.01}, "samples": {"seeds": [0]}, "style": "s" * 64}
    other = {"knobs": {"steps": 200, "lr": 0.01}, "samples": {"seeds": [0, 1]}, "style": "t" * 64, "scorers": {}}
    assert list(changed_fields(one, other)) == [
        "knobs.steps: 100 → 200",
        "samples.seeds: [0] → [0, 1]",
        "scorers: None → {}",
        f"style: {'s' * 12}… → {'t' * 12}…",
    ]


def test_a_copy_is_the_same_and_goes_on_after_a_cut(swift: Swift, local: Catalog, tmp_path: Path) -> None:
    jobs = [identity(subject) for subject in ("dog", "cat", "fox", "owl", "hen", "elk")]
    fill(local, *jobs)
    there = Catalog(f"{swift.url}/copy")
    assert [copied.state for copied in local.copy_to(there, subject="[df]o*")] == ["copied"] * 2
    half = local.entry(id_of(jobs[1])).objects["merged.safetensors"]
    there.store.put(half.key, b"half")  # and then the copy was killed: an object without an entry
    states = sorted(copied.state for copied in local.copy_to(there))
    assert states == ["copied"] * 4 + ["kept"] * 2
    assert there.digest() == local.digest()
    assert [check.problem for check in there.verify()] == [None] * 36
    back = Catalog(tmp_path / "back")
    assert [copied.state for copied in there.copy_to(back, subject="[df]o*")] == ["copied"] * 2
    assert {entry.subject for entry in back.entries()} == {"dog", "fox"}


def test_the_loras_that_runs_trained_come_along(swift: Swift, local: Catalog, tmp_path: Path) -> None:
    fill(local, identity("dog"))
    used, unused = trained(local), trained(local, UNUSED_LORA, "ink", "style")
    TrainedLoRAs(local.store).put_checkpoint("4" * 64, b"half")
    some = Catalog(f"{swift.url}/some")
    assert {(copied.pair, copied.state) for copied in local.copy_to(some, subject="dog")} == {
        ("dog/watercolour", "copied"), ("subjects.dog", "copied")
    }  # fmt: skip
    assert {(copied.pair, copied.state, copied.n_bytes) for copied in local.copy_to(some) if copied.trained} == {
        ("subjects.dog", "kept", 0), ("styles.ink", "copied", unused.size)
    }  # fmt: skip
    assert local.differences(some) == []
    assert TrainedLoRAs(some.store).get(SUBJECT_LORA) == used
    assert not [check for check in some.verify() if check.problem]
    assert not list(some.store.list("checkpoints/"))

    other = Catalog(tmp_path / "other")
    kept = trained(other, steps=9)
    local.store.put(unused.key, b"x" * unused.size)
    problems = {copied.pair: str(copied.problem) for copied in local.copy_to(other) if copied.state == "failed"}
    assert problems.keys() == {"subjects.dog", "styles.ink"}
    assert "has training 111111111111 (subjects.dog) with other content" in problems["subjects.dog"]
    assert "is not what its entry says" in problems["styles.ink"]
    assert list(TrainedLoRAs(other.store).all(print)) == [kept]


def test_what_is_not_as_promised_is_not_committed_there(local: Catalog, tmp_path: Path) -> None:
    (dog, _) = fill(local, identity("dog"), identity("cat"))
    local.store.put(dog.objects["merged.png"].key, b"other")
    local.store.put(f"entries/{'0' * 64}.json", b"{")
    other = Catalog(tmp_path / "other")
    results = {copied.pair: copied for copied in local.copy_to(other)}
    assert results["cat/watercolour"].state == "copied"
    assert "is not what its entry says" in (results["dog/watercolour"].problem or "")
    assert "cannot be used" in (results[f"entries/{'0' * 64}.json"].problem or "")
    assert [entry.subject for entry in other.entries()] == ["cat"]


def test_other_content_under_the_same_job_is_left_as_it_is(local: Catalog, tmp_path: Path) -> None:
    job, other = identity(), Catalog(tmp_path / "other")
    fill(local, job)
    other.commit(id_of(job), job, {"merged.safetensors": b"other"}, {})
    (copied,) = local.copy_to(other)
    assert copied.state == "failed"
    assert "with other content" in (copied.problem or "")
    assert other.store.get(other.entry(id_of(job)).objects["merged.safetensors"].key) == b"other"


def test_a_store_that_goes_away_is_a_result(tmp_path: Path) -> None:
    class Cut(LocalStore):
        def stream(self, key: str, start: int = 0) -> Iterator[bytes]:
            raise Unavailable("the store went away")

    fill(Catalog(tmp_path / "catalog"), identity())
    (copied,) = Catalog(Cut(tmp_path / "catalog")).copy_to(Catalog(tmp_path / "other"))
    assert (copied.state, copied.problem) == ("failed", "the store went away")
    assert Catalog(tmp_path / "other").committed() == set()


def test_entries_that_cannot_be_read_are_no_basis_for_a_comparison(local: Catalog, tmp_path: Path) -> None:
    local.store.put(f"entries/{'0' * 64}.json", b"{")
    with pytest.raises(Corrupted):
        local.differences(Catalog(tmp_path / "other"))
