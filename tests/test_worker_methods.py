"""Custom Diffusion, Mix-of-Show and K-LoRA through the service: what their entries hold, and what can be had of one
that is no LoRA."""

import json
import shutil
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.entry import Entry
from service.errors import BadInput, ManifestError, NotFound
from service.export import export
from service.index_rows import row
from service.jobs import Job
from service.manifest import read_manifest
from service.messages import WorkerSettings
from service.pages import cell, details
from service.plan import plan
from service.worker import Worker
from tests.grid import Grid
from ziplora import formats
from ziplora.captions import builtin_captions
from ziplora.fusion_knobs import KLoRAKnobs
from ziplora.k_lora import k_lora
from ziplora.merged import Pair
from ziplora.sample import Request, sample_requests

MERGES = [
    {"method": "custom-diffusion", "captions": list(builtin_captions()[::30])},
    {"method": "mix-of-show", "steps": 2, "context_steps": 2, "draws": 2, "size": 32},
    {"method": "k-lora"},
]
SAMPLES = {"prompts": ["{subject} in {style}"], "steps": 3, "size": 32, "style_strengths": [1.0, 0.4]}


@dataclass(frozen=True)
class Made:
    worker: Worker
    jobs: dict[str, Job]
    entries: dict[str, Entry]

    def read(self, method: str, name: str) -> bytes:
        return self.worker.catalog.store.get(self.entries[method].objects[name].key)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, grid_template: Grid) -> Made:
    root = tmp_path_factory.mktemp("methods") / "grid"
    shutil.copytree(grid_template.root, root)
    grid = Grid(root)
    fields = {"merge": MERGES, "pairs": [["cat", "oil"]], "samples": SAMPLES}
    planned = plan(read_manifest(grid.manifest(**fields)))
    planned.check()
    settings = WorkerSettings(
        str(root / "catalog"), str(root / "base"), None, device="cpu", cache_dir=str(root / "cache")
    )
    worker = Worker(settings)
    for job in planned.jobs:
        result = worker.run(job)
        assert (result.status, result.reason) == ("committed", None)
    jobs = {job.method: job for job in planned.jobs}
    return Made(worker, jobs, {name: worker.catalog.entry(job.job_id) for name, job in jobs.items()})


@pytest.mark.parametrize("method", ["custom-diffusion", "mix-of-show"])
def test_a_merged_file_is_left_with_its_figures(made: Made, method: str) -> None:
    entry = made.entries[method]
    assert {"merged.safetensors", "merged.json", "merged.png", "samples/001.png"} <= entry.objects.keys()
    file = formats.read_lora(made.read(method, "merged.safetensors"))
    assert file.metadata["ziplora.method"] == method
    assert any(path.startswith("text_encoder_2.") for path in file.lora.layers)
    figures = entry.report["merge"]
    if method == "custom-diffusion":
        assert figures["constraint_error_max"] < 1e-5  # the LoRAs are fp32
        assert min(figures["words"]) > 1
    else:
        assert 0 < figures["fusion_left_mean"] < figures["fusion_left_max"] <= 1
    assert export(made.worker.catalog.store, entry, 0.5)["merged.safetensors"]


def test_k_lora_leaves_pictures_and_a_recipe(made: Made) -> None:
    entry, job, base = made.entries["k-lora"], made.jobs["k-lora"], made.worker.base
    assert entry.objects.keys() == {"recipe.json", "merged.png", "samples/000.png", "samples/001.png"}
    recipe = json.loads(made.read("k-lora", "recipe.json"))
    assert recipe["about"]["ziplora.subject"] == job.subject.lora_sha256
    assert json.loads(recipe["about"]["ziplora.knobs"]) == {"alpha": 1.5, "beta": 0.5, "k": None}
    assert "subject's update applies in the steps before which" in recipe["rule"]
    pair = Pair(*(formats.read_lora(Path(concept.lora)).lora for concept in (job.subject, job.style)))
    (merged,) = k_lora(base, [pair], KLoRAKnobs())
    assert merged.until is not None
    assert recipe["until"] == {path: pytest.approx(share, abs=1e-6) for path, share in merged.until.items()}
    assert set(recipe["until"]) == set(base.slots.targets)
    pictures = sample_requests(
        base,
        [Request(merged.applied(s), "sks cat in szn oil style", 0) for s in (1.0, 0.4)],
        steps=3,
        width=32,
        height=32,
    )
    for number, picture in enumerate(pictures):
        stored = Image.open(BytesIO(made.read("k-lora", f"samples/00{number}.png")))
        assert np.array_equal(np.asarray(stored), np.asarray(picture))
    assert len(made.read("k-lora", "recipe.json")) < 40_000


def test_of_k_lora_no_file_can_be_had_and_it_says_why(made: Made, tmp_path: Path) -> None:
    catalog, entry = made.worker.catalog, made.entries["k-lora"]
    reason = "k-lora chooses between the two LoRAs at every step of sampling, so there is no merged LoRA"
    (skipped,) = catalog.pull(tmp_path, method="k-lora")
    assert skipped.state == "skipped"
    assert str(skipped.problem).startswith(reason)
    with pytest.raises(BadInput, match=f"cat/oil, nothing to export: {reason}"):
        export(catalog.store, entry, 0.6)
    (merge,) = catalog.where(method="k-lora")
    with pytest.raises(NotFound, match=reason):
        _ = merge.path
    assert [prompt for prompt, _ in merge.pictures] == ["sks cat in szn oil style"]
    assert not [checked for checked in catalog.verify() if checked.problem]


def test_index_and_gallery_take_it_as_it_is(made: Made) -> None:
    found = row(made.entries["k-lora"])
    assert (found["lora_key"], found["lora_bytes"]) == (None, None)
    assert found["preview_key"]
    shown = details(found)
    assert shown["lora"] is None
    assert shown["recipe"].endswith("/recipe.json")
    assert len(shown["samples"]) == 2
    assert cell(found)["preview"]
    assert details(row(made.entries["mix-of-show"]))["recipe"] is None


def test_captions_that_cannot_suffice_are_refused_by_the_plan(grid: Grid) -> None:
    manifest = grid.manifest(merge={"method": "custom-diffusion", "captions": ["a dog"]})
    with pytest.raises(ManifestError, match=r"merge: missing captions: 1 cannot have 64 words in different contexts"):
        plan(read_manifest(manifest)).check()
