import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from tests.lora_files import LAYOUTS, differing_alphas, lora_file, random_lora
from ziplora.errors import FormatError, LoRAError, UnsupportedAdapter
from ziplora.headers import Header, Limits, TensorInfo, read_header_bytes
from ziplora.layouts import inspect_file, parse

BLOCK = "unet.down_blocks.1.attentions.0.transformer_blocks.0"
SHAPES = {
    f"{BLOCK}.attn1.to_q": (32, 32),
    f"{BLOCK}.attn2.to_k": (32, 64),
    f"{BLOCK}.attn2.to_out.0": (32, 32),
    f"{BLOCK}.ff.net.0.proj": (256, 32),
    f"{BLOCK}.ff.net.2": (32, 128),
    "unet.down_blocks.1.attentions.0.proj_in": (32, 32),
    "unet.down_blocks.1.resnets.0.conv1": (32, 16, 3, 3),
    "unet.down_blocks.0.downsamplers.0.conv": (16, 16, 3, 3),
    "unet.up_blocks.0.attentions.2.transformer_blocks.1.attn2.to_v": (64, 64),
    "unet.add_embedding.linear_1": (64, 80),
    "text_encoder.text_model.encoder.layers.1.self_attn.q_proj": (32, 32),
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1": (64, 32),
}
Q = f"{BLOCK}.attn1.to_q"
KOHYA_Q = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
LABELS = {
    "peft, rslora": "peft",
    "peft, bare names": "peft",
    "peft, wrapped": "peft",
    "dreambooth": "dreambooth + peft",
    "legacy": "dreambooth + legacy",
    "kohya-sd15": "kohya-diffusers",
}


def parsed(content: bytes, name: str = "x", limits: Limits | None = None):
    return parse(read_header_bytes(content, name), name, limits or Limits())


def tensors_of(layout: str = "kohya-sgm", **options) -> dict[str, torch.Tensor]:
    lora = random_lora(SHAPES, 4)
    return LAYOUTS[layout](lora, options.get("alphas") or {})[0]


def with_config(config: object) -> bytes:
    text = config if isinstance(config, str) else json.dumps(config)
    return save(tensors_of("peft"), {"lora_adapter_metadata": text})


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "kohya-sd15"])
@pytest.mark.parametrize("with_alphas", [False, True])
def test_every_layout_gives_the_same_modules(layout, with_alphas):
    lora = random_lora(SHAPES, rank=lambda path: 4 if "attn" in path else 16)
    alphas = differing_alphas(lora) if with_alphas else None
    found = parsed(lora_file(lora, layout, alphas=alphas))
    assert found.layout == LABELS.get(layout, layout)
    assert {path: (keys.weight_shape, keys.rank) for path, keys in found.modules.items()} == {
        path: (shape, 4 if "attn" in path else 16) for path, shape in SHAPES.items()
    }
    assert found.base == "SDXL"
    gives_alphas = with_alphas or layout == "peft, rslora"
    assert any("alpha = rank, scale 1, was assumed" in note for note in found.notes) == (not gives_alphas)
    if with_alphas and layout in ("peft", "dreambooth"):
        for path, keys in found.modules.items():
            assert keys.scale == alphas[path] / keys.rank


def test_some_modules_without_alpha_are_stated():
    tensors = tensors_of(alphas=dict.fromkeys(SHAPES, 2.0))
    del tensors[f"{KOHYA_Q}.alpha"]
    assert parsed(save(tensors)).notes == (
        "The file does not give the alpha of 1 of 12 modules: alpha = rank, scale 1, was assumed.",
    )


