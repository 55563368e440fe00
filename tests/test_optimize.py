"""Eq. 3 against an independent, written-out form: dense ΔW·diag(m) in the weights, autograd through functional_call."""

import dataclasses

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.func import functional_call

from tests.grid import Grid
from tests.random_loras import random_lora
from tests.tiny import tiny_sd15, tiny_sdxl
from ziplora.base import Base, load_base, resident
from ziplora.calibrate import Calibration, calibrate, derived_seed, draw, predictions
from ziplora.calibration_settings import CalibrationSettings
from ziplora.composition import combined_calibrations
from ziplora.formats import read_lora
from ziplora.lora import LoRA, Mergers, delta
from ziplora.merged import Pair
from ziplora.methods import METHODS
from ziplora.optimize import Optimization, batch, eq3_losses, similarity_penalty, student_conditioning, ziplora
from ziplora.optimize_knobs import ComposedKnobs, ZipLoRAKnobs

DOG = [Image.linear_gradient("L"), Image.radial_gradient("L")]
INK = [Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 20)]
SETTINGS = CalibrationSettings(draws=4, seed=0, noise="separate", size=32)


@pytest.fixture(scope="module", params=["sdxl", "sd15"])
def base(request: pytest.FixtureRequest) -> Base:
    return resident((tiny_sdxl if request.param == "sdxl" else tiny_sd15)(torch.float64))


def make_pair(base: Base, seed: int = 0, settings: CalibrationSettings = SETTINGS, **options: object) -> Pair:
    subject = random_lora(base.slots, rank=4, seed=2 * seed, **options)  # type: ignore[arg-type]
    style = random_lora(base.slots, rank=6, seed=2 * seed + 1, **options)  # type: ignore[arg-type]
    return Pair(
        subject,
        style,
        calibrate(base, subject, "a dog", DOG, settings),
        calibrate(base, style, "in ink", INK, settings),
    )


def written_out_eq3(base: Base, pair: Pair, mergers: dict[str, Tensor], knobs: ZipLoRAKnobs, step: int) -> Tensor:
    """L of Eq. 3 with every ΔW dense. `mergers[path]` is [2, in]; teachers are recomputed here, not taken from the
    calibration."""
    unet = base.unet
    weights = {f"{path.removeprefix('unet.')}.weight": base.slots.layers[path].weight for path in mergers}

    def predict(noisy: Tensor, timestep: Tensor, prompt: str, changed: dict[str, Tensor]) -> Tensor:
        conditioning = base.encode_prompts([prompt])
        added = None
        if conditioning.pooled is not None:
            added = {
                "text_embeds": conditioning.pooled,
                "time_ids": torch.tensor([[32, 32, 0, 0, 32, 32]], dtype=torch.float64),
            }
        kwargs = {"encoder_hidden_states": conditioning.embeds, "added_cond_kwargs": added}
        return functional_call(unet, changed, (noisy, timestep), kwargs).sample

    deltas = [{path: delta(lora.layers[path]) for path in mergers} for lora in (pair.subject, pair.style)]
    merged = {
        f"{path.removeprefix('unet.')}.weight": base.slots.layers[path].weight
        + deltas[0][path] @ torch.diag(mergers[path][0])
        + deltas[1][path] @ torch.diag(mergers[path][1])
        for path in mergers
    }
    loss = torch.zeros((), dtype=torch.float64)
    for which, calibration in enumerate((pair.subject_calibration, pair.style_calibration)):
        assert calibration is not None
        teacher = {
            name: weight + deltas[which]["unet." + name.removesuffix(".weight")] for name, weight in weights.items()
        }
        noisy, timestep = calibration.noisy[step : step + 1], calibration.timesteps[step : step + 1]
        difference = predict(noisy, timestep, calibration.prompt, merged) - predict(
            noisy, timestep, calibration.prompt, teacher
        )
        loss = loss + (difference.pow(2).sum().sqrt() if knobs.reconstruction == "norm" else difference.pow(2).mean())
    dots = [torch.abs(torch.dot(m[0], m[1])) for m in mergers.values()]
    sizes = [m.shape[1] for m in mergers.values()]
    penalty = {
        "literal": sum(dots),
        "columns": sum(dot / size for dot, size in zip(dots, sizes, strict=True)),
        "mean": sum(dot / size for dot, size in zip(dots, sizes, strict=True)) / len(dots),
    }[knobs.penalty]
    return loss + knobs.penalty_weight * penalty


