"""A merge at another style strength from what the catalog keeps."""

import hashlib
import json
import shutil
from dataclasses import dataclass, replace

import pytest
import torch

from service.catalog import Catalog
from service.entry import Entry, Object
from service.errors import BadInput
from service.export import as_entry, export
from service.messages import WorkerSettings
from service.pull_layouts import Shown, placed
from service.worker import Worker
from tests.grid import Grid
from tests.test_worker import jobs_of
from ziplora import formats
from ziplora.errors import FormatError
from ziplora.lora import Layer, LoRA, delta, digest, restyled, scaled
from ziplora.merged import Merged

TARGET = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
SAMPLES = {"prompts": ["{subject} in {style}"], "steps": 1, "size": 32, "style_strengths": [1.0, 0.6]}


@dataclass(frozen=True, slots=True)
class Made:
    catalog: Catalog
    entries: dict[str, Entry]  # by method
    sources: tuple[str, str]


@pytest.fixture(scope="module")
def made(grid_template: Grid, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A ZipLoRA merge whose mergers have moved, and a direct one, of one pair."""
    root = tmp_path_factory.mktemp("made") / "grid"
    shutil.copytree(grid_template.root, root)
    worker = Worker(
        WorkerSettings(str(root / "catalog"), str(root / "base"), None, device="cpu", cache_dir=str(root / "cache"))
    )
    entries = {}
    for merge in ({"method": "ziplora", "steps": 2, "learning_rate": 0.1}, {"method": "direct"}):
        (job,) = jobs_of(Grid(root).manifest("export.yaml", 1, 1, merge=merge, samples=SAMPLES))
        assert worker.run(job).status == "committed"
        entries[job.method] = worker.catalog.entry(job.job_id)
    return Made(worker.catalog, entries, (str(root / "dog.safetensors"), str(root / "ink.safetensors")))


def remerged(made: Made, method: str, strength: float) -> LoRA:
    """Eq. 2 once more from the source files and the kept mergers, the style's part times the strength."""
    loras, entry = [formats.read_lora(source).lora for source in made.sources], made.entries[method]
    if "mergers.safetensors" in entry.objects:
        mergers = formats.read_mergers(made.catalog.store.get(entry.objects["mergers.safetensors"].key))
        assert float((mergers.style[TARGET] - 1).abs().max()) > 0.1
        loras = [
            LoRA({path: Layer(x.down * m[path] if path in m else x.down, x.up) for path, x in lora.layers.items()})
            for lora, m in zip(loras, (mergers.subject, mergers.style), strict=True)
        ]
    return Merged(loras[0], scaled(loras[1], strength), None, {}).lora()


def differences(one: LoRA, other: LoRA) -> tuple[float, float]:
    """The largest difference of any element of ΔW; and of any layer's ‖ΔW‖, relative to it."""
    assert one.layers.keys() == other.layers.keys()
    pairs = [(delta(one.layers[path]).double(), delta(layer).double()) for path, layer in other.layers.items()]
    elements = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
    return elements, max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)


@pytest.mark.parametrize("method", ["ziplora", "direct"])
@pytest.mark.parametrize("strength", [0.6, 0.0, 1.3])
def test_from_the_sources_it_is_a_merge_at_this_strength(made: Made, method: str, strength: float) -> None:
    entry, theirs = made.entries[method], remerged(made, method, strength)
    files = export(made.catalog.store, entry, strength, sources=made.sources, dtype=torch.float32)
    elements, layers = differences(formats.read_lora(files["merged.safetensors"]).lora, theirs)
    assert elements <= 1e-6
    assert layers <= 1e-6
    # and in fp16 what such a merge would have published, rounding included
    files = export(made.catalog.store, entry, strength, sources=made.sources)
    published = formats.write_kohya(theirs, metadata={}, architecture="sdxl")
    ours, theirs = (formats.read_lora(content).lora for content in (files["merged.safetensors"], published))
    assert digest(ours) == digest(theirs)


