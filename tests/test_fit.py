import pytest
import torch

from tests.lora_files import lora_file, random_lora, shapes_of
from tests.tiny import tiny_sd15, tiny_sdxl
from ziplora.errors import FormatError, ShapeMismatch
from ziplora.fit import base_name, check_shapes, module_shapes
from ziplora.headers import read_header_bytes, read_header_file
from ziplora.layouts import ParsedLoRA, parse

WHERE = "subject dog, s3://loras/dog.safetensors"


@pytest.fixture(scope="module")
def sdxl():
    return shapes_of(tiny_sdxl())


@pytest.fixture(scope="module")
def sd15():
    return shapes_of(tiny_sd15())


def lora_of(shapes, layout="peft") -> ParsedLoRA:
    return parse(read_header_bytes(lora_file(random_lora(shapes), layout), "x"), "x")


def test_a_lora_fits_the_base_that_it_was_made_for(sdxl, sd15):
    for shapes, layout in ((sdxl, "kohya-sgm"), (sd15, "kohya-sd15")):
        check_shapes(lora_of(shapes, layout), shapes, WHERE)


def test_families_are_told_by_their_blocks(sdxl, sd15):
    assert (base_name(sdxl), base_name(sd15)) == ("SDXL", "SD 1.5")
    assert lora_of({path: sdxl[path] for path in sdxl if "up_blocks.0.attentions" in path}).base == "SDXL"
    assert lora_of({path: sd15[path] for path in sd15 if "down_blocks.0.attentions" in path}).base == "SD 1.5"
    middle = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    assert [lora_of({middle: (1280, width)}).base for width in (768, 1024, 2048)] == ["SD 1.5", "SD 2", "SDXL"]
    assert lora_of({middle: (64, 32)}).base is None


def test_a_lora_of_another_family_is_named(sdxl, sd15):
    with pytest.raises(ShapeMismatch) as refusal:
        check_shapes(lora_of(sd15), sdxl, WHERE)
    assert str(refusal.value).startswith(f"{WHERE} is a LoRA for SD 1.5, the base model is SDXL: of its ")
    assert str(refusal.value).endswith("; use one for SDXL")
    with pytest.raises(ShapeMismatch, match=r"is a LoRA for SDXL, the base model is SD 1\.5"):
        check_shapes(lora_of(sdxl), sd15, WHERE)


def test_a_wrong_shape_is_named_with_both_shapes(sdxl):
    path = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    n_out, n_in = sdxl[path]
    end = rf" \({WHERE}; 1 of 1 modules do not fit\): was it trained on another base model"
    for shape, fault in (
        ((n_out, 640), rf"LoRA down is \[4, 640\] but {path} takes {n_in} inputs"),
        ((640, n_in), rf"LoRA up is \[640, 4\] but {path} gives {n_out} outputs"),
        ((n_out, n_in, 1, 1), rf"a weight of shape \[{n_out}, {n_in}, 1, 1\] but {path} has \[{n_out}, {n_in}\]"),
    ):
        with pytest.raises(ShapeMismatch, match=fault + end):
            check_shapes(lora_of({path: shape}), sdxl, WHERE)


def test_a_module_that_the_base_lacks_is_named(sdxl):
    path = "unet.down_blocks.1.attentions.0.transformer_blocks.9.attn1.to_q"
    with pytest.raises(FormatError, match=rf"1 of its 1 modules do not exist in the base model \({path}\)"):
        check_shapes(lora_of({path: (32, 32)}), sdxl, WHERE)


def test_shapes_come_from_the_headers_of_a_saved_base(tmp_path, sdxl):
    tiny_sdxl(torch.float16).save_pretrained(tmp_path)
    shapes = {}
    for owner in ("unet", "text_encoder", "text_encoder_2"):
        (file,) = (tmp_path / owner).glob("*.safetensors")
        shapes |= module_shapes(read_header_file(file), owner)
    assert {path: shapes[path] for path in sdxl} == sdxl