@pytest.mark.parametrize(
    "knobs",
    [
        ZipLoRAKnobs(),
        ZipLoRAKnobs(reconstruction="norm", penalty="literal"),
        ZipLoRAKnobs(penalty="columns", penalty_weight=0.5),
    ],
)
def test_loss_and_gradient_are_eq_3(base: Base, knobs: ZipLoRAKnobs) -> None:
    pair = make_pair(base)
    generator = torch.Generator().manual_seed(3)
    base.slots.load([[pair.subject, pair.style]])
    parameters = base.slots.attach_mergers()
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 0.5)
    conditioning = student_conditioning(base, [pair])
    losses = eq3_losses(base, parameters, *batch_at(pair, 1)[:2], conditioning, batch_at(pair, 1)[2], knobs)
    loss = losses.reconstruction.sum() + knobs.penalty_weight * losses.penalty.sum()
    loss.backward()
    base.slots.close()

    dense = {path: parameter.detach()[0].clone().requires_grad_() for path, parameter in parameters.items()}
    expected = written_out_eq3(base, pair, dense, knobs, step=1)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for path, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad[0], dense[path].grad, rtol=1e-5, atol=1e-9, msg=path)  # type: ignore[index]


def batch_at(pair: Pair, step: int) -> tuple[Tensor, Tensor, Tensor]:
    return batch([(pair.subject_calibration, pair.style_calibration)], step, 1)


def test_penalty_is_the_dot_product_of_eq_3() -> None:
    a, b = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([4.0, -5.0, 6.0])
    assert similarity_penalty(a, b) == abs(1 * 4 - 2 * 5 - 3 * 6)
    ones = torch.ones(8, requires_grad=True)
    similarity_penalty(ones, torch.ones(8)).backward()
    assert torch.equal(ones.grad, torch.ones(8))  # |cosine| would have no gradient here


def test_optimisation_lowers_held_out_reconstruction(base: Base) -> None:
    pair = make_pair(base, settings=dataclasses.replace(SETTINGS, draws=40))
    merged = ziplora(base, [pair], ZipLoRAKnobs(steps=40, learning_rate=0.02))[0]
    held_out = make_pair(base, settings=dataclasses.replace(SETTINGS, draws=16, seed=99))
    assert merged.mergers is not None
    assert reconstruction_of(base, held_out, merged.lora()) < 0.8 * reconstruction_of(base, held_out, None)
    assert merged.report["steps"] == 40
    assert len(merged.report["subject_loss"]) == 2


def test_layers_that_are_not_learned_stay_at_the_direct_merge(base: Base) -> None:
    pair = make_pair(base, settings=dataclasses.replace(SETTINGS, draws=3))
    (merged,) = ziplora(base, [pair], ZipLoRAKnobs(steps=3, layers="q-out"))
    assert merged.mergers is not None
    for path, values in (*merged.mergers.subject.items(), *merged.mergers.style.items()):
        learned = path.endswith((".to_q", ".to_out.0"))
        assert bool((values == 1).all()) is not learned, path
    keys = {path: layer for path, layer in pair.subject.layers.items() if path.endswith(".to_k")}
    only_keys = dataclasses.replace(pair, subject=LoRA(keys), style=LoRA({}))
    with pytest.raises(ValueError, match="queries or outputs"):
        ziplora(base, [only_keys], ZipLoRAKnobs(steps=1, layers="q-out"))


def test_the_papers_settings_beat_direct_merge_on_the_demos_loras(grid_template: Grid) -> None:
    base = load_base(grid_template.root / "base")
    loras = [read_lora(grid_template.root / f"{name}.safetensors").lora for name in ("dog", "ink")]
    images = [Image.open(grid_template.root / f"{name}.png") for name in ("dog", "ink")]

    def pair(draws: int, seed: int) -> Pair:
        settings = CalibrationSettings(draws, seed, "separate", None)
        prompts = ("a photo of sks dog", "a house in szn ink style")
        calibrations = [
            calibrate(base, lora, prompt, [image], settings)
            for lora, prompt, image in zip(loras, prompts, images, strict=True)
        ]
        return Pair(*loras, *calibrations)

    knobs = ZipLoRAKnobs()
    assert (knobs.steps, knobs.learning_rate, knobs.penalty_weight) == (100, 0.01, 0.01)
    merged = ziplora(base, [pair(draws=100, seed=0)], knobs)[0]
    held_out = pair(draws=16, seed=1)
    assert reconstruction_of(base, held_out, merged.lora()) < reconstruction_of(base, held_out, None)


