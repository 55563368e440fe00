import copy
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save

from tests.lora_files import LAYOUTS, SD15_LAYOUTS, SDXL_LAYOUTS, differing_alphas, lora_file, random_lora, shapes_of
from tests.tiny import tiny_sd15, tiny_sdxl
from ziplora.errors import FormatError, UnsupportedAdapter
from ziplora.formats import read_lora, read_mergers, save_kohya, sidecar, write_kohya, write_mergers, write_peft
from ziplora.headers import Limits, read_header_bytes
from ziplora.layouts import inspect_file, is_target
from ziplora.lora import Layer, LoRA, Mergers, concat, delta, digest, max_rank, scaled, to, zip_merge

BLOCK = "unet.down_blocks.1.attentions.0.transformer_blocks.0"
Q, K = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k"
CONV = "unet.down_blocks.1.resnets.0.conv1"
TEXT = "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"
SHAPES = {Q: (32, 32), K: (32, 64), CONV: (32, 16, 3, 3), TEXT: (64, 32)}


def assert_same_deltas(ours: LoRA, theirs: LoRA, tolerance: float = 0.0) -> None:
    assert set(ours.layers) == set(theirs.layers)
    for path, layer in theirs.layers.items():
        expected = delta(layer).double()
        assert (delta(ours.layers[path]).double() - expected).norm() <= tolerance * expected.norm(), path


# Reading


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "kohya-sd15"])
@pytest.mark.parametrize("with_alphas", [False, True])
def test_every_layout_reads_as_the_same_lora(layout, with_alphas, tmp_path):
    """Ranks mixed, alphas different from module to module, to the last bit."""
    lora = random_lora(SHAPES, rank=lambda path: 16 if path in (Q, TEXT) else 4)
    content = lora_file(lora, layout, alphas=differing_alphas(lora) if with_alphas else None)
    (tmp_path / "dog.safetensors").write_bytes(content)
    for source in (content, tmp_path / "dog.safetensors"):
        file = read_lora(source, name="dog")
        assert_same_deltas(file.lora, lora)
        assert file.n_bytes == len(content)
        if with_alphas and layout != "peft, rslora":
            assert file.alphas == differing_alphas(lora)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_lora_survives_any_layout(data):
    paths = data.draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True))
    ranks = {path: data.draw(st.integers(1, 6)) for path in paths}
    lora = random_lora({path: SHAPES[path] for path in paths}, ranks.__getitem__, data.draw(st.integers(0, 99)))
    lora = to(lora, torch.float64)
    alphas = {path: data.draw(st.floats(0.01, 256)) for path in paths} if data.draw(st.booleans()) else None
    layout = data.draw(st.sampled_from(SDXL_LAYOUTS))
    file = read_lora(lora_file(lora, layout, alphas=alphas), dtype=torch.float64)
    assert_same_deltas(file.lora, lora, 1e-6)  # alpha tensors are fp32
    rewritten = read_lora(write_kohya(file.lora, metadata={}, architecture="sdxl", dtype=torch.float64))
    assert_same_deltas(rewritten.lora, file.lora)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_file_dtype_is_widened_to_fp32_at_least(dtype):
    lora = to(random_lora(SHAPES), dtype)
    read = read_lora(lora_file(lora, "kohya-sgm")).lora
    assert {layer.down.dtype for layer in read.layers.values()} == {max(dtype, torch.float32, key=lambda d: d.itemsize)}
    for path, layer in read.layers.items():
        assert torch.equal(layer.up, lora.layers[path].up.to(layer.up.dtype))


