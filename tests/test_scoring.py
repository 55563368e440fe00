"""Scores through the service: from the manifest to the entry, the index, the metrics and `ziplora ls`."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel, ViTModel
from transformers.models.clip import CLIPImageProcessorPil
from transformers.models.vit import ViTImageProcessorPil

from service import events
from service.errors import ManifestError
from service.jobs import Job
from service.manifest import read_manifest
from service.messages import WorkerSettings
from service.metrics import Metrics
from service.plan import Plan, plan
from service.worker import Worker
from tests.commands import ziplora
from tests.grid import Grid
from tests.tiny_scorers import tiny_clip, tiny_resnet, tiny_vit
from ziplora.score import load_dino

SCORES = {"clip": "scorers/clip", "dino": "scorers/vit"}
SAMPLES = {"prompts": ["{subject} in {style}", "{subject}"], "seeds": [0, 1], "steps": 1, "size": 32}
QUICK = {"merge": "direct", "pairs": [["dog", "ink"]], "samples": SAMPLES}


@pytest.fixture
def judged(grid: Grid) -> Grid:
    """The grid, with scorers beside it."""
    tiny_clip(grid.root / "scorers/clip")
    tiny_vit(grid.root / "scorers/vit")
    return grid


def planned(manifest: Path) -> Plan:
    made = plan(read_manifest(manifest))
    made.check()
    return made


def job_of(grid: Grid, **fields: object) -> Job:
    return planned(grid.manifest(**{**QUICK, "scores": SCORES, **fields})).jobs[0]  # type: ignore[arg-type]


def worker_of(grid: Grid) -> Worker:
    return Worker(
        WorkerSettings(
            str(grid.root / "catalog"), str(grid.root / "base"), None, device="cpu", cache_dir=str(grid.root / "cache")
        )
    )


@torch.no_grad()
def by_hand(grid: Grid, pictures: list[Image.Image], prompts: list[str]) -> tuple[float, float, float]:
    """(style, subject, text): the published formulas with transformers alone; the first two pictures show the pair."""
    clip, vit = (
        kind.from_pretrained(grid.root / "scorers" / name) for kind, name in ((CLIPModel, "clip"), (ViTModel, "vit"))
    )
    clip.eval(), vit.eval()
    for_clip = CLIPImageProcessorPil.from_pretrained(grid.root / "scorers/clip")
    for_vit = ViTImageProcessorPil.from_pretrained(grid.root / "scorers/vit")
    tokens = AutoTokenizer.from_pretrained(grid.root / "scorers/clip")(prompts, padding=True, return_tensors="pt")

    def of_clip(images: list[Image.Image]) -> torch.Tensor:
        pixels = for_clip(images, return_tensors="pt").pixel_values
        return torch.nn.functional.normalize(clip.visual_projection(clip.vision_model(pixels).pooler_output))

    def of_vit(images: list[Image.Image]) -> torch.Tensor:
        return torch.nn.functional.normalize(
            vit(for_vit(images, return_tensors="pt").pixel_values).last_hidden_state[:, 0]
        )

    texts = torch.nn.functional.normalize(clip.text_projection(clip.text_model(**tokens).pooler_output))
    ink, dog = ([Image.open(grid.root / f"{id}.png").convert("RGB")] for id in ("ink", "dog"))
    return (
        float((of_clip(pictures[:2]) @ of_clip(ink).T).mean()),
        float((of_vit(pictures[:2]) @ of_vit(dog).T).mean()),
        float((of_clip(pictures) * texts).sum(1).mean()),
    )


def test_scores_are_those_of_the_published_samples(judged: Grid) -> None:
    worker = worker_of(judged)
    job = job_of(judged, samples=SAMPLES | {"style_strengths": [0.5, 1.0]})
    result = worker.run(job)
    assert (result.status, result.reason) == ("committed", None)
    entry = worker.catalog.entry(job.job_id)
    listed = [sample for sample in entry.report["samples"] if sample["style_strength"] == 1.0]
    contents = [worker.catalog.store.get(entry.objects[sample["object"]].key) for sample in listed]
    style, subject, text = by_hand(
        judged, [Image.open(io.BytesIO(content)) for content in contents], [sample["prompt"] for sample in listed]
    )
    scores = entry.report["scores"]
    assert scores["style_alignment"] == pytest.approx(style, abs=1e-5)
    assert scores["subject_alignment"] == pytest.approx(subject, abs=1e-5)
    assert scores["text_alignment"] == pytest.approx(text, abs=1e-5)
    assert scores["missing"] == {}
    assert (scores["pair_samples"], scores["text_samples"]) == (2, 4)
    assert job.scorers.clip is not None
    assert scores["clip"]["scorer"] == str(judged.root / "scorers/clip")
    assert scores["clip"]["digest"] == job.scorers.clip.digest
    assert result.stages["score"] > 0
    assert result.alignments == pytest.approx({"style": style, "subject": subject, "text": text}, abs=1e-5)

    worker.catalog.build_index()
    (row,) = pq.read_table(io.BytesIO(worker.catalog.store.get("index/all.parquet"))).to_pylist()
    assert row["style_alignment"] == scores["style_alignment"]
    assert row["text_alignment"] == scores["text_alignment"]


def test_a_worker_loads_its_judges_once(judged: Grid) -> None:
    worker = worker_of(judged)
    jobs = planned(judged.manifest(**{**QUICK, "scores": SCORES, "pairs": "all"})).jobs  # type: ignore[arg-type]
    worker.run(jobs[0])
    judges = dict(worker.judges.loaded)
    worker.run(jobs[1])
    assert len(judges) == 2
    assert all(worker.judges.loaded[key] is judge for key, judge in judges.items())


def test_a_resnet_can_judge_subjects(judged: Grid) -> None:
    tiny_resnet(judged.root / "scorers/resnet")
    worker, job = worker_of(judged), job_of(judged, scores={"dino": "scorers/resnet"})
    result = worker.run(job)
    assert (result.status, result.reason) == ("committed", None)
    assert -1 <= result.alignments["subject"] <= 1


def test_a_dino_without_a_pooler_has_one_digest(judged: Grid) -> None:
    """As DINO's own checkpoints: what transformers makes up for the missing pooler is random."""
    assert len({load_dino(judged.root / "scorers/vit").digest for _ in range(2)}) == 1


