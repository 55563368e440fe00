"""Pictures against diffusers' own pipelines, and against themselves in other company."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from tests.random_loras import random_lora
from tests.tiny import TEXT_WIDTH, tiny_sd15, tiny_sdxl
from ziplora.base import Base, resident
from ziplora.errors import ShapeMismatch
from ziplora.formats import save_kohya
from ziplora.lora import Layer, LoRA, restyled, select
from ziplora.sample import SCHEDULERS, Request, decode, sample_images, sample_latents, sample_requests

QUICK = {"steps": 2, "width": 32, "height": 32}


@pytest.fixture(scope="module")
def sdxl() -> Base:
    return resident(tiny_sdxl())


@pytest.fixture(scope="module")
def sd15() -> Base:
    return resident(tiny_sd15())


def levels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def same(ours: Image.Image, theirs: Image.Image) -> None:
    assert np.abs(levels(ours) - levels(theirs)).max() <= 1


def of_diffusers(pipeline: object, prompt: str, seed: int, **options: object) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return pipeline(prompt, generator=generator, **options).images[0]  # type: ignore[operator]


@pytest.mark.parametrize("scheduler", [None, *SCHEDULERS])
@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_a_picture_is_the_one_that_diffusers_makes(
    kind: str, scheduler: str | None, request: pytest.FixtureRequest
) -> None:
    from ziplora.sample import make_scheduler

    base: Base = request.getfixturevalue(kind)
    pipeline = {"sdxl": tiny_sdxl, "sd15": tiny_sd15}[kind]()
    for negative, guidance, size in (("", 5.0, (32, 48)), ("blurred", 7.5, (40, 32)), ("blurred", 1.0, (32, 32))):
        pipeline.scheduler = make_scheduler(scheduler, base.pipeline.scheduler)
        options = {"guidance_scale": guidance, "width": size[0], "height": size[1], "num_inference_steps": 4}
        theirs = of_diffusers(pipeline, "a dog", 3, negative_prompt=negative or None, **options)
        (ours,) = sample_requests(
            base, [Request(None, "a dog", 3)], steps=4, guidance=guidance, width=size[0], height=size[1],
            negative=negative, scheduler=scheduler,
        )  # fmt: skip
        assert ours.size == size
        same(ours, theirs)


def test_a_picture_with_a_lora_is_the_one_that_diffusers_makes_with_the_file(sdxl: Base, tmp_path: Path) -> None:
    lora = random_lora(sdxl.slots, rank=4, components="all", dtype=torch.float32, scale=0.5)
    # diffusers reads no LoRAs of the first and last convolution and of the time embedding
    lora = select(lora, lambda path: ".attentions." in path or path.startswith("text_encoder"))
    lora = select(lora, lambda path: "text_projection" not in path)
    save_kohya(lora, tmp_path / "lora.safetensors", metadata={}, architecture="sdxl", title="x", dtype=torch.float32)
    pipeline = tiny_sdxl()
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    options = {"width": 32, "height": 32, "num_inference_steps": 3}
    theirs = of_diffusers(pipeline, "a dog", 3, **options)
    ours, plain = sample_requests(
        sdxl, [Request(lora, "a dog", 3), Request(None, "a dog", 3)], steps=3, width=32, height=32
    )
    same(ours, theirs)
    assert np.abs(levels(plain) - levels(theirs)).max() > 20


def mixture(base: Base) -> list[Request]:
    """Several pairs, strengths, prompts and seeds, ranks and text-encoder parts, in no order."""
    loras = [
        random_lora(base.slots, rank=4, seed=1, dtype=torch.float32),
        random_lora(base.slots, rank=4, seed=2, dtype=torch.float32),
        random_lora(base.slots, rank=6, seed=3, dtype=torch.float32, components="all"),
        None,
    ]
    loras.append(restyled(loras[0], 2, 0.4))  # type: ignore[arg-type]
    requests = [Request(lora, prompt, seed) for lora in loras for prompt, seed in (("a dog", 0), ("a dog in ink", 1))]
    random.Random(0).shuffle(requests)
    return requests


@pytest.mark.parametrize(
    ("batch", "scheduler"), [(None, None), (3, None), (3, "euler-ancestral"), (None, "unipc"), (3, "unipc")]
)
def test_company_changes_no_bit_of_a_picture(sdxl: Base, batch: int | None, scheduler: str | None) -> None:
    requests = mixture(sdxl)
    options = {**QUICK, "batch": batch, "scheduler": scheduler}
    together = list(sample_requests(sdxl, requests, **options))  # type: ignore[arg-type]
    assert len({picture.tobytes() for picture in together}) == len(requests)
    for subset in ([7], [9, 3], [4, 3, 2, 1, 0]):
        alone = list(sample_requests(sdxl, [requests[i] for i in subset], **options))  # type: ignore[arg-type]
        for i, picture in zip(subset, alone, strict=True):
            assert picture.tobytes() == together[i].tobytes()


def test_one_at_a_time_and_side_by_side_agree(sdxl: Base, sd15: Base) -> None:
    for base, n in ((sdxl, 10), (sd15, 5)):
        requests = mixture(base)[:n]
        one_at_a_time = sample_requests(base, requests, **QUICK)  # type: ignore[arg-type]
        side_by_side = sample_requests(base, requests, batch=4, **QUICK)  # type: ignore[arg-type]
        for ours, theirs in zip(one_at_a_time, side_by_side, strict=True):
            same(ours, theirs)


def test_pictures_of_what_the_slots_hold_are_the_same(sdxl: Base) -> None:
    lora = random_lora(sdxl.slots, rank=4, dtype=torch.float32, components="all")
    with sdxl.slots.loaded([[lora]]):
        held = sample_images(sdxl, ["a dog", "a cat"], [0, 1], **QUICK)  # type: ignore[arg-type]
        latents = sample_latents(sdxl, ["a dog", "a cat"], [0, 1], 2, 5.0, 32, 32)
    requests = [Request(lora, "a dog", 0), Request(lora, "a cat", 1)]
    for a, b, c in zip(held, decode(sdxl, latents), sample_requests(sdxl, requests, **QUICK), strict=True):  # type: ignore[arg-type]
        assert a.tobytes() == b.tobytes()
        same(a, c)


def test_between_two_pictures_the_base_is_as_it_was(sdxl: Base) -> None:
    weights = {path: (slot.weight, slot.weight.clone()) for path, slot in sdxl.slots.layers.items()}
    for batch in (None, 2):
        for _ in sample_requests(sdxl, mixture(sdxl)[:6], batch=batch, **QUICK):  # type: ignore[arg-type]
            assert not any(slot.active for slot in sdxl.slots.layers.values())
            assert all(sdxl.slots.layers[path].weight is own for path, (own, _) in weights.items())
            assert all(torch.equal(own, copy) for own, copy in weights.values())


def test_prompts_are_encoded_once_for_a_grid_and_apart_for_text_encoder_loras(monkeypatch: pytest.MonkeyPatch) -> None:
    base = resident(tiny_sdxl())
    text = random_lora(base.slots, rank=2, dtype=torch.float32, components="all")
    plain = [random_lora(base.slots, rank=2, seed=i, dtype=torch.float32) for i in range(2)]
    requests = [Request(lora, prompt, seed) for lora in (*plain, text) for prompt in ("a", "b") for seed in (0, 1)]
    list(sample_requests(base, requests, negative="c", **QUICK))  # type: ignore[arg-type]
    assert len(base.prompts) == 6
    part = select(text, lambda path: path.startswith("text_encoder"))
    with base.slots.loaded([[part]]):
        expected = base.encode_prompts(["a"])
    torch.testing.assert_close(base.encode_prompt("a", part).embeds, expected.embeds)
    assert not torch.equal(base.encode_prompt("a").embeds, base.encode_prompt("a", part).embeds)
    monkeypatch.setattr("ziplora.base.PROMPTS_KEPT", 3)
    kept = base.encode_prompt("kept")
    for other in "efgh":
        base.encode_prompt(other)
        assert len(base.prompts) == 3
    assert base.encode_prompt("kept") is not kept
    base.encode_prompt("h")
    assert [prompt for prompt, _ in base.prompts] == ["g", "kept", "h"]


def short_of_memory(base: Base, monkeypatch: pytest.MonkeyPatch, rows: int, side: int) -> list[tuple[int, ...]]:
    """Lets the autoencoder run out of memory above `rows` pictures or latents of `side`, as a GPU would. What was
    tried is listed."""
    vae, tried = base.pipeline.vae, []
    decoder = vae.decoder.forward

    def limited(latents: torch.Tensor, *arguments: object) -> torch.Tensor:
        tried.append(tuple(latents.shape))
        if len(latents) > rows or max(latents.shape[-2:]) > side:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decoder(latents, *arguments)

    monkeypatch.setattr(vae.decoder, "forward", limited)
    return tried


def test_decoding_takes_what_memory_there_is(sdxl: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.2
    whole = decode(sdxl, latents)
    with monkeypatch.context() as patch:
        tried = short_of_memory(sdxl, patch, rows=1, side=32)
        one_by_one = decode(sdxl, latents)
        assert [shape[0] for shape in tried] == [2, 1, 1]
    for a, b in zip(whole, one_by_one, strict=True):
        same(a, b)
    with monkeypatch.context() as patch:
        short_of_memory(sdxl, patch, rows=1, side=16)
        tiled = decode(sdxl, latents)
    for a, b in zip(whole, tiled, strict=True):
        assert b.size == (256, 256)
        # not equal: group norms and attention see a tile, not the picture
        assert np.corrcoef(levels(a).ravel(), levels(b).ravel())[0, 1] > 0.9
    assert not sdxl.pipeline.vae.use_tiling


@pytest.fixture
def no_recompilation() -> Iterator[None]:
    yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()


def test_a_compiled_model_is_compiled_once_for_all_pairs(no_recompilation: None) -> None:
    """Dynamo's guards decide that, whatever the backend: "eager" leaves out only the code generation."""
    pipeline = tiny_sdxl()
    pipeline.unet = UNet2DConditionModel(  # its blocks as SDXL's, fewer of them: tracing takes a while
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
    )
    base = resident(pipeline)
    loras = [random_lora(base.slots, rank=1 + i, seed=i, dtype=torch.float32, drop=i) for i in range(3)]
    loras.append(random_lora(base.slots, rank=3, dtype=torch.float32, components="all"))
    requests = [Request(lora, f"picture {i}", i) for i, lora in enumerate([None, *loras])]
    eager = list(sample_requests(base, requests, **QUICK))  # type: ignore[arg-type]
    list(sample_requests(base, requests[:1], backend="eager", **QUICK))  # type: ignore[arg-type]
    torch.compiler.set_stance("fail_on_recompile")
    for ours, theirs in zip(sample_requests(base, requests, backend="eager", **QUICK), eager, strict=True):  # type: ignore[arg-type]
        same(ours, theirs)


def test_what_cannot_be_sampled_is_refused_before_anything_is(sdxl: Base) -> None:
    request = [Request(None, "a dog", 0)]
    for options, message in (
        ({"width": 100}, "width is 100; a multiple of 8"),
        ({"height": -8}, "height is -8"),
        ({"steps": 0}, "steps is 0; at least 1"),
        ({"scheduler": "best"}, "scheduler best is unknown; one of ddim"),
        ({"batch": 0}, "batch is 0; at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_requests(sdxl, request, **options)  # type: ignore[arg-type]
    wrong = LoRA({next(iter(sdxl.slots.targets)): Layer(torch.zeros(2, 5), torch.zeros(7, 2))})
    with pytest.raises(ShapeMismatch, match="another base model"):
        list(sample_requests(sdxl, [Request(wrong, "a dog", 0)], **QUICK))  # type: ignore[arg-type]
    assert list(sample_requests(sdxl, [])) == []
