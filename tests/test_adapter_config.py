import json
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from ziplora.adapter_config import read_config
from ziplora.errors import FormatError, LoRAError

MODULES = [
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.attentions.1.transformer_blocks.10.attn1.to_out.0",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "up_blocks.0.attentions.1.proj_in",
    "conv_in",
]


@st.composite
def patterns(draw) -> str:
    """The end of a module's name, or two pieces of it with anything between."""
    module = draw(st.sampled_from(MODULES))
    i, j = sorted(draw(st.tuples(st.integers(0, len(module)), st.integers(0, len(module)))))
    kind = draw(st.sampled_from(["end", "whole", "wild", "anchored wild"]))
    end = module[module.rfind(".", 0, j) + 1 :]
    wild = f"{module[module.rfind('.', 0, i) + 1 : i]}.*{module[j:]}"
    return {"end": end, "whole": f"^{module}", "wild": wild, "anchored wild": f"^{module[:i]}.*{module[j:]}"}[kind]


@settings(max_examples=300, deadline=None)
@given(keys=st.lists(patterns(), unique=True, max_size=5))
def test_alphas_are_those_that_peft_resolves(keys):
    alphas = {key: float(i) for i, key in enumerate(keys)}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 99, "unet.alpha_pattern": alphas})}
    config, refusals = read_config(metadata, "x")
    assert refusals == []
    for module in MODULES:
        expected = alphas.get(get_pattern_key(list(alphas), module), 99)
        assert config.scale(f"unet.{module}", 4, "x") == expected / 4


@settings(max_examples=200, deadline=None)
@given(
    key=st.sampled_from(
        ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "use_dora"]
    ),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    ),
)
def test_whatever_the_metadata_says_no_crash(key, value):
    text = json.dumps({"unet.r": 4, f"unet.{key}": value})
    config, refusals = read_config({"lora_adapter_metadata": text}, "x")
    assert config is not None or refusals
    for path in MODULES if config else []:
        with suppress(LoRAError):
            assert config.scale(f"unet.{path}", 4, "x") < 1e9


def test_many_patterns_are_looked_up_not_tried():
    alphas = {f"blocks.{i}.to_q": 1.0 for i in range(20_000)}
    config, _ = read_config({"lora_adapter_metadata": json.dumps({"r": 4, "alpha_pattern": alphas})}, "x")
    for i in range(20_000):
        assert config.scale(f"unet.blocks.{i}.to_q", 4, "x") == 0.25


def test_rslora_divides_by_the_root_of_the_rank():
    said = {"unet.r": 16, "unet.lora_alpha": 8, "unet.use_rslora": True, "unet.rank_pattern": {"to_q": 4}}
    config, _ = read_config({"lora_adapter_metadata": json.dumps(said)}, "x")
    assert config.scale("unet.conv_in", 16, "x") == 2
    assert config.scale("unet.attn1.to_q", 4, "x") == 4
    assert config.scale("text_encoder.text_model.encoder.layers.0.mlp.fc1", 3, "x") == 1
    with pytest.raises(FormatError, match=r"x: its header says rank 16 for unet\.conv_in, its tensors have rank 8"):
        config.scale("unet.conv_in", 8, "x")