@torch.no_grad()
def reconstruction_of(base: Base, pair: Pair, merged: LoRA | None) -> float:
    """Both reconstruction terms over all draws; None for the direct merge."""
    total = 0.0
    with base.slots.loaded([[merged]] if merged is not None else [[pair.subject, pair.style]]):
        for calibration in (pair.subject_calibration, pair.style_calibration):
            assert calibration is not None
            conditioning = calibration.conditioning.repeat(len(calibration.timesteps))
            predicted = base.predict_noise(calibration.noisy, calibration.timesteps, conditioning)
            total += (predicted - calibration.target).square().mean().item()
    return total


def test_pairs_side_by_side_equal_each_alone(base: Base) -> None:
    knobs = ZipLoRAKnobs(steps=5, batch=2, penalty="columns")
    pairs = [make_pair(base, seed=seed, settings=dataclasses.replace(SETTINGS, draws=10)) for seed in range(3)]
    together = ziplora(base, pairs, knobs)
    for pair, mine in zip(pairs, together, strict=True):
        alone = ziplora(base, [pair], knobs)[0]
        assert mine.mergers is not None
        assert alone.mergers is not None
        for path, merger in alone.mergers.subject.items():
            torch.testing.assert_close(mine.mergers.subject[path], merger, rtol=0, atol=1e-7)


def test_a_seed_decides_the_result_bit_by_bit(base: Base) -> None:
    first, second = (ziplora(base, [make_pair(base)], ZipLoRAKnobs(steps=4))[0] for _ in range(2))
    assert first.mergers is not None
    assert second.mergers is not None
    assert all(torch.equal(merger, second.mergers.style[path]) for path, merger in first.mergers.style.items())


def test_stops_when_the_similarity_reaches_zero(base: Base) -> None:
    pair = make_pair(base)
    # nothing but the penalty: each step takes 0.05 off every merger, so that the product of both is gone after about 20
    knobs = ZipLoRAKnobs(steps=100, learning_rate=0.05, penalty="literal", penalty_weight=1e6, similarity_floor=0.01)
    optimization = Optimization(base, [pair], knobs)
    steps = list(optimization)
    assert 10 < len(steps) < 40
    assert steps[-1].similarity.item() <= 0.01 < steps[-2].similarity.item()
    assert optimization.merged()[0].report["stopped_early"]


def test_a_layer_that_one_lora_lacks_has_rank_0_there(base: Base) -> None:
    pair = make_pair(base, drop=3)
    style = random_lora(base.slots, rank=2, seed=5)
    pair = dataclasses.replace(pair, style=style, style_calibration=calibrate(base, style, "in ink", INK, SETTINGS))
    merged = ziplora(base, [pair], ZipLoRAKnobs(steps=2))[0]
    assert merged.mergers is not None
    assert merged.mergers.subject.keys() == pair.subject.layers.keys()
    assert merged.mergers.style.keys() == set(base.slots.targets)
    assert merged.lora().layers.keys() == set(base.slots.targets)


def test_a_layer_that_one_lora_lacks_is_not_pushed_towards_zero(base: Base) -> None:
    """Where nothing conflicts, the penalty has nothing to say: |m_c·m_s| counts only layers that both LoRAs have."""
    full = make_pair(base)
    self_attention = LoRA({path: layer for path, layer in full.subject.layers.items() if ".attn1." in path})
    cross_attention = LoRA({path: layer for path, layer in full.style.layers.items() if ".attn2." in path})
    pair = dataclasses.replace(full, subject=self_attention, style=cross_attention)
    without, with_penalty = (
        ziplora(base, [pair], ZipLoRAKnobs(steps=3, penalty="columns", penalty_weight=weight))[0]
        for weight in (0.0, 10.0)
    )
    assert without.mergers is not None
    assert with_penalty.mergers is not None
    assert without.mergers.subject.keys() == self_attention.layers.keys()
    for path, merger in without.mergers.subject.items():
        assert torch.equal(merger, with_penalty.mergers.subject[path])


def test_half_precision_is_refused_because_gradients_underflow() -> None:
    base = resident(tiny_sdxl(torch.float32))
    pair = make_pair(base)
    base.unet.to(torch.float16)
    with pytest.raises(ValueError, match="use bfloat16 or float32"):
        ziplora(base, [pair], ZipLoRAKnobs(steps=1))


def test_carried_modules_are_part_of_teacher_and_student(base: Base) -> None:
    """With one LoRA all zero, direct merge and teacher are the same model: the loss starts at zero only if carried
    parts act in both."""
    everything = random_lora(base.slots, components="all", scale=0.05)
    nothing = random_lora(base.slots, scale=0.0)
    pair = Pair(
        everything,
        nothing,
        calibrate(base, everything, "a dog", DOG, SETTINGS),
        calibrate(base, everything, "in ink", INK, SETTINGS),
    )
    report = ziplora(base, [pair], ZipLoRAKnobs(steps=1))[0].report
    assert report["subject_loss"][0] < 1e-20
    assert report["style_loss"][0] < 1e-20


