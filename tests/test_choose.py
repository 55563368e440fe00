"""Merges chosen by their scores."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from service.catalog import Catalog
from service.choose import choose, score
from service.entry import Entry
from tests.catalogs import files_of, id_of, identity


def scored(subject: str, method: str, style_alignment: float | None, subject_alignment: float | None) -> Entry:
    job = identity(subject, "ink", method)
    scores = {"style_alignment": style_alignment, "subject_alignment": subject_alignment, "text_alignment": 0.3}
    return Entry(id_of(job), job, {}, {"scores": scores}, "attempt", datetime.now(UTC))


def test_the_harmonic_mean_of_both_alignments() -> None:
    assert score(scored("dog", "direct", 0.6, 0.3)) == pytest.approx(0.4)
    assert score(scored("dog", "direct", 0.6, None)) is None
    assert score(scored("dog", "direct", 0.6, -0.2)) == -0.2
    assert score(scored("dog", "direct", 0.6, 0.3), "style") == 0.6
    assert score(scored("dog", "direct", None, 0.3), "text") == 0.3


def test_best_takes_one_of_each_pair() -> None:
    ziplora, direct = scored("dog", "ziplora", 0.5, 0.5), scored("dog", "direct", 0.9, 0.1)
    alone, unscored = scored("cat", "direct", None, None), scored("dog", "ties", None, None)
    choice = choose([direct, ziplora, alone, unscored], best=True)
    assert {entry.job_id for entry in choice.entries} == {ziplora.job_id, alone.job_id}
    assert choice.unscored == [unscored]
    assert choose([direct, ziplora], best=True, by="style").entries == [direct]
    neither = choose([unscored, scored("dog", "direct", None, None)], best=True)
    assert (neither.entries, len(neither.unscored)) == ([], 2)


def test_top_is_best_first_and_of_what_best_leaves() -> None:
    entries = [scored(f"s{i}", "direct", 0.1 * i, 0.5) for i in range(1, 6)]
    assert choose(entries, top=2).entries == [entries[4], entries[3]]
    rival = scored("s5", "ziplora", 0.9, 0.9)
    assert choose([*entries, rival], best=True, top=2).entries == [rival, entries[3]]
    assert choose([*entries, scored("cat", "direct", None, None)], top=9).entries == entries[::-1]


def test_a_catalog_pulls_what_is_chosen(local: Catalog, tmp_path: Path) -> None:
    for subject, method, alignment in (("dog", "direct", 0.2), ("dog", "ziplora", 0.8), ("cat", "direct", 0.5)):
        job = identity(subject, "ink", method)
        report = {"scores": {"style_alignment": alignment, "subject_alignment": alignment}}
        local.commit(id_of(job), job, files_of(job), report)
    pulled = list(local.pull(tmp_path / "out", method="best", style="i*"))
    assert {item.path.name.rpartition("-")[0] for item in pulled} == {"dog__ink__ziplora", "cat__ink__direct"}
    assert len(list(local.pull(tmp_path / "top", top=1))) == 3
    job = identity("cat", "ink", "ties")
    local.commit(id_of(job), job, files_of(job), {})
    (left_out,) = (item for item in local.pull(tmp_path / "out", method="best") if item.state == "skipped")
    assert "it has no score to be chosen by" in (left_out.problem or "")
