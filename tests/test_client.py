"""A catalog in somebody's own Python."""

import re
from pathlib import Path

import pytest
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from service import Catalog
from service.errors import Corrupted, NotFound
from service.messages import WorkerSettings
from service.worker import Worker
from tests.catalogs import files_of, fill, identity
from tests.conftest import Swift
from tests.grid import Grid
from tests.test_worker import jobs_of
from tests.tiny import SDXL_TARGETS


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_merges_load_into_a_pipeline(grid: Grid) -> None:
    catalog = str(grid.root / "catalog")
    settings = WorkerSettings(catalog, str(grid.root / "base"), None, device="cpu", cache_dir=str(grid.root / "cache"))
    worker = Worker(settings)
    for job in jobs_of(grid.manifest(merge={"method": "direct"}, samples={"prompts": []})):
        assert worker.run(job).status == "committed"
    pipeline = StableDiffusionXLPipeline.from_pretrained(grid.root / "base")
    merges = Catalog(catalog).where(style="in*")
    assert {(merge.subject, merge.style, merge.trigger) for merge in merges} == {
        ("dog", "ink", "sks dog, szn ink style"), ("cat", "ink", "sks cat, szn ink style")
    }  # fmt: skip
    for merge in merges:
        pipeline.load_lora_weights(merge.path)
        assert sum(hasattr(module, "lora_A") for module in pipeline.unet.modules()) >= SDXL_TARGETS
        pipeline.unload_lora_weights()
    # and as each tool has it: one directory for diffusers, kohya's names with one rank and alpha for the others
    out = grid.root / "pulled"
    assert {item.state for item in Catalog(catalog).pull(out, style="ink", subject="dog", layout="diffusers")} == {
        "pulled"
    }
    (directory,) = out.iterdir()
    pipeline.load_lora_weights(str(directory))
    assert sum(hasattr(module, "lora_A") for module in pipeline.unet.modules()) == SDXL_TARGETS
    list(Catalog(catalog).pull(out, style="ink", subject="dog", layout="comfyui"))
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    name = r"lora_unet_(input_blocks|middle_block|output_blocks)_\w+_attn[12]_to_(q|k|v|out_0)"
    assert all(re.fullmatch(rf"{name}\.(alpha|lora_down\.weight|lora_up\.weight)", key) for key in tensors)
    assert len(tensors) == 3 * SDXL_TARGETS
    ranks = {float(value) for key, value in tensors.items() if key.endswith(".alpha")}
    assert ranks == {float(value.shape[0]) for key, value in tensors.items() if key.endswith("lora_down.weight")}
    assert len(ranks) == 1


def test_files_are_fetched_once_and_verified(swift: Swift) -> None:
    catalog = Catalog(swift.url)
    (entry,) = fill(catalog, identity())
    (merge,) = catalog.where(subject="d*", method="z*")
    assert merge.path.read_bytes() == files_of(identity())["merged.safetensors"]
    assert merge.path == merge.path
    assert [prompt for prompt, _ in merge.pictures] == ["sks dog, szn"] * 2
    assert merge.score() is None
    with pytest.raises(NotFound, match=r"has no peft\.safetensors; it has merged\.json, merged\.png"):
        merge.file("peft.safetensors")
    key = entry.objects["mergers.safetensors"].key
    for wrong, reason in ((b"x" * 999, "has 999 bytes, its entry says 75"), (b"x" * 75, "has sha256")):
        catalog.store.put(key, wrong)
        with pytest.raises(Corrupted, match=reason):
            merge.file("mergers.safetensors")


def test_a_directory_is_read_in_place(local: Catalog, tmp_path: Path) -> None:
    (entry,) = fill(local, identity())
    (merge,) = local.where()
    assert merge.path == tmp_path / "catalog" / entry.objects["merged.safetensors"].key
    merge.path.write_bytes(b"?" * entry.objects["merged.safetensors"].size)
    with pytest.raises(Corrupted):
        _ = merge.path
    assert len(local.where()[:1]) == 1
