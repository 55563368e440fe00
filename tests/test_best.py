"""Several methods on a pair, of which the best scored is published."""

import dataclasses
import io
import json

import pytest
from PIL import Image

from service.best import candidates
from service.catalog import Catalog
from service.choose import score, score_of
from service.cost import time_of
from service.entry import Entry
from service.errors import ManifestError
from service.index import read_rows
from service.jobs import Job, from_json, to_json
from service.messages import JobResult, Tile
from service.worker import Worker
from tests.grid import Grid
from tests.test_scoring import SCORES, judged, planned, worker_of  # noqa: F401
from ziplora import formats

OF = ["direct", {"method": "ziplora", "steps": 1}, {"method": "np-lora", "mu": 1.0}]
SAMPLES = {"prompts": ["{subject} in {style}"], "steps": 1, "size": 32}
MERGE = {"method": "best", "of": OF}
QUICK = {"samples": SAMPLES, "scores": SCORES, "pairs": [["dog", "ink"]]}


def jobs_of(grid: Grid, **fields: object) -> tuple[Job, ...]:
    return planned(grid.manifest(**{**QUICK, "merge": MERGE, **fields})).jobs  # type: ignore[arg-type]


def committed(worker: Worker, job: Job) -> Entry:
    result = worker.run(job)
    assert (result.status, result.reason) == ("committed", None)
    return worker.catalog.entry(job.job_id)


def test_the_highest_scored_candidate_is_what_its_method_alone_gives(judged: Grid) -> None:  # noqa: F811
    worker = worker_of(judged)
    (job,) = jobs_of(judged)
    entry = committed(worker, job)
    best = entry.report["best"]
    assert [one["method"] for one in best["candidates"]] == ["direct", "ziplora", "np-lora"]
    assert (best["by"], best["good_enough"], best["not_tried"]) == ("harmonic", None, [])
    scores = {one["method"]: one["score"] for one in best["candidates"]}
    assert scores[best["method"]] == max(scores.values()) == score(entry)
    assert all(score_of(one, "harmonic") == one["score"] and one["seconds"] > 0 for one in best["candidates"])
    assert sum(entry.report["stages"].values()) == pytest.approx(sum(one["seconds"] for one in best["candidates"]))
    assert (entry.method, entry.merged_by) == ("best", best["method"])

    # alone, each candidate scores what it scored here, and the winner's file is the same but for the job's name
    for alone in planned(judged.manifest(**{**QUICK, "merge": OF})).jobs:  # type: ignore[arg-type]
        other = committed(worker, alone)
        assert score(other) == pytest.approx(scores[alone.method], abs=1e-6)
        if alone.method == best["method"]:
            files = [worker.catalog.store.get(one.objects["merged.safetensors"].key) for one in (entry, other)]
            ours, theirs = (formats.read_lora(content) for content in files)
            assert ours.lora.layers.keys() == theirs.lora.layers.keys()
            assert all((ours.lora.layers[path].up == layer.up).all() for path, layer in theirs.lora.layers.items())
            assert ours.metadata["ziplora.job_id"] == job.job_id
            assert ours.metadata["ziplora.method"] == best["method"]
    picture = Image.open(io.BytesIO(worker.catalog.store.get(entry.objects["samples/000.png"].key)))
    assert picture.text["job"] == job.job_id  # type: ignore[attr-defined]
    catalog = Catalog(worker.catalog.store)
    catalog.build_index()
    rows = {row["method"]: row["merged_by"] for row in read_rows(catalog.store, "all").to_pylist()}
    assert rows == {"best": best["method"], "direct": "direct", "ziplora": "ziplora", "np-lora": "np-lora"}


def test_good_enough_ends_a_pair_and_no_other(judged: Grid) -> None:  # noqa: F811
    worker = worker_of(judged)
    fields = {"pairs": [["dog", "ink"], ["cat", "oil"]], "merge": MERGE | {"by": "style"}}
    scores = {
        job.pair: [one["score"] for one in committed(worker, job).report["best"]["candidates"]]
        for job in jobs_of(judged, **fields)
    }
    enough = sum(own[0] for own in scores.values()) / 2  # which one of the pairs has with its first candidate
    jobs = jobs_of(judged, pairs=fields["pairs"], merge=MERGE | {"by": "style", "good_enough": enough})
    together = Worker(dataclasses.replace(worker.settings, side_by_side=2))
    messages = [*together.work(Tile(jobs[::-1])), *together.work(Tile(()))]
    assert sum(isinstance(one, JobResult) and one.status == "committed" for one in messages) == 2
    tried = []
    for job in jobs:
        best, own = worker.catalog.entry(job.job_id).report["best"], scores[job.pair]
        n = next((i + 1 for i, value in enumerate(own) if value >= enough), len(own))
        assert [one["score"] for one in best["candidates"]] == pytest.approx(own[:n], abs=1e-5)
        assert best["not_tried"] == ["direct", "ziplora", "np-lora"][n:]
        tried.append(n)
    assert min(tried) == 1 < max(tried)