NO_SCORE = [
    ({"scores": {"clip": "scorers/clip"}}, {"subject_alignment": "the manifest names no dino scorer"}),
    (
        {"scores": {"dino": "scorers/vit"}},
        {"style_alignment": "the manifest names no clip scorer", "text_alignment": "the manifest names no clip scorer"},
    ),
    (
        {"pairs": [["fox", "wax"]]},
        {
            "subject_alignment": "subject fox has no reference images",
            "style_alignment": "style wax has no reference images",
        },
    ),
    (
        {"samples": SAMPLES | {"prompts": ["{subject}", "{style}"]}},
        dict.fromkeys(("style_alignment", "subject_alignment"), "no sample prompt has both {subject} and {style}"),
    ),
    (
        {"samples": {"prompts": []}},
        dict.fromkeys(
            ("style_alignment", "subject_alignment", "text_alignment"), "there are no samples of style strength 1.0"
        ),
    ),
]


@pytest.mark.parametrize(("fields", "missing"), NO_SCORE)
def test_what_cannot_be_scored_is_null_with_a_reason(
    judged: Grid, fields: dict[str, object], missing: dict[str, str]
) -> None:
    worker = worker_of(judged)
    made = planned(judged.manifest(subjects=3, styles=3, **{**QUICK, "scores": SCORES, **fields}))  # type: ignore[arg-type]
    assert any(line.startswith("scores: ") for line in made.defaulted)
    result = worker.run(made.jobs[0])
    assert (result.status, result.reason) == ("committed", None)
    scores = worker.catalog.entry(made.jobs[0].job_id).report["scores"]
    names = {"style_alignment", "subject_alignment", "text_alignment"}
    assert scores["missing"] == missing
    assert {name for name in names if scores[name] is None} == set(missing)
    assert {f"{kind}_alignment" for kind in result.alignments} == names - set(missing)


