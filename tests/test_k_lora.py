"""K-LoRA's choices against the paper's comparison on dense updates, and pictures that change their LoRA on the way."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.random_loras import random_lora
from tests.tiny import tiny_sdxl
from ziplora.base import Base, resident
from ziplora.fusion_knobs import KLoRAKnobs
from ziplora.k_lora import k_lora, switch
from ziplora.lora import Layer, LoRA, delta, scaled, select
from ziplora.merged import Merged, Pair
from ziplora.methods import METHODS
from ziplora.sample import Request, make_scheduler, sample_requests
from ziplora.switched import Switched, applied_side_by_side

STEPS = 4
QUICK = {"steps": STEPS, "width": 32, "height": 32}


@pytest.fixture(scope="module")
def base() -> Base:
    return resident(tiny_sdxl())


def lora(base: Base, rank: int, seed: int, components: str = "targets") -> LoRA:
    """Layers of different strength, so that some are chosen early and some late."""
    made = random_lora(base.slots, rank, seed, dtype=torch.float32, components=components, drop=9)
    made = select(made, lambda path: path.startswith(("unet.mid_block.", "unet.down_blocks.2.", "text_encoder.")))
    strengths = torch.rand(len(made.layers), generator=torch.Generator().manual_seed(seed)) * 2
    return LoRA({p: Layer(one.down, one.up * s) for (p, one), s in zip(made.layers.items(), strengths, strict=True)})


@pytest.fixture(scope="module")
def pair(base: Base) -> Pair:
    return Pair(lora(base, 2, 1), lora(base, 3, 2, "all"))


@pytest.fixture(scope="module")
def merged(base: Base, pair: Pair) -> Merged:
    return k_lora(base, [pair], KLoRAKnobs())[0]


def test_a_layer_takes_the_lora_that_the_paper_chooses_at_every_step(base: Base, pair: Pair, merged: Merged) -> None:
    both = [path for path in base.slots.targets if path in pair.subject.layers and path in pair.style.layers]
    dense = [
        {path: delta(layer) for path, layer in one.layers.items() if path in base.slots.targets}
        for one in (pair.subject, pair.style)
    ]
    gamma = float(sum(c.abs().double().sum() for c in dense[0].values()))
    gamma /= float(sum(s.abs().double().sum() for s in dense[1].values()))
    tops = {path: [one[path].abs().flatten().sort().values[-6:].double().sum() for one in dense] for path in both}
    assert merged.report["gamma"] == pytest.approx(gamma, rel=1e-5)
    applied = merged.applied()
    assert isinstance(applied, Switched)
    taken = []
    for step in range(50):
        now, scale = applied.at(step / 50), 1.5 * step / 50 + 0.5
        for path in both:
            top = tops[path]
            if abs(top[0] / (gamma * scale * top[1]) - 1) > 1e-4:  # else rounding decides
                taken.append(bool(top[0] >= gamma * scale * top[1]))
                assert torch.equal(delta(now.layers[path]), dense[0 if taken[-1] else 1][path])
    assert 0.2 < sum(taken) / len(taken) < 0.8


def test_layers_of_one_lora_and_those_that_are_no_targets(base: Base, pair: Pair, merged: Merged) -> None:
    applied = merged.applied()
    assert isinstance(applied, Switched)
    for share in (0.0, 0.5, 0.99):
        now = applied.at(share)
        assert now.layers.keys() == pair.subject.layers.keys() | pair.style.layers.keys()
        for path, layer in now.layers.items():
            having = [one.layers[path] for one in (pair.subject, pair.style) if path in one.layers]
            if len(having) == 1 or path not in base.slots.targets:
                assert torch.equal(delta(layer), sum(map(delta, having)))
    assert merged.until.keys() <= base.slots.targets.keys()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("subject", "style", "knobs", "until"),
    [
        (2.0, 1.0, KLoRAKnobs(), 1.0),
        (1.0, 1.0, KLoRAKnobs(), 1 / 3),
        (0.4, 1.0, KLoRAKnobs(), -0.1 / 1.5),
        (9.0, 0.0, KLoRAKnobs(), 1.0),
        (0.0, 9.0, KLoRAKnobs(), -1.0),
        (0.0, 0.0, KLoRAKnobs(), -1.0),
        (0.6, 1.0, KLoRAKnobs(alpha=0.0), 1.0),
        (0.4, 1.0, KLoRAKnobs(alpha=0.0), -1.0),
    ],
)
def test_until_when_the_subject_stays(subject: float, style: float, knobs: KLoRAKnobs, until: float) -> None:
    assert switch(subject, style, 1.0, knobs) == pytest.approx(until)


def test_k_may_be_given_and_larger_than_a_layer(base: Base, pair: Pair, merged: Merged) -> None:
    one, whole = (k_lora(base, [pair], KLoRAKnobs(k=k))[0].until for k in (1, 10**9))
    path = next(path for path in base.slots.targets if path in pair.subject.layers and path in pair.style.layers)
    c, s = (delta(lora.layers[path]).abs() for lora in (pair.subject, pair.style))
    gamma = merged.report["gamma"]
    for until, sums in ((one, (c.max(), s.max())), (whole, (c.sum(), s.sum()))):
        assert until is not None
        assert until[path] == pytest.approx(switch(*map(float, sums), gamma, KLoRAKnobs()), abs=1e-4)


def levels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def test_a_picture_is_diffusers_own_with_the_lora_changed_after_each_step(base: Base, merged: Merged) -> None:
    switched = merged.applied()
    assert isinstance(switched, Switched)
    text = lambda lora: select(lora, lambda path: not path.startswith("unet."))  # noqa: E731
    encoded = base.encode_prompt("a dog", text(merged.style))
    nothing = torch.zeros_like(encoded.embeds), torch.zeros_like(encoded.pooled)  # type: ignore[arg-type]
    unet = switched.part(lambda path: path.startswith("unet."))

    def after(pipeline, number, timestep, kept):  # type: ignore[no-untyped-def]
        base.slots.load([[unet.at((number + 1) / STEPS)]])
        return kept

    base.slots.load([[unet.at(0.0)]])
    pipeline = base.pipeline
    pipeline.scheduler = make_scheduler(None, pipeline.scheduler)
    theirs = pipeline(
        prompt_embeds=encoded.embeds, pooled_prompt_embeds=encoded.pooled, negative_prompt_embeds=nothing[0],
        negative_pooled_prompt_embeds=nothing[1], generator=torch.Generator().manual_seed(3), width=32, height=32,
        num_inference_steps=STEPS, guidance_scale=5.0, callback_on_step_end=after,
    ).images[0]  # fmt: skip
    base.slots.close()
    for batch in (None, 2):
        (ours,) = sample_requests(base, [Request(switched, "a dog", 3)], batch=batch, guidance=5.0, **QUICK)
        assert np.abs(levels(ours) - levels(theirs)).max() <= 1
    first, second = sample_requests(
        base, [Request(one, "a dog", 3) for one in (unet.at(0.0), unet.at(0.99))], guidance=5.0, **QUICK
    )
    assert min(np.abs(levels(theirs) - levels(one)).max() for one in (first, second)) > 5


def test_pictures_do_not_depend_on_their_company(base: Base, pair: Pair, merged: Merged) -> None:
    weights = {path: layer.weight for path, layer in base.slots.layers.items()}
    strong, weak = merged.applied(), merged.applied(0.4)
    other = k_lora(base, [Pair(pair.subject, scaled(pair.style, 3.0))], KLoRAKnobs(alpha=0.5))[0].applied()
    requests = [Request(strong, "a dog", 0), Request(pair.subject, "a dog", 0), Request(weak, "a dog", 0)]
    for batch in (None, 2):
        alone = [next(sample_requests(base, [one], batch=batch, **QUICK)).tobytes() for one in requests]
        company = [Request(other, "a cat", 5), *requests[::-1], Request(None, "a cat", 1)]
        made = [picture.tobytes() for picture in sample_requests(base, company, batch=batch, **QUICK)]
        assert made[3:0:-1] == alone
        assert len(set(alone)) == 3
    assert all(base.slots.layers[path].weight is weight for path, weight in weights.items())
    assert not any(layer.active for layer in base.slots.layers.values())


def test_it_is_no_lora_and_says_so(base: Base, pair: Pair, merged: Merged) -> None:
    row = METHODS["k-lora"]
    assert not row.file
    assert row.yields == "images and a recipe, no merged file"
    with pytest.raises(ValueError, match="the two LoRAs take turns during sampling, so there is no single LoRA"):
        merged.lora()
    with (
        pytest.raises(ValueError, match="share no batch"),
        applied_side_by_side(base.slots, [merged.applied(), pair.style]),
    ):
        pass


def test_what_it_cannot_do_is_refused(base: Base, pair: Pair) -> None:
    bare = select(pair.style, lambda path: path not in base.slots.targets)
    with pytest.raises(ValueError, match="neither LoRA touches an attention layer of the UNet: nothing to choose"):
        k_lora(base, [Pair(bare, bare)], KLoRAKnobs())
    for given, reason in (
        ({"alpha": -1.0}, "alpha is -1.0; at least 0 and finite"),
        ({"beta": float("inf")}, "beta is inf; at least 0 and finite"),
        ({"alpha": 0.0, "beta": 0.0}, "alpha and beta are both 0"),
        ({"k": 0}, "k is 0; at least 1, or null for the product of both LoRAs' ranks"),
    ):
        with pytest.raises(ValueError, match=reason):
            KLoRAKnobs(**given)  # type: ignore[arg-type]