def test_divergence_is_an_error(base: Base) -> None:
    pair = make_pair(base)
    broken = dataclasses.replace(pair, subject=random_lora(base.slots, scale=float("inf")))
    with pytest.raises(ArithmeticError, match=r"not finite at step 1, before any update: is a LoRA broken"):
        ziplora(base, [broken], ZipLoRAKnobs(steps=2))
    assert not any(slot.active for slot in base.slots.layers.values())


def test_nothing_to_merge_is_an_error(base: Base) -> None:
    pair = make_pair(base)
    text = {
        path: layer
        for path, layer in random_lora(base.slots, components="all").layers.items()
        if path.startswith("text_")
    }
    with pytest.raises(ValueError, match="nothing to merge, use the direct method"):
        ziplora(base, [dataclasses.replace(pair, subject=LoRA(text), style=LoRA(text))], ZipLoRAKnobs(steps=1))


def test_draws_are_the_same_everywhere_and_use_every_image() -> None:
    index, noise, timesteps = draw(3, (4, 8, 8), 1000, 10, seed=5)
    assert index.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert noise.shape == (10, 4, 8, 8)
    assert timesteps.min() >= 0
    assert timesteps.max() < 1000
    assert derived_seed(0, "dog") == derived_seed(0, "dog") != derived_seed(1, "dog") != derived_seed(1, "cat")


def test_without_images_the_lora_generates_its_own(base: Base) -> None:
    lora = random_lora(base.slots)
    settings = dataclasses.replace(SETTINGS, draws=5, size=16)
    calibration = calibrate(base, lora, "a dog", [], settings)
    assert calibration.source == "self-generated"
    assert calibration.noisy.shape == (5, 4, 2, 2)
    assert calibrate(base, lora, "a dog", DOG, settings).source == "images"


def test_shared_noise_is_shared(base: Base) -> None:
    shared = make_pair(base, settings=dataclasses.replace(SETTINGS, noise="shared"))
    separate = make_pair(base)
    assert timesteps_of(shared.subject_calibration) == timesteps_of(shared.style_calibration)
    assert timesteps_of(separate.subject_calibration) != timesteps_of(separate.style_calibration)


def timesteps_of(calibration: Calibration | None) -> list[int]:
    assert calibration is not None
    return calibration.timesteps.tolist()


def test_knobs_are_checked() -> None:
    with pytest.raises(ValueError, match="learning_rate is 3"):
        ZipLoRAKnobs(learning_rate=3)
    with pytest.raises(ValueError, match="steps is 0; at least 1"):
        ZipLoRAKnobs(steps=0)
    assert METHODS["ziplora"].calibration(ZipLoRAKnobs(steps=7, batch=2), seed=1) == CalibrationSettings(
        14, 1, "separate", None
    )
    assert "penalty" in METHODS["ziplora"].knob_names
    assert METHODS["direct"].load().__name__ == "direct"


# The combined prompt


def with_prompt(pair: Pair) -> Pair:
    return dataclasses.replace(pair, combined_prompt="a dog in ink")


