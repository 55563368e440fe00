"""The service on an SD 1.5 base, from a manifest to files that diffusers loads into that base."""

from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from service.manifest import read_manifest
from service.messages import WorkerSettings
from service.plan import plan
from service.worker import Worker
from tests.lora_files import lora_file, random_lora, shapes_of
from tests.tiny import tiny_sd15
from ziplora import formats
from ziplora.layouts import inspect_file, is_target
from ziplora.lora import delta

MERGES = ["direct", {"method": "ziplora", "steps": 2}, "ziplora-closed"]
TARGET = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def concept(id: str, prompt: str, trigger: str) -> dict[str, str]:
    return {"lora": f"{id}.safetensors", "prompt": prompt, "trigger": trigger, "images": f"{id}.png"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sd15")
    base = tiny_sd15()
    base.save_pretrained(root / "base")
    targets = {path: shape for path, shape in shapes_of(base).items() if is_target(path)}
    for number, id in enumerate(("dog", "ink")):
        lora = random_lora(targets, rank=2 + number, seed=number, size=0.2)
        (root / f"{id}.safetensors").write_bytes(lora_file(lora, "kohya-sd15", alphas=dict.fromkeys(targets, 2.0)))
        Image.effect_mandelbrot((48, 40), (-2 + number / 10, -1.5, 1, 1.5), 20).convert("RGB").save(root / f"{id}.png")
    manifest = {
        "base": "base",
        "subjects": {"dog": concept("dog", "a photo of sks", "sks")},
        "styles": {"ink": concept("ink", "a house in szn", "szn")},
        "merge": MERGES,
        "samples": {"prompts": ["{subject} in {style}"], "steps": 2, "size": 32},
        "output": "catalog",
    }
    (root / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    return root


def test_every_kind_of_merge_is_committed_and_loads_into_sd15(place: Path) -> None:
    planned = plan(read_manifest(place / "manifest.yaml"))
    planned.check()
    worker = Worker(
        WorkerSettings(str(place / "catalog"), str(place / "base"), None, device="cpu", cache_dir=str(place / "cache"))
    )
    merged = {}
    for job in planned.jobs:
        result = worker.run(job)
        assert (result.status, result.reason) == ("committed", None)
        entry = worker.catalog.entry(job.job_id)
        assert any(name.startswith("samples/") for name in entry.objects)
        file = place / f"{job.method}.safetensors"
        file.write_bytes(worker.catalog.store.get(entry.objects["merged.safetensors"].key))
        merged[job.method] = formats.read_lora(file).lora
        seen = inspect_file(file)
        assert (seen.base, seen.n_targets, seen.stated_base, seen.refusals) == ("SD 1.5", 128, "sd_v1", ())
        pipe = tiny_sd15()
        before = pipe.unet.get_submodule(TARGET).weight.clone()
        pipe.load_lora_weights(str(file))
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        change = pipe.unet.get_submodule(TARGET).weight - before
        torch.testing.assert_close(change, delta(merged[job.method].layers[f"unet.{TARGET}"]), atol=1e-5, rtol=1e-3)
    assert merged.keys() == {"direct", "ziplora", "ziplora-closed"}
    sources = [formats.read_lora(place / f"{id}.safetensors").lora.layers[f"unet.{TARGET}"] for id in ("dog", "ink")]
    found = delta(merged["direct"].layers[f"unet.{TARGET}"])
    torch.testing.assert_close(found, delta(sources[0]) + delta(sources[1]), atol=1e-3, rtol=1e-2)
    assert (delta(merged["ziplora-closed"].layers[f"unet.{TARGET}"]) - found).abs().max() > 1e-3