def test_a_candidate_that_fails_is_told_and_the_others_go_on(judged: Grid) -> None:  # noqa: F811
    worker = worker_of(judged)
    # so little density keeps nothing of a layer: bad input, which that method alone would be given up for
    hopeless = {"method": "prune", "density": 1e-6}
    (job,) = jobs_of(judged, merge={"method": "best", "of": [hopeless, "direct"]})
    best = committed(worker, job).report["best"]
    assert best["method"] == "direct"
    assert "keeps nothing of a layer" in best["candidates"][0]["failed"]
    (job,) = jobs_of(judged, merge={"method": "best", "of": [hopeless, hopeless | {"method": "ties"}]})
    result = worker.run(job)
    assert (result.status, result.kind) == ("failed", "BadInput")
    assert str(result.reason).startswith("none of best's candidates came to a score; the first: dog/ink: density")


def test_a_method_without_style_rows_is_sampled_at_full_strength_alone(judged: Grid) -> None:  # noqa: F811
    samples = SAMPLES | {"style_strengths": [1.0, 0.4]}
    (job,) = jobs_of(judged, samples=samples, merge={"method": "best", "of": ["svd", "direct"]})
    assert [one.samples.style_strengths for one in candidates(job)] == [(1.0,), (1.0, 0.4)]
    svd, direct = planned(judged.manifest(**{**QUICK, "samples": samples, "merge": ["svd", "direct"]})).jobs  # type: ignore[arg-type]
    assert (svd.samples.style_strengths, direct.samples.style_strengths) == ((1.0,), (1.0, 0.4))


def test_identity_and_cost(judged: Grid) -> None:  # noqa: F811
    (job,) = jobs_of(judged)
    assert from_json(to_json(job)) == job
    assert {one.job_id for one in candidates(job)} == {job.job_id}
    assert [one.method for one in candidates(job)] == ["direct", "ziplora", "np-lora"]
    others = [MERGE | {"of": OF[::-1]}, MERGE | {"good_enough": 0.5}, MERGE | {"by": "text"}]
    assert len({job.job_id, *(jobs_of(judged, merge=one)[0].job_id for one in others)}) == 4
    base = planned(judged.manifest(**{**QUICK, "merge": MERGE})).base  # type: ignore[arg-type]
    assert base is not None
    alone = planned(judged.manifest(**{**QUICK, "merge": OF})).jobs  # type: ignore[arg-type]
    both = [time_of(some, {}, base.shapes, base.default_size, base.size_step) for some in ((job,), alone)]
    assert both[0].total_s == pytest.approx(both[1].total_s)


def test_what_best_needs_is_said_by_the_plan(judged: Grid) -> None:  # noqa: F811
    def problems(**fields: object) -> list[str]:
        with pytest.raises(ManifestError) as caught:
            jobs_of(judged, **fields)
        return [line.partition(": merge: ")[2] for line in str(caught.value).splitlines()]

    assert problems(scores={"clip": SCORES["clip"]}) == [
        "best chooses by harmonic, which takes a dino scorer: name it under scores"
    ]
    assert problems(scores=None) == [
        "best chooses by harmonic, which takes a clip and a dino scorer: name it under scores"
    ]
    assert problems(samples={}) == [
        "best chooses by scores, which are given to samples of style strength 1.0: ask for some"
    ]
    assert problems(samples=SAMPLES | {"prompts": ["{subject}"]}) == [
        "best chooses by harmonic, which takes a sample prompt with both {subject} and {style}"
    ]
    assert problems(subjects=3, styles=3, pairs=[["fox", "wax"], ["dog", "ink"]]) == [
        "best chooses by harmonic, which takes reference images of subjects.fox: name some under images",
        "best chooses by harmonic, which takes reference images of styles.wax: name some under images",
    ]
    assert jobs_of(judged, merge=MERGE | {"by": "text"}, subjects=3, pairs=[["fox", "ink"]])


def test_a_job_of_another_method_reports_no_contest(judged: Grid) -> None:  # noqa: F811
    (job,) = jobs_of(judged, merge="direct")
    entry = committed(worker_of(judged), job)
    assert "best" not in entry.report
    assert (entry.merged_by, json.loads(to_json(job))["method"]) == ("direct", "direct")