def test_a_read_lora_does_not_change_with_its_file(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(lora_file(random_lora(SHAPES), "peft"))
    lora = read_lora(path).lora
    before = digest(lora)
    with path.open("r+b") as file:
        file.seek(2000)
        file.write(bytes(4000))
    assert digest(lora) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_refused_by_name(value):
    tensors, _ = LAYOUTS["kohya-sgm"](random_lora(SHAPES), {})
    key = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_up.weight"
    tensors[key][3, 2] = value
    with pytest.raises(FormatError, match=rf"dog: {key} has [01] NaN and [01] Inf values: its training diverged"):
        read_lora(save(tensors), name="dog")
    tensors[key][3, 2] = 0
    alpha = key.replace("lora_up.weight", "alpha")
    with pytest.raises(FormatError, match=rf"dog: {alpha} is -?(nan|inf), so the scale of {Q} is unknown"):
        read_lora(save(tensors | {alpha: torch.tensor(value)}), name="dog")


def test_alpha_nought_is_stated():
    file = read_lora(lora_file(random_lora(SHAPES), "kohya-sgm", alphas=dict.fromkeys(SHAPES, 1.0)))
    assert file.notes == ()
    tensors, _ = LAYOUTS["kohya-sgm"](random_lora(SHAPES), {})
    tensors["lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha"] = torch.tensor(0.0)
    file = read_lora(save(tensors))
    assert not delta(file.lora.layers[TEXT]).any()
    assert "1 modules have alpha 0, so they have no effect." in file.notes


def test_limits_and_refusals_hold_when_reading(tmp_path):
    content = lora_file(random_lora(SHAPES), "peft")
    with pytest.raises(FormatError, match="has rank 4; the limit is 2"):
        read_lora(content, name="dog", limits=Limits(max_rank=2))
    with pytest.raises(FormatError, match="more than the limit of 100"):
        read_lora(content, limits=Limits(max_bytes=100))
    with pytest.raises(FormatError, match="is a directory"):
        read_lora(tmp_path)
    with pytest.raises(UnsupportedAdapter, match="it has 1 DoRA key"):
        read_lora(save({**load(content), f"{Q}.lora_magnitude_vector": torch.ones(32)}))


# Writing


def test_a_written_file_has_one_rank_and_says_what_it_is():
    lora = random_lora(SHAPES, rank=lambda path: 6 if path == Q else 3)
    metadata = {"modelspec.merged_from": "dog, watercolour", "ziplora.method": "ziplora", "modelspec.title": "mine"}
    content = write_kohya(lora, metadata=metadata, architecture="sdxl", title="dog in oil", trigger="sks dog")
    header = read_header_bytes(content, "x")
    names = {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
        "lora_unet_input_blocks_4_0_in_layers_2",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1",
    }
    endings = ("alpha", "lora_down.weight", "lora_up.weight")
    assert set(header.tensors) == {f"{name}.{end}" for name in names for end in endings}
    assert {tensor.dtype for tensor in header.tensors.values()} == {"F16"}
    tensors = load(content)
    for name in names:
        assert tensors[f"{name}.alpha"].item() == 6
        assert tensors[f"{name}.lora_down.weight"].shape[0] == tensors[f"{name}.lora_up.weight"].shape[1] == 6
    said = header.metadata
    assert said["ss_network_module"] == "networks.lora"
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("6", "6")
    assert said["ss_base_model_version"] == "sdxl_base_v1-0"
    assert said["ss_output_name"] == "dog in oil"
    assert said["modelspec.title"] == "mine"
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert said["modelspec.trigger_phrase"] == "sks dog"
    assert said["ziplora.method"] == "ziplora"
    assert said["sshs_model_hash"] == hashlib.sha256(content[header.data_start :]).hexdigest()
    assert "lora_adapter_metadata" not in said


def test_sd15_keeps_the_blocks_of_diffusers_and_has_one_text_encoder():
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    content = write_kohya(random_lora({Q: (32, 32), text: (32, 32)}), metadata={}, architecture="sd15")
    assert {key.partition(".")[0] for key in load(content)} == {
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    }
    assert read_header_bytes(content, "x").metadata["ss_base_model_version"] == "sd_v1"
    assert set(read_lora(content).lora.layers) == {Q, text}


WRITE_ALL = f"""
import hashlib
from tests.lora_files import random_lora
from ziplora.formats import write_kohya, write_mergers, write_peft
from ziplora.lora import LoRA, Mergers
lora = random_lora({SHAPES}, rank=3)
lora = LoRA(dict(sorted(lora.layers.items(), key=lambda item: hash(item[0]))))
said = {{i: i for i in {{*map(str, range(50))}}}}
mergers = Mergers({{p: x.down[0] for p, x in lora.layers.items() if x.down.ndim == 2}}, {{}})
written = write_kohya(lora, metadata=said, architecture="sdxl", title="t")
written += write_peft(lora, metadata=said) + write_mergers(mergers, said)
digest = hashlib.sha256(written).hexdigest()
"""


def test_equal_content_gives_equal_bytes_in_every_process():
    here: dict[str, str] = {}
    exec(WRITE_ALL, here)
    elsewhere = subprocess.run(
        [sys.executable, "-c", WRITE_ALL + "print(digest)"],
        env={"PYTHONHASHSEED": "1", "PATH": "", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert elsewhere.stdout.strip() == here["digest"]


def test_saving_to_a_path_gives_the_same_bytes(tmp_path):
    lora = random_lora(SHAPES, rank=3)
    options = {"metadata": {"a": "b"}, "architecture": "sdxl", "title": "t", "trigger": "u"}
    save_kohya(lora, tmp_path / "x.safetensors", **options)
    assert (tmp_path / "x.safetensors").read_bytes() == write_kohya(lora, **options)


def test_fp16_is_close_whatever_the_balance_of_down_and_up():
    """Alone, a factor of 1e-7 would vanish in fp16 and one of 1e7 overflow; 2ᵏ moves between them exactly."""
    lora = random_lora(SHAPES)
    for small in (1e-7, 1.0, 1e7):
        skewed = LoRA({p: Layer(x.down * small, x.up * (0.01 / small)) for p, x in lora.layers.items()})
        assert_same_deltas(read_lora(write_kohya(skewed, metadata={}, architecture="sdxl")).lora, skewed, 5e-4)


def test_balancing_changes_no_bit_of_the_update():
    lora = to(random_lora(SHAPES, rank=5), torch.float64)
    skewed = LoRA({p: Layer(x.down * 2.0**-40, x.up) for p, x in lora.layers.items()})
    written = read_lora(write_kohya(skewed, metadata={}, architecture="sdxl", dtype=torch.float64)).lora
    assert_same_deltas(written, skewed)
    layer = written.layers[Q]
    assert torch.allclose(layer.down.abs().amax(1).log2(), layer.up.abs().amax(0).log2(), atol=2.1)


def test_rows_of_zeros_are_written():
    layer = Layer(torch.zeros(2, 32), torch.ones(32, 2) * 1e6)
    layer.down[1, 0] = 1e-4
    written = read_lora(write_kohya(LoRA({Q: layer}), metadata={}, architecture="sdxl")).lora
    assert torch.allclose(delta(written.layers[Q]), delta(layer), rtol=1e-3)


def test_what_cannot_be_written_is_refused():
    lora = random_lora(SHAPES)
    write = {"metadata": {}, "architecture": "sdxl"}
    with pytest.raises(
        FormatError, match=r"has values up to .*e\+\d+, torch.float16 holds 65504 at most: is a LoRA broken"
    ):
        write_kohya(scaled(lora, 1e12), **write)
    with pytest.raises(FormatError, match="has NaN or Inf values, so it is not written: did the merge diverge"):
        write_kohya(scaled(lora, float("nan")), **write)
    with pytest.raises(FormatError, match="this LoRA has no modules, so there is nothing"):
        write_kohya(LoRA({}), **write)
    with pytest.raises(FormatError, match="cannot be written for sd15: sd15 has no component 'text_encoder_2'"):
        write_kohya(lora, metadata={}, architecture="sd15")
    with pytest.raises(FormatError, match="lora_adapter_metadata must not go into a kohya file"):
        write_kohya(lora, metadata={"lora_adapter_metadata": "{}"}, architecture="sdxl")
    with pytest.raises(FormatError, match="rank 2049 cannot be written in fp16"):
        write_kohya(random_lora({Q: (32, 32)}, 2049), **write)
    with pytest.raises(ValueError, match=r"LoRA files are written in fp16, fp32 or fp64, not torch.bfloat16"):
        write_kohya(lora, **write, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="metadata of a safetensors file must be text; a is not"):
        write_kohya(lora, metadata={"a": 1}, architecture="sdxl")


def test_a_write_cut_short_leaves_a_file_that_is_refused(tmp_path):
    broken = LoRA({**random_lora(SHAPES).layers, Q: Layer(torch.full((4, 32), float("nan")), torch.ones(32, 4))})
    with pytest.raises(FormatError):
        save_kohya(broken, tmp_path / "x.safetensors", metadata={}, architecture="sdxl")
    with pytest.raises(FormatError, match=r"x\.safetensors is truncated"):
        inspect_file(tmp_path / "x.safetensors")


def test_the_peft_twin_is_the_same_lora():
    lora = random_lora(SHAPES, rank=lambda path: 6 if path == Q else 3)
    content = write_peft(lora, metadata={"ziplora.method": "direct"}, dtype=torch.float32)
    file = read_lora(content)
    assert file.layout == "peft"
    assert file.metadata["ziplora.method"] == "direct"
    assert_same_deltas(file.lora, lora)


def test_mergers_survive_a_file(tmp_path):
    mergers = Mergers({Q: torch.randn(32), K: torch.randn(64)}, {Q: torch.randn(32)})
    content = write_mergers(mergers, {"ziplora.seed": "7"})
    (tmp_path / "m.safetensors").write_bytes(content)
    for source in (content, tmp_path / "m.safetensors"):
        read = read_mergers(source)
        assert read.subject.keys() == {Q, K}
        assert read.style.keys() == {Q}
        assert torch.equal(read.subject[K], mergers.subject[K])
        assert torch.equal(read.style[Q], mergers.style[Q])
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata() == {"ziplora.seed": "7"}
    with pytest.raises(FormatError, match=r"is no file of mergers: it has .*, F32\[4, 32\]"):
        read_mergers(lora_file(random_lora({Q: (32, 32)}), "peft"))
    with pytest.raises(FormatError, match=r"mergers: style\.unet.* has 1 NaN"):
        read_mergers(write_mergers(Mergers({}, {Q: torch.tensor([1.0, float("nan")])}), {}))


def test_the_sidecar_is_what_user_interfaces_show():
    card = json.loads(sidecar(trigger="sks dog, szn style", architecture="sdxl", description="dog × oil"))
    assert card["activation text"] == "sks dog, szn style"
    assert card["sd version"] == "SDXL"
    assert card["description"] == "dog × oil"


# In diffusers, in fp64


@pytest.fixture(scope="module")
def sdxl():
    return tiny_sdxl(torch.float64)


@pytest.fixture(scope="module")
def sd15():
    return tiny_sd15(torch.float64)


def some_modules(pipe) -> dict[str, tuple[int, ...]]:
    """All modules of a few blocks, of each kind, and of the text encoders' first layers."""
    parts = ("down_blocks.1.", "mid_block.", "up_blocks.1.upsamplers", "time_emb", "add_emb", "conv_in", "conv_out")
    texts = ("encoder.layers.0.", "text_projection")
    return {
        path: shape
        for path, shape in shapes_of(pipe).items()
        if any(part in path for part in (parts if path.startswith("unet.") else texts))
    }


def outputs(pipe) -> torch.Tensor:
    """What the text encoders and the UNet give for fixed inputs, in one row."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    ids = torch.randint(0, 500, (1, 77), generator=generator)
    seen = []
    for encoder in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if encoder is not None:
            result = encoder(ids, output_hidden_states=True)
            seen += [result.hidden_states[-2], result[0]]
    context = torch.cat(seen[::2], dim=-1)
    added = {"text_embeds": noise(1, 32), "time_ids": noise(1, 6)}
    seen.append(pipe.unet(noise(1, 4, 8, 8), 500, context, added_cond_kwargs=added).sample)
    return torch.cat([x.flatten() for x in seen])


def with_weights_changed(pipe, deltas: dict[str, torch.Tensor]) -> torch.Tensor:
    """The outputs with W₀ + ΔW in place of W₀."""
    names = [name for name in ("unet", "text_encoder", "text_encoder_2") if hasattr(pipe, name)]
    patched = type("Patched", (), {name: copy.deepcopy(getattr(pipe, name)) for name in names})
    for path, change in deltas.items():
        owner, _, inner = path.partition(".")
        model = getattr(patched, owner)
        modules = dict(model.named_modules())
        module = modules[inner] if inner in modules else modules[inner.removeprefix("text_model.")]
        module.weight.data += change
    return outputs(patched)


def loaded_by_diffusers(pipe, content: bytes, path: Path) -> torch.Tensor:
    path.write_bytes(content)
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    try:
        return outputs(pipe)
    finally:
        pipe.unload_lora_weights()


def short_mergers(lora: LoRA, seed: int) -> dict[str, torch.Tensor]:
    """Mergers in steps of 1/64, so that fp32 holds their products with the LoRA exactly."""
    generator = torch.Generator().manual_seed(seed)
    return {
        path: (torch.randn(layer.down.shape[1], generator=generator) * 64).round() / 64
        for path, layer in lora.layers.items()
        if is_target(path)
    }


def equation_2(subject: LoRA, style: LoRA, mergers: Mergers) -> dict[str, torch.Tensor]:
    """ΔW_c·diag(m_c) + ΔW_s·diag(m_s) on the merge targets, the plain sum elsewhere; fp64."""
    total: dict[str, torch.Tensor] = {}
    for lora, m in ((subject, mergers.subject), (style, mergers.style)):
        for path, layer in lora.layers.items():
            change = delta(layer).double() * (m[path].double() if path in m else 1)
            total[path] = total.get(path, 0) + change
    return total


def check_merge(pipe, architecture, layout, other, tmp_path, write=None) -> None:
    shapes = some_modules(pipe)
    kept = dict(list(shapes.items())[::2])  # the style lacks half of the modules
    subject = random_lora(shapes, rank=lambda path: 4 if "attn" in path else 1, size=0.02)
    style = random_lora(kept, rank=3, seed=1, size=0.02)
    read_subject = read_lora(lora_file(subject, layout, alphas=None if layout == "peft" else differing_alphas(subject)))
    read_style = read_lora(lora_file(style, other, alphas=differing_alphas(style)))
    mergers = Mergers(short_mergers(subject, 2), short_mergers(style, 3))
    merged = zip_merge(read_subject.lora, read_style.lora, mergers)
    write = write or (lambda lora: write_kohya(lora, metadata={}, architecture=architecture, dtype=torch.float32))
    base = outputs(pipe)
    expected = with_weights_changed(pipe, equation_2(subject, style, mergers))
    got = loaded_by_diffusers(pipe, write(merged), tmp_path / "merged.safetensors")
    assert (got - expected).abs().max() < 1e-9
    assert (expected - base).abs().max() > 1e-2
    assert torch.equal(outputs(pipe), base)


@pytest.mark.parametrize("layout", SDXL_LAYOUTS)
def test_diffusers_gives_equation_2_for_a_merged_sdxl_file(layout, sdxl, tmp_path):
    """Every layout of the subject, alphas that differ between modules, unequal ranks, another layout of the style."""
    other = SDXL_LAYOUTS[(SDXL_LAYOUTS.index(layout) + 5) % len(SDXL_LAYOUTS)]
    other = "kohya-diffusers" if "rslora" in other else other  # √3 is not exact
    check_merge(sdxl, "sdxl", layout, other, tmp_path)


@pytest.mark.parametrize("layout", ["kohya-sd15", "legacy"])
def test_diffusers_gives_equation_2_for_a_merged_sd15_file(layout, sd15, tmp_path):
    assert layout in SD15_LAYOUTS
    check_merge(sd15, "sd15", layout, "peft", tmp_path)


def test_diffusers_gives_equation_2_for_the_peft_twin(sdxl, tmp_path):
    check_merge(
        sdxl, "sdxl", "kohya-sgm", "peft", tmp_path, lambda lora: write_peft(lora, metadata={}, dtype=torch.float32)
    )


def test_all_modules_of_sdxl_load_and_fp64_holds_any_values(sdxl, tmp_path):
    lora = random_lora(shapes_of(sdxl), rank=2, size=0.02, dtype=torch.float64)
    lora = LoRA({p: Layer(x.down * 0.7310585786300049, x.up / 3) for p, x in lora.layers.items()})
    content = write_kohya(lora, metadata={}, architecture="sdxl", dtype=torch.float64)
    got = loaded_by_diffusers(sdxl, content, tmp_path / "x.safetensors")
    assert (got - with_weights_changed(sdxl, {p: delta(x) for p, x in lora.layers.items()})).abs().max() < 1e-9


def test_mergers_one_and_nought_are_the_subject_alone_and_ones_the_direct_merge(sdxl, tmp_path):
    shapes = {path: shape for path, shape in some_modules(sdxl).items() if is_target(path)}
    subject, style = random_lora(shapes, 4, size=0.02), random_lora(shapes, 3, seed=1, size=0.02)
    ones = {path: torch.ones(shape[1]) for path, shape in shapes.items()}
    noughts = {path: torch.zeros(shape[1]) for path, shape in shapes.items()}

    def loaded(lora: LoRA) -> torch.Tensor:
        content = write_kohya(lora, metadata={}, architecture="sdxl", dtype=torch.float32)
        return loaded_by_diffusers(sdxl, content, tmp_path / "x.safetensors")

    alone, both = zip_merge(subject, style, Mergers(ones, noughts)), zip_merge(subject, style, Mergers(ones, ones))
    assert max_rank(both) == 7
    subject_alone = with_weights_changed(sdxl, {path: delta(x).double() for path, x in subject.layers.items()})
    direct = with_weights_changed(
        sdxl, {path: delta(x).double() for path, x in concat([subject, style]).layers.items()}
    )
    assert (loaded(alone) - subject_alone).abs().max() < 1e-9
    assert (loaded(both) - direct).abs().max() < 1e-9