@pytest.mark.parametrize("components", ["targets", "all"])
def test_combined_targets_are_sums_of_predictions_under_the_combined_prompt(base: Base, components: str) -> None:
    """Each prediction with its own text encoders; `all` trains them too."""
    loras = [random_lora(base.slots, seed=seed, components=components, scale=0.05) for seed in (0, 1)]
    observed = [
        calibrate(base, lora, prompt, INK, SETTINGS) for lora, prompt in zip(loras, ("dog", "ink"), strict=True)
    ]
    pair = with_prompt(Pair(*loras, *observed))  # type: ignore[arg-type]
    combined, direct = (
        combined_calibrations(base, [pair], ComposedKnobs(combined_draws=6, combined_target=target))[0]  # type: ignore[arg-type]
        for target in ("sum", "direct")
    )
    index, source = 3, observed[1]  # in turn: the style's second draw comes fourth
    noisy, at = source.noisy[1:2], source.timesteps[1:2]
    assert torch.equal(combined.noisy[index : index + 1], noisy)
    assert combined.timesteps[index] == at[0]

    @torch.no_grad()
    def predicted(*held: LoRA) -> Tensor:
        base.slots.load([held or [LoRA({})]])
        result = base.predict_noise(noisy, at, base.encode_prompts(["a dog in ink"]))
        base.slots.close()
        return result

    expected = predicted(loras[0]) + predicted(loras[1]) - predicted()
    torch.testing.assert_close(combined.target[index : index + 1], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(direct.target[index : index + 1], predicted(*loras), rtol=0, atol=1e-12)


def test_each_calibration_goes_round_by_itself(base: Base) -> None:
    pair = make_pair(base)
    known = [pair.subject_calibration, pair.style_calibration, pair.subject_calibration]
    _, timesteps, _ = batch([known], 2, 2, draws=3)
    subject, style, combined = (timesteps_of(calibration) for calibration in known)
    assert timesteps[0].tolist() == [
        [subject[1], subject[2]], [style[1], style[2]], [combined[0], combined[1]]
    ]  # fmt: skip


def test_composed_pairs_side_by_side_equal_each_alone_and_lower_their_third_term(base: Base) -> None:
    knobs = ComposedKnobs(steps=6, batch=2, combined_draws=4, combined_target="sum", penalty_weight=0.01)
    pairs = [with_prompt(make_pair(base, seed=seed)) for seed in range(2)]
    together = ziplora(base, pairs, knobs)
    for pair, mine in zip(pairs, together, strict=True):
        alone = ziplora(base, [pair], knobs)[0]
        assert mine.mergers is not None
        assert alone.mergers is not None
        for path, merger in alone.mergers.subject.items():
            torch.testing.assert_close(mine.mergers.subject[path], merger, rtol=0, atol=1e-5)
        assert mine.report["combined_loss"][1] < mine.report["combined_loss"][0]


def test_without_weight_the_combined_term_is_the_paper(base: Base) -> None:
    pair = make_pair(base)  # which has no combined prompt, and needs none
    plain = ziplora(base, [pair], ZipLoRAKnobs(steps=3))[0]
    composed = ziplora(base, [pair], ComposedKnobs(3, 0.01, 0.01, combined_weight=0.0))[0]
    assert plain.mergers is not None
    assert composed.mergers is not None
    assert all(torch.equal(m, composed.mergers.style[path]) for path, m in plain.mergers.style.items())
    assert plain.report == composed.report
    with pytest.raises(ValueError, match=r"needs both calibrations and Pair\.combined_prompt"):
        ziplora(base, [pair], ComposedKnobs(steps=1))


def test_pairs_that_share_a_lora_and_a_prompt_share_its_predictions(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*args: object) -> Tensor:
        calls.append(1)
        return predictions(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("ziplora.composition.predictions", counted)
    one, other = (with_prompt(make_pair(base, seed=seed)) for seed in range(2))
    same_subject = dataclasses.replace(one, style=other.style, style_calibration=other.style_calibration)
    combined_calibrations(base, [one], ComposedKnobs(combined_draws=2, combined_target="sum"))
    assert len(calls) == 6  # on the latents of either, three models
    combined_calibrations(base, [one, same_subject], ComposedKnobs(combined_draws=2, combined_target="sum"))
    # of the second pair, the subject and the base on the subject's latents are known
    assert len(calls) == 6 + 6 + 4


# Where mergers start, and what is kept of a forward pass


def test_mergers_start_where_they_are_told(base: Base) -> None:
    pair = make_pair(base, drop=3)
    given = Mergers(
        *({path: torch.full_like(layer.down[0], value) for path, layer in lora.layers.items()}
          for lora, value in ((pair.subject, 0.5), (pair.style, 0.25)))
    )  # fmt: skip
    merged = ziplora(base, [pair], ZipLoRAKnobs(steps=1, learning_rate=1e-9))  # from 1
    told = Optimization(base, [pair], ZipLoRAKnobs(steps=1, learning_rate=1e-9), initial=[given])
    list(told)
    mergers = told.merged()[0].mergers
    assert mergers is not None
    assert merged[0].mergers is not None
    for path, m in mergers.subject.items():
        torch.testing.assert_close(m, given.subject[path], rtol=0, atol=1e-8)
        torch.testing.assert_close(merged[0].mergers.subject[path], torch.ones_like(m), rtol=0, atol=1e-8)
    assert mergers.style.keys() == given.style.keys()


def test_activation_checkpointing_changes_nothing(base: Base) -> None:
    pair = make_pair(base)
    kept = ziplora(base, [pair], ZipLoRAKnobs(steps=3))[0]
    base.unet.enable_gradient_checkpointing()
    try:
        again = ziplora(base, [pair], ZipLoRAKnobs(steps=3))[0]
    finally:
        base.unet.disable_gradient_checkpointing()
    assert kept.mergers is not None
    assert again.mergers is not None
    for path, merger in kept.mergers.subject.items():
        torch.testing.assert_close(again.mergers.subject[path], merger, rtol=0, atol=1e-9)