TWO = torch.ones(2, 2)
# kind as the message names it → tensors added to those of a sound file
OTHER_ADAPTERS = {
    "1 DoRA key": {f"{KOHYA_Q}.dora_scale": torch.ones(32)},
    "2 DoRA keys": {f"{Q}.lora_magnitude_vector": TWO, f"{Q}.lora_magnitude_vector.default.weight": TWO},
    "4 LoHa keys": {f"{KOHYA_Q}.hada_w{i}_{x}": TWO for i in (1, 2) for x in "ab"},
    "3 LoKr keys": {f"{KOHYA_Q}.lokr_w1": TWO, f"{KOHYA_Q}.lokr_w2_a": TWO, f"{KOHYA_Q}.lokr_t2": TWO},
    "1 GLoRA key": {f"{KOHYA_Q}.a1.weight": TWO},
    "1 OFT key": {f"{KOHYA_Q}.oft_blocks": TWO},
    "1 BOFT key": {f"{Q}.boft_R": TWO},
    "1 IA³ key": {f"{Q}.ia3_l": TWO},
    "1 VeRA key": {f"{Q}.vera_lambda_b": TWO},
    "1 AdaLoRA key": {f"{Q}.lora_E": TWO},
    "2 LyCORIS norm keys": {"lora_unet_out_0.w_norm": TWO, "lora_unet_out_0.b_norm": TWO},
    "2 LyCORIS full-difference keys": {f"{KOHYA_Q}.diff": TWO, f"{KOHYA_Q}.diff_b": TWO},
    "1 LyCORIS scalar key": {f"{KOHYA_Q}.scalar": TWO},
    "1 Tucker-decomposed key": {f"{KOHYA_Q}.lora_mid.weight": TWO},
    "1 LoRA bias key": {f"{Q}.lora_B.bias": TWO},
    "1 embedding LoRA key": {"text_encoder.text_model.embeddings.token_embedding.lora_embedding_A": TWO},
    "1 textual inversion key": {"bundle_emb.sks.string_to_param.*": TWO},
    "1 ControlNet-LLLite key": {"lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight": TWO},
}
DOWN, UP = f"{KOHYA_Q}.lora_down.weight", f"{KOHYA_Q}.lora_up.weight"
TO_K = f"{BLOCK}.attn1.to_k"
# what the message says → tensors that replace or join those of a sound file
BAD_TENSORS = {
    "x has 1 of 25 keys that are not understood (lora_unet_new.lora_down.weight)": {
        "lora_unet_new.lora_down.weight": TWO
    },
    f"x: {Q} has {DOWN} but no up": {UP: None},
    "has lora_unet_input_blocks_4_1_proj_out.alpha but no down and up": {
        "lora_unet_input_blocks_4_1_proj_out.alpha": TWO
    },
    f"x: down [4, 32] and up [32, 5] of {Q} make no LoRA layer": {UP: torch.ones(32, 5)},
    f"x: down [0, 32] and up [32, 0] of {Q} make no LoRA layer": {DOWN: torch.ones(0, 32), UP: torch.ones(32, 0)},
    f"x: down [4, 32, 1] and up [32, 4] of {Q} make no LoRA layer": {DOWN: torch.ones(4, 32, 1)},
    f"x: {DOWN} has dtype I8; only F16, BF16, F32, F64 are read": {DOWN: torch.ones(4, 32, dtype=torch.int8)},
    f"x: {DOWN} has dtype F8_E4M3; only": {DOWN: torch.ones(4, 32).to(torch.float8_e4m3fn)},
    f"x: {KOHYA_Q}.alpha is F32[2, 2]; one number is expected": {f"{KOHYA_Q}.alpha": TWO},
    f"x holds down of {Q} 2 times ({DOWN}, {Q}.lora_A.weight)": {f"{Q}.lora_A.weight": torch.ones(4, 32)},
    "x holds several PEFT adapters (one, two): save them apart": {
        f"{TO_K}.lora_A.one.weight": torch.ones(4, 32),
        f"{TO_K}.lora_B.two.weight": torch.ones(32, 4),
    },
}


@pytest.mark.parametrize("kind", OTHER_ADAPTERS)
def test_other_adapters_are_refused_by_name(kind):
    added = {key: value.clone() for key, value in OTHER_ADAPTERS[kind].items()}
    with pytest.raises(UnsupportedAdapter) as refusal:
        parsed(save(tensors_of() | added))
    assert f"x is not a plain LoRA: it has {kind} (" in str(refusal.value)
    assert min(added) in str(refusal.value)
    assert "only plain LoRA can be merged exactly: train or convert it as one" in str(refusal.value)


@pytest.mark.parametrize("message", BAD_TENSORS)
def test_bad_tensors_are_refused(message, tmp_path):
    tensors = tensors_of() | BAD_TENSORS[message]
    content = save({key: value for key, value in tensors.items() if value is not None})
    with pytest.raises(FormatError) as refusal:
        parsed(content)
    assert message in str(refusal.value)
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert any(message.removeprefix("x") in each for each in inspect_file(path).refusals)


def test_a_refusal_names_a_few_keys_and_how_many_more():
    tensors = tensors_of() | {f"lora_unet_m{i}.hada_w1_a": torch.ones(1) for i in range(9)}
    with pytest.raises(UnsupportedAdapter) as refusal:
        parsed(save(tensors), "dog.safetensors")
    assert str(refusal.value) == (
        "dog.safetensors is not a plain LoRA: it has 9 LoHa keys (lora_unet_m0.hada_w1_a, lora_unet_m1.hada_w1_a,"
        " lora_unet_m2.hada_w1_a and 6 more); only plain LoRA can be merged exactly: train or convert it as one"
    )


