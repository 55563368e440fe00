"""Every linear layer and convolution of the real architectures, counted on the meta device."""

import re
from functools import cache

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.bench.models import SDXL_UNET
from tests.lora_files import sgm
from ziplora.module_names import canonical, component, is_target, kohya_name, locate, to_sgm


@cache
def modules(architecture: str) -> dict[str, list[int]]:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**(SDXL_UNET if architecture == "sdxl" else {"cross_attention_dim": 768}))
        parts = {"unet": unet, "text_encoder": CLIPTextModel(CLIPTextConfig(num_hidden_layers=12))}
        if architecture == "sdxl":
            parts["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=32))
    return {
        canonical(f"{owner}.{name}"): list(module.weight.shape)
        for owner, model in parts.items()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def test_the_merge_targets_are_the_attention_layers_of_the_unet():
    assert sum(map(is_target, modules("sdxl"))) == 560
    assert sum(map(is_target, modules("sd15"))) == 128
    inputs = sum(shape[1] for path, shape in modules("sdxl").items() if is_target(path))
    assert inputs == 785_920
    assert not is_target("text_encoder.text_model.encoder.layers.0.self_attn.q_proj")
    assert not is_target("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.1")


@pytest.mark.parametrize("architecture", ["sdxl", "sd15"])
def test_every_module_of_the_real_models_comes_back_from_every_spelling(architecture):
    paths = modules(architecture)
    assert len(paths) == {"sdxl": 794 + 72 + 193, "sd15": 282 + 72}[architecture]
    written = {kohya_name(path, architecture): path for path in paths}
    assert len(written) == len(paths)
    for name, path in written.items():
        assert locate(name).path == path
    for path in paths:
        owner, _, inner = path.partition(".")
        assert component(path) == owner
        spellings = [path, f"base_model.model.{path}", path.replace(".text_model.", ".")]
        if owner == "unet":
            flat = inner.replace(".", "_")
            spellings += [inner, f"lora_unet_{flat}", f"lycoris_{flat}", f"base_model.model.{inner}"]
        for spelling in spellings:
            assert locate(spelling).path == path, spelling


def test_sgm_names_are_those_of_the_original_code():
    for path in modules("sdxl"):
        if path.startswith("unet."):
            assert to_sgm(path.removeprefix("unet.")) == sgm(path.removeprefix("unet."))
    assert kohya_name("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "sdxl") == (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    )
    assert kohya_name("unet.up_blocks.1.upsamplers.0.conv", "sdxl") == "lora_unet_output_blocks_5_2_conv"
    assert kohya_name("text_encoder_2.text_projection", "sdxl") == "lora_te2_text_projection"


def test_sd15_in_the_original_code_upsamples_without_attention():
    assert locate("lora_unet_output_blocks_2_1_conv").path == "unet.up_blocks.0.upsamplers.0.conv"


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn3_to_q",
        "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q",  # where the downsampler is
        "lora_unet_middle_block_1_in_layers_2",
        "lora_unet_input_blocks_004_1_proj_in",
        "lora_unet_double_blocks_0_img_attn_proj",
        "lora_te_text_model_encoder_layers_0_self_attn_x_proj",
        "unet.down_blocks.0.attentions.0.norm",
        "unet.down_blocks.0.upsamplers.0.conv",
        "transformer.transformer_blocks.0.attn.to_q",
        "text_model.encoder.layers.0.mlp.fc1",  # of which text encoder?
        "",
    ],
)
def test_other_names_are_not_guessed_at(name):
    assert locate(name) is None


def test_what_an_architecture_lacks_has_no_name_in_it():
    with pytest.raises(ValueError, match="sd15 has no component 'text_encoder_2'"):
        kohya_name("text_encoder_2.text_projection", "sd15")
    with pytest.raises(ValueError, match="is no module of SDXL's UNet that has an sgm name"):
        kohya_name("unet.down_blocks.0.motion_modules.0.to_q", "sdxl")


@pytest.mark.parametrize("architecture", ["sdxl", "sd15"])
def test_diffusers_takes_our_names_for_the_same_modules(architecture):
    """diffusers' own translation of kohya's names, on all modules of the real models."""
    paths = modules(architecture)
    tensors = {
        f"{kohya_name(path, architecture)}.{end}": torch.zeros(1, 1) if end != "alpha" else torch.ones(())
        for path in paths
        for end in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    pipeline = StableDiffusionXLPipeline if architecture == "sdxl" else StableDiffusionPipeline
    options = SDXL_UNET if architecture == "sdxl" else {"cross_attention_dim": 768}
    with torch.device("meta"):
        config = UNet2DConditionModel(**options).config
    translated, alphas = pipeline.lora_state_dict(tensors, unet_config=config)
    factor = re.compile(r"(_lora|\.lora|\.lora_linear_layer)\.(down|up)\.weight$")
    assert {locate(factor.sub("", key)).path for key in translated} == set(paths)
    assert len(alphas) == len(paths)
