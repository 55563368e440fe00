"""One worker: from LoRA files to a committed entry, over and over on one resident base."""

import dataclasses
import gc
import json
from io import BytesIO
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from service.jobs import Job
from service.manifest import read_manifest
from service.messages import WorkerSettings
from service.plan import plan
from service.worker import Worker
from tests.grid import Grid
from ziplora import formats
from ziplora.lora import delta

TARGET = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def jobs_of(manifest: Path) -> tuple[Job, ...]:
    planned = plan(read_manifest(manifest))
    planned.check()
    return planned.jobs


def settings(grid: Grid) -> WorkerSettings:
    return WorkerSettings(
        str(grid.root / "catalog"), str(grid.root / "base"), None, device="cpu", cache_dir=str(grid.root / "cache")
    )


@pytest.fixture
def worker(grid: Grid) -> Worker:
    return Worker(settings(grid))


def test_an_entry_holds_everything_and_the_file_describes_itself(grid: Grid, worker: Worker) -> None:
    samples = {
        "prompts": ["{subject} in {style}", "{subject}"],
        "seeds": [0, 1],
        "steps": 2,
        "size": 32,
        "style_strengths": [1.0, 0.4],
    }
    job = jobs_of(grid.manifest(samples=samples, outputs=["peft"]))[0]
    result = worker.run(job)
    assert (result.status, result.reason) == ("committed", None)
    entry = worker.catalog.entry(job.job_id)
    assert {name for name in entry.objects if not name.startswith("samples/")} == {
        "merged.safetensors", "merged.json", "merged.png", "mergers.safetensors", "peft.safetensors"
    }  # fmt: skip
    assert sum(name.startswith("samples/") for name in entry.objects) == 8
    read = {name: worker.catalog.store.get(item.key) for name, item in entry.objects.items()}
    merged = formats.read_lora(read["merged.safetensors"])
    assert merged.layout.startswith("kohya")
    assert merged.metadata["ziplora.method"] == "ziplora"
    assert json.loads(merged.metadata["ziplora.knobs"])["steps"] == 3
    assert merged.metadata["ziplora.subject"] == job.subject.lora_sha256
    assert merged.trigger == "sks dog, szn ink style"
    assert entry.report["subject"]["calibrated_on"] == "images"
    assert set(result.stages) == {"fetch", "calibrate", "merge", "write", "sample", "commit"}
    picture = Image.open(BytesIO(read["samples/001.png"]))
    assert picture.size == (32, 32)
    assert picture.text["prompt"] == "sks dog in szn ink style"  # type: ignore[attr-defined]
    assert [sample["style_strength"] for sample in entry.report["samples"]] == [1.0, 1.0, 0.4, 0.4] * 2
    assert read["merged.png"] == read["samples/000.png"]
    assert worker.run(job).status == "already"


def test_the_published_file_is_eq_2_of_the_source_files(grid: Grid, worker: Worker) -> None:
    job = jobs_of(grid.manifest())[0]
    worker.run(job)
    entry = worker.catalog.entry(job.job_id)
    merged = formats.read_lora(worker.catalog.store.get(entry.objects["merged.safetensors"].key)).lora
    mergers = formats.read_mergers(worker.catalog.store.get(entry.objects["mergers.safetensors"].key))
    subject, style = (formats.read_lora(Path(concept.lora)).lora for concept in (job.subject, job.style))
    expected = (
        delta(subject.layers[TARGET]) * mergers.subject[TARGET] + delta(style.layers[TARGET]) * mergers.style[TARGET]
    )
    torch.testing.assert_close(delta(merged.layers[TARGET]), expected, rtol=0, atol=2e-3 * expected.abs().max().item())
    assert (mergers.subject[TARGET] != 1).any()


def test_what_a_worker_did_before_changes_no_byte(grid: Grid, worker: Worker) -> None:
    jobs = jobs_of(grid.manifest())
    for job in jobs:
        worker.run(job)
    other = Worker(dataclasses.replace(settings(grid), catalog=str(grid.root / "other")))
    for job in reversed(jobs):
        other.run(job)
    assert worker.catalog.digest() == other.catalog.digest()


def test_a_lora_without_images_is_observed_on_its_own_samples(grid: Grid, worker: Worker) -> None:
    job = jobs_of(grid.manifest(subjects=3, pairs=[["fox", "ink"]]))[0]
    assert worker.run(job).status == "committed"
    report = worker.catalog.entry(job.job_id).report
    assert report["subject"]["calibrated_on"] == "self-generated"
    assert report["style"]["calibrated_on"] == "images"


def test_carried_modules_are_in_the_file_and_in_the_report(grid: Grid, worker: Worker) -> None:
    job = jobs_of(grid.manifest(pairs=[["cat", "ink"]]))[0]
    assert worker.run(job).status == "committed"
    entry = worker.catalog.entry(job.job_id)
    assert entry.report["subject"]["carried_modules"] > 50
    merged = formats.read_lora(worker.catalog.store.get(entry.objects["merged.safetensors"].key)).lora
    assert any(path.startswith("text_encoder_2.") for path in merged.layers)
    assert entry.report["subject"]["carried_modules"] == sum(
        path not in worker.base.slots.targets for path in merged.layers
    )


def test_after_12_pairs_the_base_is_bit_identical_and_memory_is_flat(grid: Grid, worker: Worker) -> None:
    manifest = grid.manifest(subjects=4, styles=3, merge={"method": "ziplora", "steps": 2}, samples={"prompts": []})
    jobs = jobs_of(manifest)
    assert len(jobs) == 12
    weights = {name: tensor.clone() for name, tensor in worker.base.unet.state_dict().items()}
    modules = [id(module) for module in worker.base.unet.modules()]
    addresses = {name: tensor.data_ptr() for name, tensor in worker.base.unet.state_dict().items()}
    memory = []
    for job in jobs:
        assert worker.run(job).status == "committed"
        gc.collect()
        memory.append(psutil.Process().memory_info().rss)
    after = worker.base.unet.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in after.items())
    assert addresses == {name: tensor.data_ptr() for name, tensor in after.items()}
    assert modules == [id(module) for module in worker.base.unet.modules()]
    # every LoRA and calibration of this grid is in the caches after the first rows: from there on nothing may be added
    assert memory[-1] < memory[8] * 1.02


def test_bad_input_is_the_jobs_failure_not_the_workers(grid: Grid, worker: Worker) -> None:
    path = grid.root / "dog.safetensors"
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path)
    jobs = {job.pair: job for job in jobs_of(grid.manifest())}
    failed = worker.run(jobs["dog/ink"])
    assert (failed.status, failed.kind) == ("failed", "BadInput")
    assert name in str(failed.reason)
    assert "dog" in str(failed.reason)
    assert failed.traceback
    assert worker.run(jobs["cat/oil"]).status == "committed"
    assert worker.catalog.committed() == {jobs["cat/oil"].job_id}


def test_a_file_that_changed_after_the_plan_is_refused(grid: Grid, worker: Worker) -> None:
    job = jobs_of(grid.manifest())[0]
    (grid.root / "dog.safetensors").write_bytes((grid.root / "cat.safetensors").read_bytes())
    result = worker.run(job)
    assert result.kind == "BadInput"
    assert "sha256" in str(result.reason)


def test_a_diverging_merge_is_given_a_reason(grid: Grid, worker: Worker) -> None:
    job = jobs_of(grid.manifest())[0]
    result = worker.run(dataclasses.replace(job, subject=dataclasses.replace(job.subject, weight=1e30)))
    assert (result.status, result.kind) == ("failed", "BadInput")
    assert "dog/ink" in str(result.reason)