def test_limits():
    with pytest.raises(FormatError, match=rf"x: {Q} has rank 9; the limit is 8"):
        parsed(lora_file(random_lora({Q: (32, 32)}, 9), "peft"), limits=Limits(max_rank=8))
    with pytest.raises(FormatError, match="x holds no tensors at all"):
        parsed(save({}))


@pytest.mark.parametrize(
    ("architecture", "key"),
    [
        ("FLUX", "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"),
        ("FLUX", "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"),
        ("FLUX", "double_blocks.0.processor.qkv_lora1.down.weight"),
        ("FLUX", "lora_unet_single_blocks_0_linear1.lokr_w1"),
        ("Stable Diffusion 3", "lora_unet_joint_blocks_0_context_block_attn_qkv.lora_down.weight"),
        ("Wan", "diffusion_model.blocks.0.cross_attn.k.lora_A.weight"),
        ("Wan", "lora_unet_blocks_0_self_attn_q.lora_down.weight"),
        ("Stable Cascade", "lora_prior_unet_down_blocks_0_1_attention.lora_down.weight"),
        ("AnimateDiff", "down_blocks.0.motion_modules.0.temporal_transformer.proj_in.lora_A.weight"),
        ("a T5 text encoder", "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight"),
        ("a diffusion transformer", "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"),
        ("a language model", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
    ],
)
def test_loras_of_other_architectures_are_named(architecture, key):
    with pytest.raises(UnsupportedAdapter, match=f"x is made for {architecture}.* 1 keys such as .*only LoRAs for"):
        parsed(save({key: torch.ones(2, 2)}))


def test_a_models_own_weights_are_no_lora():
    with pytest.raises(UnsupportedAdapter, match=r"x holds the weights of a model and no LoRA \(2 keys: conv_in.bias"):
        parsed(save({"down_blocks.0.resnets.0.conv1.weight": torch.ones(2), "conv_in.bias": torch.ones(2)}))


def test_lora_adapter_metadata_gives_the_scale_as_peft_resolves_it():
    """The first pattern that ends the module's name wins; rank_pattern and alpha_pattern are resolved apart."""
    unet = {
        "r": 4,
        "lora_alpha": 8,
        "alpha_pattern": {"attn1.to_q": 2, "down_blocks.*to_k": 1, "^add_embedding.linear_1": 6},
    }
    config = {f"unet.{key}": value for key, value in unet.items()}
    config |= {"text_encoder.r": 4, "text_encoder.lora_alpha": 16.0, "text_encoder.use_rslora": True}
    scales = {path: keys.scale for path, keys in parsed(with_config(config)).modules.items()}
    assert scales[f"{BLOCK}.attn1.to_q"] == 2 / 4
    assert scales[f"{BLOCK}.attn2.to_k"] == 1 / 4
    assert scales["unet.add_embedding.linear_1"] == 6 / 4
    assert scales[f"{BLOCK}.attn2.to_out.0"] == 8 / 4
    assert scales["text_encoder.text_model.encoder.layers.1.self_attn.q_proj"] == 16 / 2
    assert scales["text_encoder_2.text_model.encoder.layers.0.mlp.fc1"] == 1


def test_metadata_without_component_names_holds_for_all():
    assert {keys.scale for keys in parsed(with_config({"r": 4, "lora_alpha": 2})).modules.values()} == {0.5}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "lora_adapter_metadata in its header is no JSON object"),
        ("[1]", "lora_adapter_metadata in its header is no JSON object"),
        ({"unet.use_dora": True}, r"x is not a plain LoRA: its header says unet.use_dora \(DoRA\)"),
        ({"unet.lora_bias": True}, r"its header says unet.lora_bias \(LoRA bias\)"),
        (
            {"unet.init_lora_weights": "pissa_niter_4"},
            "x is not a plain LoRA: it began with pissa_niter_4, which changes the base",
        ),
        ({"unet.r": 8, "unet.lora_alpha": 8}, r"x: its header says rank 8 for unet\..*, its tensors have rank 4"),
        ({"unet.r": 4, "unet.lora_alpha": "8"}, "x: its header gives 8 as a rank or alpha; a number is expected"),
        ({"unet.r": 4, "unet.lora_alpha": float("nan")}, "x: its header gives nan as a rank or alpha"),
        ({"unet.r": 4, "unet.alpha_pattern": [1]}, "rank_pattern and alpha_pattern in its header must be maps"),
        ({"unet.r": 4, "unet.alpha_pattern": {"(a+)+$": 1}}, r"x: the pattern \(a\+\)\+\$ in its header is more than"),
    ],
)
def test_refuses_metadata(config, message):
    with pytest.raises(LoRAError, match=message):
        parsed(with_config(config))


