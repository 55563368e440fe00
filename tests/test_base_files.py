"""What a base directory holds, on real saved pipelines: shapes, digest, a message for each kind of wrong one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from service.base_files import MASKED, BaseFiles, read_base
from service.errors import ManifestError
from service.inputs import DigestCache
from service.model_files import is_hub_id
from tests.lora_files import shapes_of
from tests.tiny import tiny_amused, tiny_sd15, tiny_sdxl


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """sdxl, sd15, and sdxl again: in shards, in fp16."""
    root = tmp_path_factory.mktemp("bases")
    sdxl = tiny_sdxl()
    sdxl.save_pretrained(root / "sdxl")
    sdxl.save_pretrained(root / "shards", max_shard_size="2MB")
    tiny_sd15().save_pretrained(root / "sd15")
    tiny_sdxl(torch.float16).save_pretrained(root / "fp16", variant="fp16")
    return root


@pytest.fixture
def base(saved: Path, tmp_path: Path) -> Path:
    """A copy of sdxl to spoil."""
    shutil.copytree(saved / "sdxl", tmp_path / "base", copy_function=os.link)
    return tmp_path / "base"


@pytest.fixture
def digests(tmp_path: Path) -> DigestCache:
    return DigestCache(tmp_path / "digests")


def message(location: Path | str, digests: DigestCache, **kwargs) -> str:
    with pytest.raises(ManifestError) as caught:
        read_base(str(location), digests=digests, **kwargs)
    return str(caught.value)


def rewrite(path: Path, **changes) -> None:
    """Change a JSON file of a copy whose files are links."""
    content = json.loads(path.read_bytes()) | changes
    path.unlink()
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(("name", "build"), [("sdxl", tiny_sdxl), ("sd15", tiny_sd15)])
def test_shapes_are_those_of_the_loaded_model(saved, digests, name, build):
    found = read_base(str(saved / name), digests=digests)
    assert dict(found.shapes) == shapes_of(build())
    assert (found.architecture, found.variant, found.default_size, found.size_step) == (name, None, 64, 8)
    assert found.ref.digest == found.digest
    assert found.ref.location == str(saved / name)


def test_scheduler(saved, digests, base):
    assert read_base(str(saved / "sd15"), digests=digests).scheduler == "PNDMScheduler"
    rewrite(base / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    assert read_base(str(base), digests=digests).prediction_type == "v_prediction"


def test_shards_and_variants(saved, digests):
    whole, shards, half = (read_base(str(saved / name), digests=digests) for name in ("sdxl", "shards", "fp16"))
    assert dict(shards.shapes) == dict(half.shapes) == dict(whole.shapes)
    assert "unet/diffusion_pytorch_model.safetensors.index.json" in shards.files
    assert half.variant == "fp16"
    assert whole.n_bytes == sum((saved / "sdxl" / name).stat().st_size for name in whole.files)


def test_digest_depends_on_what_is_loaded_and_on_nothing_else(saved, digests, base):
    def digest() -> str:
        return read_base(str(base), digests=digests).digest

    own = digest()
    assert own == read_base(str(saved / "sdxl"), digests=digests).digest
    (base / "README.md").write_text("hello")
    shutil.copy(
        base / "unet/diffusion_pytorch_model.safetensors", base / "unet/diffusion_pytorch_model.fp16.safetensors"
    )
    assert digest() == own
    (base / "tokenizer/added_tokens.json").write_text("{}")
    changed = digest()
    assert changed != own
    rewrite(base / "scheduler/scheduler_config.json", beta_end=0.013)
    assert digest() not in (own, changed)


def test_other_pipelines(base, digests):
    rewrite(base / "model_index.json", _class_name="FluxPipeline")
    assert message(base, digests) == (
        f"base {base} is a FluxPipeline; expected StableDiffusionXLPipeline or StableDiffusionPipeline"
    )
    rewrite(base / "model_index.json", _class_name="AmusedPipeline")
    assert message(base, digests).endswith(
        "; as the base of styledrop it is named in merge: {method: styledrop, base: …}"
    )


def test_a_masked_token_model_is_a_family_of_its_own(saved, digests, tmp_path):
    tiny_amused().save_pretrained(tmp_path / "amused")
    found = read_base(str(tmp_path / "amused"), digests=digests, family=MASKED)
    assert (found.ref.architecture, found.default_size, found.size_step) == ("amused", 16, 2)
    assert found.shapes["transformer.transformer_layers.1.ff.net.2"] == (32, 64)
    assert not any(path.startswith("vqvae") for path in found.shapes)
    assert {"vqvae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"} <= found.files.keys()
    assert message(saved / "sdxl", digests, family=MASKED) == (
        f"incompatible base: base {saved / 'sdxl'} is a StableDiffusionXLPipeline; expected AmusedPipeline, a"
        " masked-token model such as amused/amused-256"
    )
    assert message(tmp_path, digests, family=MASKED).endswith("; expected a diffusers directory of aMUSEd")
    assert message(tmp_path / "none", digests, family=MASKED).endswith("a hub id such as amused/amused-256")
    shutil.rmtree(tmp_path / "amused/vqvae")
    assert "has no vqvae/; a AmusedPipeline needs " in message(tmp_path / "amused", digests, family=MASKED)


def test_no_pipeline(tmp_path, digests):
    assert message(tmp_path, digests) == (
        f"base {tmp_path} has no model_index.json (it is empty); expected a diffusers directory of SDXL or SD 1.5"
    )
    (tmp_path / "sdxl.safetensors").touch()
    assert "(it holds sdxl.safetensors)" in message(tmp_path, digests)
    assert message(tmp_path / "sdxl.safetensors", digests).startswith(
        f"base {tmp_path}/sdxl.safetensors is a file; expected a diffusers directory: convert a single-file checkpoint"
    )
    assert message(tmp_path / "none", digests) == (
        f"base {tmp_path}/none does not exist; expected a diffusers directory, s3://bucket/prefix or a hub id such as "
        "stabilityai/stable-diffusion-xl-base-1.0"
    )
    assert message(tmp_path, digests, revision="main") == (
        f"base {tmp_path} is a directory: a revision goes with a hub id only; remove it"
    )


def test_missing_parts_are_all_named(base, digests):
    shutil.rmtree(base / "text_encoder_2")
    shutil.rmtree(base / "scheduler")
    (base / "tokenizer/tokenizer.json").unlink()
    (base / "unet/config.json").unlink()
    (base / "vae/diffusion_pytorch_model.safetensors").unlink()
    needs = (
        "a StableDiffusionXLPipeline needs scheduler, text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet, vae"
    )
    assert message(base, digests).splitlines() == [
        f"base {base} has no scheduler/; {needs}",
        f"base {base} has no text_encoder_2/; {needs}",
        f"base {base}: tokenizer/ holds neither tokenizer.json nor vocab.json with merges.txt",
        f"base {base}: unet/config.json is missing",
        f"base {base}: vae/ has no weights; expected diffusion_pytorch_model.safetensors or its shards",
    ]


def test_pickled_weights(base, digests):
    (base / "unet/diffusion_pytorch_model.safetensors").rename(base / "unet/diffusion_pytorch_model.bin")
    assert message(base, digests) == (
        f"base {base}: unet/ has only diffusion_pytorch_model.bin, a format that can run code when it is loaded; "
        "expected safetensors: load it where you trust it and write it with pipeline.save_pretrained(DIRECTORY)"
    )


def test_truncated_weights(base, digests):
    path = base / "vae/diffusion_pytorch_model.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1000])
    assert message(base, digests).startswith(f"base {path} is truncated: its header describes ")
    path.write_bytes(b"")
    assert message(base, digests).startswith(f"base {path} is empty: 0 bytes")


def test_inpainting_unet(base, digests):
    from safetensors.torch import load_file, save_file

    path = base / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.weight"] = torch.zeros(16, 9, 3, 3)
    path.unlink()
    save_file(tensors, path)
    assert message(base, digests) == (
        f"base {base}: unet.conv_in takes 9 channels (an inpainting UNet); expected 4, text to image"
    )


def test_other_autoencoder(base, digests):
    (base / "vae/config.json").unlink()
    (base / "vae/config.json").write_text('{"_class_name": "AutoencoderTiny", "encoder_block_out_channels": [64]}')
    assert "its vae is a AutoencoderTiny; expected AutoencoderKL" in message(base, digests)


def test_missing_or_malicious_shard(saved, tmp_path, digests):
    base = tmp_path / "shards"
    shutil.copytree(saved / "shards", base)
    index = base / "unet/diffusion_pytorch_model.safetensors.index.json"
    shard = sorted((base / "unet").glob("*-of-*.safetensors"))[0]
    shard.unlink()
    assert message(base, digests) == (
        f"base {base}: unet/{index.name} names {shard.name}, which is missing; fetch the model again"
    )
    rewrite(index, weight_map={"conv_in.weight": "../../secret.safetensors"})
    assert message(base, digests) == (
        f"base {base}: unet/{index.name} names '../../secret.safetensors'; expected safetensors files beside it"
    )


def test_damaged_settings(base, digests):
    (base / "unet/config.json").unlink()
    (base / "unet/config.json").write_text("{")
    assert message(base, digests).startswith(f"base {base}/unet: config.json is no JSON (")
    (base / "unet/config.json").write_text(json.dumps({"block_out_channels": [16, 32, 64]}))
    assert message(base, digests) == (
        f"base {base}: unet/config.json sample_size is None; expected a whole number of latent pixels"
    )


def test_hub_ids():
    assert is_hub_id("stabilityai/stable-diffusion-xl-base-1.0")
    assert not any(map(is_hub_id, ("sdxl", "./sdxl", "/a/b", "a/b/c", "../b", "a/..", "a b/c")[:5]))


HUB = """
import json, sys
from service.base_files import read_base
from service.errors import ManifestError
from service.inputs import DigestCache
from pathlib import Path
try:
    found = read_base("org/tiny", *sys.argv[2:], digests=DigestCache(Path(sys.argv[1])))
    print(json.dumps([found.location, found.revision, found.architecture]))
except ManifestError as error:
    print(json.dumps(str(error)))
"""


def from_hub_cache(cache: Path, *revision: str):
    """In a process of its own, since huggingface_hub reads its environment when it is imported."""
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", HUB, str(cache / "digests"), *revision]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def test_hub_cache(saved, tmp_path):
    assert from_hub_cache(tmp_path) == (
        "base org/tiny is no directory and not in the local hub cache; fetch it once with `hf download org/tiny`, "
        "or allow the download"
    )
    commit = "0123456789" * 4
    repo = tmp_path / "models--org--tiny"
    shutil.copytree(saved / "sdxl", repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    assert from_hub_cache(tmp_path) == ["org/tiny", commit, "sdxl"]
    assert from_hub_cache(tmp_path, "v2") == (
        "base org/tiny at revision v2 is no directory and not in the local hub cache; fetch it once with "
        "`hf download org/tiny --revision v2`, or allow the download"
    )


def test_what_is_known_of_a_base_is_a_value(saved, digests):
    found = read_base(str(saved / "sdxl"), digests=digests)
    assert isinstance(found, BaseFiles)
    with pytest.raises(AttributeError):
        found.digest = "x"