def test_from_the_published_file_it_is_that_file_with_its_style_half_scaled(made: Made) -> None:
    store, entry = made.catalog.store, made.entries["ziplora"]
    published = formats.read_lora(store.get(entry.objects["merged.safetensors"].key))
    rank = int(published.metadata["ziplora.subject_rank"])
    exact = restyled(published.lora, rank, 0.6)
    fp32 = formats.read_lora(export(store, entry, 0.6, dtype=torch.float32)["merged.safetensors"]).lora
    assert differences(fp32, exact)[1] <= 1e-6
    # fp16 rounds the published values, and the scaled ones once more: 2⁻¹¹ of a value each
    fp16 = formats.read_lora(export(store, entry, 0.6)["merged.safetensors"]).lora
    assert differences(fp16, exact)[1] <= 2**-11
    assert differences(fp16, remerged(made, "ziplora", 0.6))[1] <= 2**-10
    assert differences(fp16, published.lora)[1] > 0.01
    # a header that becomes shorter leaves nothing behind the values
    content = export(store, entry, 0.6)["merged.safetensors"]
    short = formats.restyle_kohya(content, subject_rank=rank, style_strength=1.0, metadata={"modelspec.title": "x"})
    assert digest(formats.read_lora(short).lora) == digest(fp16)
    with pytest.raises(FormatError, match=r"leaves torch\.float16 at style strength 1e"):
        formats.restyle_kohya(content, subject_rank=rank, style_strength=1e9, metadata={})
    same = formats.read_lora(export(store, entry, 1.0)["merged.safetensors"])
    assert digest(same.lora) == digest(published.lora)


def test_the_file_says_what_it_is(made: Made) -> None:
    store, entry = made.catalog.store, made.entries["ziplora"]
    files = export(store, entry, 0.6)
    file = formats.read_lora(files["merged.safetensors"])
    assert file.metadata["ziplora.style_strength"] == "0.6"
    assert file.metadata["modelspec.title"] == "dog × ink (ziplora), style 0.6"
    assert file.metadata["ziplora.job_id"] == entry.job_id
    assert file.trigger == "sks dog, szn ink style"
    before = formats.read_lora(store.get(entry.objects["merged.safetensors"].key)).metadata
    assert file.metadata["sshs_model_hash"] != before["sshs_model_hash"]
    assert json.loads(files["merged.json"])["activation text"] == "sks dog, szn ink style"
    assert files["merged.png"] == store.get(entry.objects["samples/001.png"].key)  # the one at 0.6
    assert "merged.png" not in export(store, entry, 0.7)


def test_it_is_laid_out_as_a_pulled_one(made: Made) -> None:
    entry = made.entries["ziplora"]
    shown = as_entry(entry, export(made.catalog.store, entry, 0.6))
    names = [str(file.path) for file in placed("diffusers", shown, "dog", (), Shown("me/base", 0.6))]
    assert names == ["dog/pytorch_lora_weights.safetensors", "dog/images/000.png", "dog/README.md"]
    card = placed("diffusers", shown, "dog", (), Shown("me/base", 0.6))[-1].source
    assert isinstance(card, bytes)
    assert b"| style strength | 0.6 |" in card
    assert [str(file.path) for file in placed("a1111", shown, "dog")] == ["dog.safetensors", "dog.json", "dog.png"]


def test_what_cannot_be_exported_is_refused_with_its_reason(made: Made) -> None:
    store, entry = made.catalog.store, made.entries["direct"]
    with pytest.raises(BadInput, match=r"ink\.safetensors is not the subject that dog/ink was merged from"):
        export(store, entry, 0.6, sources=(made.sources[1], made.sources[0]))
    with pytest.raises(BadInput, match="dog/ink, nothing to export: direct left no merged LoRA"):
        export(store, replace(entry, objects={}), 0.6)
    lora = formats.read_lora(store.get(entry.objects["merged.safetensors"].key))
    for header, reason in (({}, "does not say which rows"), ({"ziplora.subject_rank": "999"}, "no rows of its own")):
        content = formats.write_kohya(lora.lora, metadata=header, architecture="sdxl")
        store.put("pairs/x", content)
        other = Object("merged.safetensors", "pairs/x", hashlib.sha256(content).hexdigest(), len(content), "")
        with pytest.raises(BadInput, match=reason):
            export(store, replace(entry, objects={other.name: other}), 0.6)
    mixed = replace(entry, job={**entry.job, "method": "ties"})
    with pytest.raises(BadInput, match="ties keeps no mergers: leave the source LoRAs away"):
        export(store, mixed, 0.6, sources=made.sources)