def test_identity_depends_on_what_the_scorers_are_and_on_nothing_else_of_them(judged: Grid) -> None:
    without = job_of(judged, scores=None)
    assert job_of(judged, scores={}).job_id == without.job_id
    both = job_of(judged)
    clip_only = job_of(judged, scores={"clip": "scorers/clip"})
    assert len({without.job_id, both.job_id, clip_only.job_id}) == 3
    (judged.root / "scorers").rename(judged.root / "elsewhere")
    moved = job_of(judged, scores={"clip": "elsewhere/clip", "dino": {"location": "elsewhere/vit"}})
    assert moved.job_id == both.job_id
    tiny_vit(judged.root / "elsewhere/vit", seed=1)
    assert job_of(judged, scores={"clip": "elsewhere/clip", "dino": "elsewhere/vit"}).job_id != both.job_id


def without(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def truncated(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


SPOILT = [
    ("clip", without("config.json"), "has no config.json; expected a directory as save_pretrained writes it"),
    ("clip", without("preprocessor_config.json"), "has no preprocessor_config.json"),
    ("clip", without("tokenizer.json"), "holds neither tokenizer.json nor vocab.json with merges.txt"),
    ("vit", without("model.safetensors"), "has no weights; expected model.safetensors or its shards"),
    ("vit", pickled, "has only pytorch_model.bin, a format that can run code when it is loaded"),
    ("vit", truncated, "truncated"),
]


@pytest.mark.parametrize(("name", "spoil", "text"), SPOILT)
def test_an_unfit_scorer_is_one_line_of_the_plan(
    judged: Grid, name: str, spoil: Callable[[Path], None], text: str
) -> None:
    spoil(judged.root / "scorers" / name)
    problems = plan(read_manifest(judged.manifest(**{**QUICK, "scores": SCORES}))).problems  # type: ignore[arg-type]
    (problem,) = problems
    assert text in problem
    assert str(judged.root / "scorers" / name) in problem
    assert f": scores.{'clip' if name == 'clip' else 'dino'}: " in problem
    assert problem.startswith(str(judged.root / "manifest.yaml:"))


WRONG = [
    ({"clip": "nowhere/clip/at/all"}, r"clip scorer .*nowhere/clip/at/all does not exist"),
    ({"clip": "dog.png"}, r"clip scorer .*dog\.png is a file; expected a directory"),
    ({"clip": "nobody/nothing"}, r"clip scorer nobody/nothing is no directory and not in the local hub cache"),
    ({"clip": "scorers/vit"}, r"clip scorer .*vit is a vit; expected clip"),
    ({"dino": "scorers/clip"}, r"dino scorer .*clip is a clip; expected vit or "),
    ({"dino": {"location": "scorers/vit", "revision": "main"}}, r"is a directory: a revision goes with a hub id"),
    ({"dino": "s3://bucket/vit"}, r"scores\.dino: s3://bucket/vit lies in object storage; expected a local directory"),
    ({"dini": "scorers/vit"}, r"scores\.dini: unknown field; did you mean dino\? known: clip, dino"),
    ({"dino": {"locaton": "x"}}, r"scores\.dino\.locaton: unknown field; did you mean location\?"),
    ({"dino": 3}, r"scores\.dino: expected a mapping of fields, given 3"),
    ("scorers/clip", r"scores: expected a mapping of fields, given 'scorers/clip'"),
]


@pytest.mark.parametrize(("scores", "text"), WRONG)
def test_a_wrong_section_is_told(judged: Grid, scores: object, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ManifestError, match=text):
        planned(judged.manifest(**{**QUICK, "scores": scores}))  # type: ignore[arg-type]


def test_a_scorer_that_does_not_load_fails_the_job_before_the_merge(judged: Grid) -> None:
    config = judged.root / "scorers/vit/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 48}))
    result = worker_of(judged).run(job_of(judged))
    assert (result.status, result.kind) == ("failed", "BadInput")
    assert str(result.reason).startswith(f"dino scorer {judged.root / 'scorers/vit'} does not load")
    assert set(result.stages) == {"score"}


def test_a_scorer_that_changed_after_the_plan_is_refused(judged: Grid) -> None:
    job = job_of(judged)
    tiny_vit(judged.root / "scorers/vit", seed=1)
    result = worker_of(judged).run(job)
    assert (result.status, result.kind) == ("failed", "BadInput")
    assert "the run was planned with" in str(result.reason)


def test_planning_scores_needs_no_torch(judged: Grid) -> None:
    manifest = judged.manifest(**{**QUICK, "scores": SCORES})  # type: ignore[arg-type]
    code = (
        "import sys; from service.cli import cli\n"
        f"cli.main(['plan', {str(manifest)!r}], standalone_mode=False)\n"
        "assert not {'torch', 'ray', 'diffusers', 'transformers'} & set(sys.modules), 'too much'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"clip: {judged.root / 'scorers/clip'}" in done.stdout


def test_a_scorer_of_the_hub_is_taken_from_the_local_cache(judged: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(judged.root / "hub"))
    repository, commit = judged.root / "hub/models--nobody--vit", "c" * 40
    for revision in ("main", "refs/pr/15"):
        (repository / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit if revision != "main" else "d" * 40)
    for snapshot in (commit, "d" * 40):
        shutil.copytree(judged.root / "scorers/vit", repository / "snapshots" / snapshot)
    pickled(repository / "snapshots" / ("d" * 40))
    refused = ziplora("plan", judged.manifest(**{**QUICK, "scores": {"dino": "nobody/vit"}}))  # type: ignore[arg-type]
    assert refused.returncode == 2
    assert "has only pytorch_model.bin" in refused.stderr
    assert "a revision such as refs/pr/15 only" in refused.stderr
    scores = {"dino": {"location": "nobody/vit", "revision": "refs/pr/15"}}
    done = ziplora("plan", "--json", judged.manifest(**{**QUICK, "scores": scores}))  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr
    scorer = json.loads(done.stdout)["scorers"]["dino"]
    assert (scorer["location"], scorer["revision"]) == ("nobody/vit", commit)
    assert (
        scorer["digest"]
        == json.loads(
            ziplora("plan", "--json", judged.manifest(**{**QUICK, "scores": SCORES})).stdout  # type: ignore[arg-type]
        )["scorers"]["dino"]["digest"]
    )


def test_metrics_count_alignments_by_kind(judged: Grid) -> None:
    metrics, job = Metrics("1"), job_of(judged)
    metrics.observe(events.JobCommitted(job, "w", already=False, alignments={"style": 0.62, "text": 0.21}))
    metrics.observe(events.JobCommitted(job, "w", already=True))
    text = metrics.text().decode()
    assert 'ziplora_alignment_count{kind="style"} 1.0' in text
    assert 'ziplora_alignment_bucket{kind="style",le="0.6"} 0.0' in text
    assert 'ziplora_alignment_bucket{kind="style",le="0.65"} 1.0' in text
    assert 'kind="subject"' not in text


def test_from_the_manifest_to_ls(judged: Grid) -> None:
    done = ziplora("run", judged.manifest(**{**QUICK, "scores": SCORES}), "--inline")  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr
    assert "scorer    dino: " in done.stdout
    listed = ziplora("ls", judged.root / "catalog").stdout
    assert "CLIP-I style" in listed
    assert "CLIP-T text" in listed
    (entry,) = map(json.loads, ziplora("ls", judged.root / "catalog", "--json").stdout.splitlines())
    assert 0 < entry["style_alignment"] <= 1
    (record,) = (judged.root / "catalog/runs").iterdir()
    assert 'ziplora_alignment_count{kind="subject"} 1.0' in (record / "metrics.prom").read_text()
