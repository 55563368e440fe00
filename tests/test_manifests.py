"""The manifests that ship with the project: they are what a user starts from."""

from pathlib import Path

import pytest

from service.manifest import read_manifest
from service.plan import plan
from ziplora.methods import METHODS

MANIFESTS = Path(__file__).parent.parent / "manifests"


def test_the_papers_comparison_lacks_nothing_but_the_users_files() -> None:
    manifest = read_manifest(MANIFESTS / "paper.yaml")
    assert (len(manifest.subjects), len(manifest.styles), len(manifest.pairs)) == (4, 8, 32)
    assert {merge.method for merge in manifest.merges} == METHODS.keys()
    ziplora = next(merge.knobs for merge in manifest.merges if merge.method == "ziplora")
    assert (ziplora["steps"], ziplora["learning_rate"], ziplora["penalty_weight"]) == (100, 0.01, 0.01)
    assert (manifest.samples.steps, manifest.samples.style_strengths) == (50, (1.0, 0.7, 0.4))
    problems = plan(manifest).problems
    absent = ("does not exist", "no such file", "not in the local hub cache", "is no directory")
    assert [one for one in problems if not any(words in one for words in absent)] == []
    assert sum("paper/" in one for one in problems) >= 12  # every LoRA is asked for


@pytest.mark.parametrize("name", ["demo.yaml", "paper-pocket.yaml"])
def test_those_on_the_miniature_run_as_they_are(name: str, tmp_path: Path) -> None:
    manifest = read_manifest(MANIFESTS / name)
    planned = plan(manifest)
    assert planned.problems == ()
    assert len(planned.jobs) == len(manifest.pairs) * len(manifest.merges)
    if name == "paper-pocket.yaml":
        assert {merge.method for merge in manifest.merges} == {
            name
            for name, method in METHODS.items()
            if not method.masked  # whose base would have to ship as well
        }
        strengths = {job.method: job.samples.style_strengths for job in planned.jobs}
        assert strengths["direct"] == (1.0, 0.7, 0.4)
        assert strengths["svd"] == (1.0,)
