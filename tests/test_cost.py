"""Bytes and operations of a plan, held against real files and against the figures known of SDXL."""

from dataclasses import asdict, replace
from math import prod

import pytest
import torch

from service.cost import (
    HEADER_BYTES,
    Bytes,
    bytes_of,
    forward_flop,
    merge_flop,
    merged_bytes,
    merger_bytes,
    moments_flop,
    text_flop,
    time_from,
    time_of,
)
from service.jobs import BaseRef, Concept, ImageRef, Job, SamplePrompt, SampleSettings
from tests.lora_files import lora_file, random_lora, shapes_of
from tests.tiny import tiny_sdxl
from ziplora.formats import write_kohya
from ziplora.layouts import parse, read_header_bytes
from ziplora.lora import stacked
from ziplora.methods import METHODS
from ziplora.optimize_knobs import ZipLoRAKnobs


@pytest.fixture(scope="module")
def sdxl_shapes() -> dict[str, tuple[int, ...]]:
    """The true SDXL UNet, without memory."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 2, 10),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    return {
        f"unet.{name}": tuple(module.weight.shape)
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }


def test_operations_of_sdxl(sdxl_shapes):
    assert forward_flop(sdxl_shapes, 128, 128) == pytest.approx(6.76e12, rel=2e-3)
    assert forward_flop(sdxl_shapes, 64, 64) == pytest.approx(1.59e12, rel=2e-3)


def test_time_of_one_pair_of_sdxl(sdxl_shapes):
    """The published run of 100 steps at 1024² is 2 × 14.73 TFLOP a step, and 100 teacher calls for each LoRA."""
    duration = time_of([job(knobs=ziplora_knobs())], LORAS, sdxl_shapes, 1024, 8)
    assert duration.merge_s == pytest.approx(100 * 2 * 14.73e12 / (0.4 * 989e12), rel=5e-3)
    assert duration.calibrate_s == pytest.approx(200 * 6.76e12 / (0.4 * 989e12), rel=5e-3)
    assert duration.sample_s == pytest.approx(2 * 50 * 2 * 6.76e12 / (0.4 * 989e12), rel=5e-3)
    twice = time_of([job(knobs=ziplora_knobs()), job(style="f", knobs=ziplora_knobs())], LORAS, sdxl_shapes, 1024, 8)
    assert twice.calibrate_s == pytest.approx(1.5 * duration.calibrate_s)
    assert twice.total_s == pytest.approx(1.5 * duration.calibrate_s + 2 * duration.merge_s + 2 * duration.sample_s)


def test_loras_without_images_sample_their_own(sdxl_shapes):
    without = time_of([job(images=(), knobs=ziplora_knobs())], LORAS, sdxl_shapes, 1024, 8)
    assert without.calibrate_s == pytest.approx(2 * (100 + 200) * 6.76e12 / (0.4 * 989e12), rel=5e-3)


def test_direct_merge_takes_no_calibration(sdxl_shapes):
    duration = time_of([job(method="direct", knobs={})], LORAS, sdxl_shapes, 1024, 8)
    assert (duration.calibrate_s, duration.merge_s) == (0, 0)
    assert duration.sample_s > 0


def test_closed_forms_cost_recordings_and_a_little_algebra(sdxl_shapes):
    """5 TFLOP of Cholesky factors for columns, 0.2 for matrices; the moments add a seventh to a recorded call, at half
    the rate."""
    assert merge_flop(job(method="ziplora-closed", knobs={}), sdxl_shapes, (64, 64)) == pytest.approx(5.3e12, rel=0.05)
    assert merge_flop(job(method="ziplora-matrix", knobs={}), sdxl_shapes, (64, 64)) == pytest.approx(0.17e12, rel=0.05)
    assert moments_flop(sdxl_shapes, 128, 128) == pytest.approx(2 * 0.93e12, rel=0.05)
    closed = time_of([job(method="ziplora-closed", knobs={})], LORAS, sdxl_shapes, 1024, 8)
    assert closed.merge_s == pytest.approx(0.53, rel=0.05)
    assert closed.calibrate_s == pytest.approx(2 * 16 * (6.76e12 + 1.86e12) / (0.4 * 989e12), rel=0.01)
    matrix = time_of([job(method="ziplora-matrix", knobs={})], LORAS, sdxl_shapes, 1024, 8)
    assert matrix.merge_s < 0.02
    assert matrix.calibrate_s > closed.calibrate_s  # the outputs' weights


def test_refinement_and_the_combined_term_cost_passes(sdxl_shapes):
    published = time_of([job(knobs=ziplora_knobs())], LORAS, sdxl_shapes, 1024, 8).merge_s
    refined = time_of(
        [job(method="ziplora-refined", knobs={"steps": 10, "batch": 2})], LORAS, sdxl_shapes, 1024, 8
    ).merge_s
    assert refined == pytest.approx(published / 5 + 0.53, rel=0.02)
    composed = time_of([job(method="ziplora-composed", knobs={})], LORAS, sdxl_shapes, 1024, 8).merge_s
    assert composed == pytest.approx(1.5 * published + 32 * 6.76e12 / (0.4 * 989e12), rel=5e-3)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_that_computes_anything_has_a_cost(sdxl_shapes, name):
    knobs = asdict(METHODS[name].knobs())
    merge_s = time_of([job(method=name, knobs=knobs)], LORAS, sdxl_shapes, 1024, 8).merge_s
    if name in ("direct", "styledrop"):
        assert merge_s == 0  # puts one LoRA beneath the other; what adapters take is counted as training
        return
    assert merge_s > 1e-3
    wider = {"d": {"x": module((8, 8), 128)}, "e": LORAS["e"]}
    more = time_of([job(method=name, knobs=knobs)], wider, sdxl_shapes, 1024, 8).merge_s
    by_rank = ("ties", "dare", "prune", "svd", "np-lora", "mix-of-show", "k-lora", "custom-diffusion")
    assert (more > merge_s) == (name in by_rank)


def test_gradient_fusion_costs_a_product_with_each_moment_at_every_evaluation(sdxl_shapes):
    """140 layers read text and have 500 steps of their own, which is nine tenths of it."""
    fusion = job(method="mix-of-show", knobs={})
    text = 140 * 500 * 1.1 * 4 * 128 * 2048**2
    whole = merge_flop(fusion, sdxl_shapes, (64, 64))
    assert whole == pytest.approx(text / 0.9, rel=0.05)
    quick = replace(fusion, knobs={"context_steps": 50})
    assert whole - merge_flop(quick, sdxl_shapes, (64, 64)) == pytest.approx(0.9 * text, rel=0.05)


def test_captions_are_encoded_once_for_all_pairs():
    shapes = shapes_of(tiny_sdxl())
    jobs = [job(style, "custom-diffusion", knobs) for knobs in [{}] for style in ("e", "f")]
    one, two = (time_of(some, LORAS, shapes, 64, 2) for some in (jobs[:1], jobs))
    assert one.calibrate_s == two.calibrate_s == pytest.approx(600 * text_flop(shapes) / (0.4 * 989e12))
    assert two.merge_s == pytest.approx(2 * one.merge_s)


def test_time_from_finished_entries():
    stages = [{"calibrate": 2.0, "merge": 4.0, "sample": 6.0, "commit": 1.0}, {"merge": 2.0, "sample": 2.0}]
    duration = time_from(stages, 10)
    assert (duration.calibrate_s, duration.merge_s, duration.sample_s, duration.total_s) == (10.0, 35.0, 40.0, 85.0)
    assert "2 finished entries" in duration.basis


def test_a_rank_64_pair_of_sdxl_writes_372_mb(sdxl_shapes):
    targets = {path: shape for path, shape in sdxl_shapes.items() if ".attn" in path}
    modules = {path: module(shape, 64) for path, shape in targets.items()}
    assert len(modules) == 560
    assert merged_bytes(modules, modules) == pytest.approx(371.6e6, rel=2e-3)
    assert merger_bytes(modules, modules) == 4 * 1_571_840


def test_bytes_are_those_of_the_written_file():
    shapes = shapes_of(tiny_sdxl())
    targets = {path: shape for path, shape in shapes.items() if ".attn" in path}
    subject = random_lora(targets, lambda path: 3 if "attn1" in path else 5, seed=1)
    style = random_lora({path: shape for path, shape in shapes.items() if "_embedding" not in path}, 4, seed=2)
    parsed = [parse(read_header_bytes(lora_file(lora, "peft"), "x"), "x").modules for lora in (subject, style)]
    written = write_kohya(stacked([subject, style]), metadata={}, architecture="sdxl", title="x", trigger="y")
    header = int.from_bytes(written[:8], "little")
    values = merged_bytes(*parsed) - 3 * HEADER_BYTES * len(style.layers)
    assert values == len(written) - 8 - header
    assert merged_bytes(*parsed) == pytest.approx(len(written), rel=0.03)


def test_bytes_of_jobs():
    lora = {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": module((8, 8), 2)}
    jobs = [job(), job(style="f", method="direct", knobs={}, outputs=("peft",))]
    one = merged_bytes(lora, lora)
    assert one == 2 * 4 * 16 + 2 + 3 * HEADER_BYTES
    pixels = int(3 * 1024 * 1024 * 1.6)
    assert bytes_of(jobs, {"d": lora, "e": lora, "f": lora}) == Bytes(2 * one, 64, one, 2 * pixels)


def module(shape: tuple[int, ...], rank: int):
    from ziplora.layouts import ModuleKeys

    return ModuleKeys("down", "up", None, 1.0, rank, shape[1], shape[0], shape[2:])


LORAS = {digest: {"x": module((8, 8), 64)} for digest in "def"}  # what an estimate looks at is the rank


def ziplora_knobs(**changes):
    return asdict(ZipLoRAKnobs(**changes))


IMAGES = (ImageRef("/i.png", "i"),)


def job(style="e", method="ziplora", knobs=None, images=IMAGES, outputs=()) -> Job:
    samples = SampleSettings((SamplePrompt("p", "{subject}"),), (0, 1), 50, 5.0, 1024, 1024)
    return Job(
        BaseRef("/b", None, "b", "sdxl"),
        Concept("dog", "subject", "/d", "d", "p", "t", images),
        Concept(style, "style", "/s", style, "p", "t", images),
        method,
        ziplora_knobs() if knobs is None else knobs,
        0,
        samples,
        outputs,
    )


def test_operations_by_hand():
    shapes = {
        "unet.conv_in": (8, 4, 3, 3),
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (8, 8),
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (8, 16),
        "unet.down_blocks.0.downsamplers.0.conv": (8, 8, 3, 3),
        "unet.mid_block.resnets.0.time_emb_proj": (16, 32),
        "unet.down_blocks.1.resnets.0.conv1": (16, 8, 3, 3),
        "unet.up_blocks.0.upsamplers.0.conv": (16, 16, 3, 3),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": (9, 9),
    }
    expected = (
        2 * prod((8, 4, 3, 3)) * 64
        + 2 * 64 * 64
        + 4 * 64 * 64 * 8
        + 2 * 8 * 16 * 77
        + 2 * prod((8, 8, 3, 3)) * 16
        + 2 * 16 * 32
        + 2 * prod((16, 8, 3, 3)) * 16
        + 2 * prod((16, 16, 3, 3)) * 64
    )
    assert forward_flop(shapes, 8, 8) == expected