def test_two_sources_of_the_scale_are_refused():
    content = save(
        tensors_of(alphas=dict.fromkeys(SHAPES, 2.0)), {"lora_adapter_metadata": '{"r": 4, "lora_alpha": 8}'}
    )
    with pytest.raises(FormatError, match="x has both alpha tensors and lora_adapter_metadata: which"):
        parsed(content)


def test_trigger_words_come_from_the_header():
    folders = json.dumps({"10_sks dog": {"n_repeats": 10}, "5_a dog": {}})
    content = save(tensors_of(), {"modelspec.trigger_phrase": "ohwx\x1b[31m dog", "ss_dataset_dirs": folders})
    assert parsed(content).triggers == ("ohwx [31m dog", "sks dog", "a dog")
    assert parsed(content).trigger == "ohwx [31m dog"
    assert parsed(save(tensors_of(), {"ss_tag_frequency": "not JSON"})).trigger is None


def test_inspection_says_what_a_file_holds(tmp_path):
    lora = random_lora(SHAPES, rank=lambda path: 8 if "text" in path else 4)
    alphas = {path: 2.0 if "attn" in path else 1.0 for path in SHAPES}
    path = tmp_path / "dog.safetensors"
    said = {"ss_base_model_version": "sdxl_base_v1-0"}
    path.write_bytes(lora_file(lora, "kohya-sgm", alphas=alphas, dtype=torch.float16, metadata=said))
    seen = inspect_file(path)
    assert seen.layout == "kohya-sgm"
    assert (seen.base, seen.stated_base) == ("SDXL", "sdxl_base_v1-0")
    assert seen.dtypes == {"F16": 24, "F32": 12}
    assert seen.ranks == {4: 10, 8: 2}
    assert seen.alphas == {1.0: 7, 2.0: 5}
    assert (seen.n_targets, seen.n_targets_of_base) == (4, 560)
    assert seen.carried == {
        "unet feed-forward": 2,
        "unet resnets and convolutions": 2,
        "unet projections": 1,
        "unet embeddings": 1,
        "text_encoder": 1,
        "text_encoder_2": 1,
    }
    assert seen.refusals == ()
    assert seen.n_bytes == path.stat().st_size


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8]
)
def test_alphas_of_any_dtype(dtype, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(tensors_of() | {f"{KOHYA_Q}.alpha": torch.tensor(3).to(dtype)}))
    assert inspect_file(path).alphas == {4.0: 11, 3.0: 1}


def test_an_inspection_lists_all_refusals(tmp_path):
    extra = {
        f"{KOHYA_Q}.alpha": torch.tensor(float("nan")),
        "a.dora_scale": torch.ones(1),
        "what.weight": torch.ones(1),
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(tensors_of() | extra))
    seen = inspect_file(path)
    assert [text.removeprefix(f"{path}")[:33] for text in seen.refusals] == [
        " is not a plain LoRA: it has 1 Do",
        " has 1 of 27 keys that are not un",
        ": lora_unet_input_blocks_4_1_tran",
    ]
    assert seen.ranks == {4: 12}


def test_planning_needs_neither_torch_nor_numpy():
    code = "import sys, ziplora.layouts; print({'torch', 'numpy', 'safetensors'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


PARTS = st.sampled_from(
    "lora_unet_ unet. down_blocks mid_block _1_ .0. attentions attn1 to_q to_out_0 alpha ü . .alpha .hada_w1_a"
    " .lora_down.weight .lora_B.weight .lora.up.weight _lora.down.weight .lora_A.x.weight .lora_B.x.weight"
    f" base_model.model. text_encoder. {KOHYA_Q} {Q} {TO_K}".split()
)


@settings(max_examples=300, deadline=None)
@given(
    keys=st.lists(st.lists(PARTS, min_size=1, max_size=4).map("".join), unique=True, max_size=6),
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=6, max_size=6),
    dtype=st.sampled_from(["F16", "F32", "I64", "BOOL"]),
)
def test_every_key_ends_in_a_module_or_in_a_refusal(keys, shapes, dtype):
    tensors = {key: TensorInfo(dtype, tuple(shape), 0, 0) for key, shape in zip(keys, shapes, strict=False)}
    try:
        found = parse(Header(tensors, {}, 0, 0), "x")
    except LoRAError:
        return
    used = {key for module in found.modules.values() for key in (module.down, module.up, module.alpha)}
    assert used - {None} == set(keys)
