"""The closed forms against dense least squares on the inputs themselves, and where LoRAs are degenerate."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.random_loras import random_lora
from tests.tiny import tiny_sd15, tiny_sdxl
from ziplora import pocket
from ziplora.base import Base, Conditioning, load_base, resident
from ziplora.calibrate import Calibration, calibrate, predictions
from ziplora.calibration_settings import CalibrationSettings
from ziplora.closed_form import column_mergers, column_solution, solve, ziplora_closed, ziplora_matrix
from ziplora.closed_form_knobs import ClosedKnobs, MatrixKnobs, RefinedKnobs
from ziplora.descent import whitened_lbfgs
from ziplora.formats import read_lora
from ziplora.lora import Layer, LoRA, Mergers, concat, delta, select
from ziplora.merged import Pair
from ziplora.methods import METHODS
from ziplora.module_names import input_of
from ziplora.optimize import Optimization, batch, eq3_losses
from ziplora.optimize_knobs import ZipLoRAKnobs
from ziplora.refine import _to_loss, ziplora_refined
from ziplora.slots import Slots

PICTURES = [Image.linear_gradient("L"), Image.radial_gradient("L")]
SETTINGS = CalibrationSettings(draws=3, seed=0, noise="separate", size=32, moments="inputs+outputs")
BLOCK = "unet.mid_block.attentions.0.transformer_blocks.0"
EVERY_KIND = [f"{BLOCK}.{kind}" for kind in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")]
EVERY_KIND += [path.replace("attn1", "attn2") for path in EVERY_KIND]


@pytest.fixture(scope="module")
def base() -> Base:
    return resident(tiny_sdxl(torch.float64))


@pytest.fixture(scope="module", params=["sdxl", "sd15"])
def either_base(request: pytest.FixtureRequest) -> Base:
    return request.getfixturevalue("base") if request.param == "sdxl" else resident(tiny_sd15(torch.float64))


@pytest.fixture(scope="module")
def pair(either_base: Base) -> Pair:
    """Ranks 3 and 5; each LoRA lacks some layers."""
    subject, style = small_lora(either_base, 3, seed=0), small_lora(either_base, 5, seed=1)
    left, right = [p for p in subject.layers if p not in EVERY_KIND][:2]
    return observed(either_base, select(subject, lambda path: path != right), select(style, lambda path: path != left))


def small_lora(base: Base, rank: int, seed: int = 0, **options: float) -> LoRA:
    """Of the middle block and two layers beside it: a few layers of every kind."""
    whole = random_lora(base.slots, rank, seed, **options)  # type: ignore[arg-type]
    beside = [path for path in whole.layers if not path.startswith("unet.mid")][:2]
    return select(whole, lambda path: path.startswith("unet.mid") or path in beside)


def observed(base: Base, subject: LoRA, style: LoRA, settings: CalibrationSettings = SETTINGS) -> Pair:
    return Pair(
        subject,
        style,
        calibrate(base, subject, "a dog", PICTURES, settings),
        calibrate(base, style, "in ink", PICTURES[:1], settings),
    )


@contextmanager
def inputs_of_layers(base: Base) -> Iterator[dict[str, list[Tensor]]]:
    """What every target reads within the block, as it is."""
    seen: dict[str, list[Tensor]] = {path: [] for path in base.slots.targets}
    hooks = [
        base.slots.layers[path].register_forward_pre_hook(lambda _, args, path=path: seen[path].append(args[0]))
        for path in base.slots.targets
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture(scope="module")
def inputs(either_base: Base, pair: Pair) -> list[dict[str, Tensor]]:
    """[rows, in] of every target, in the run of either teacher."""
    runs = []
    for lora, calibration in ((pair.subject, pair.subject_calibration), (pair.style, pair.style_calibration)):
        assert calibration is not None
        with inputs_of_layers(either_base) as seen, either_base.slots.loaded([[lora]]):
            predictions(either_base, calibration.noisy, calibration.timesteps, calibration.conditioning)
        runs.append({path: torch.cat([x.flatten(0, -2) for x in some]) for path, some in seen.items()})
    return runs


def dense_delta(base: Base, lora: LoRA, path: str) -> Tensor:
    weight = base.slots.layers[path].weight
    return delta(lora.layers[path]) if path in lora.layers else torch.zeros_like(weight)


def weights_of(pair: Pair, path: str, weighted: bool) -> list[float]:
    known = [c.output_weights[path] for c in (pair.subject_calibration, pair.style_calibration)]  # type: ignore[union-attr,index]
    # q and k of a self-attention over a single position have no effect at all
    return [2 * one / sum(known) for one in known] if weighted and sum(known) else [1.0, 1.0]


def paths_to_check(base: Base, pair: Pair) -> list[str]:
    """Every kind of layer of one block, and one that only the subject and one that only the style has."""
    one_sided = [p for p in base.slots.targets if (p in pair.subject.layers) != (p in pair.style.layers)]
    either = [next(p for p in one_sided if p in lora.layers) for lora in (pair.subject, pair.style)]
    return [*EVERY_KIND, *either]


@pytest.mark.parametrize("weighted", [False, True])
def test_column_form_is_the_dense_least_squares_solution(
    either_base: Base, pair: Pair, inputs: list[dict[str, Tensor]], weighted: bool
) -> None:
    ridge = 1e-3
    solution = column_solution(either_base, pair, ridge, weighted)
    assert solution.n_hard == 0
    for path in paths_to_check(either_base, pair):
        deltas = [dense_delta(either_base, lora, path) for lora in (pair.subject, pair.style)]
        rows, right = [], []
        for q, weight in enumerate(weights_of(pair, path, weighted)):
            x = inputs[q][path]
            scale = (weight / len(x)) ** 0.5
            # row (n, out) of ΔW·diag(x_n), both LoRAs side by side, has the mergers as unknowns
            rows.append(torch.cat([x[:, None] * d[None] for d in deltas], 2).flatten(0, 1) * scale)
            right.append((x @ deltas[q].T).flatten() * scale)
        system, wanted = torch.cat(rows), torch.cat(right)
        pull = (ridge * system.square().sum(0).mean()).sqrt()
        identity = torch.eye(system.shape[1], dtype=torch.float64)
        expected = torch.linalg.lstsq(
            torch.cat([system, pull * identity]), torch.cat([wanted, pull * torch.ones_like(identity[0])])
        ).solution.unflatten(0, (2, -1))
        for part, found in enumerate((solution.mergers.subject, solution.mergers.style)):
            if path in found:
                torch.testing.assert_close(found[path], expected[part], rtol=0, atol=1e-8, msg=path)


def test_matrix_form_is_the_dense_least_squares_solution(
    either_base: Base, pair: Pair, inputs: list[dict[str, Tensor]]
) -> None:
    ridge = 1e-3
    merged = ziplora_matrix(either_base, [pair], MatrixKnobs(ridge=ridge, output_weights=False))[0].lora()
    for path in paths_to_check(either_base, pair):
        deltas = [dense_delta(either_base, lora, path) for lora in (pair.subject, pair.style)]
        scaled = [x[path] / len(x[path]) ** 0.5 for x in inputs]
        pull = (ridge * torch.cat(scaled).square().sum(0).mean()).sqrt()
        identity = pull * torch.eye(deltas[0].shape[1], dtype=torch.float64)
        system = torch.cat([*scaled, identity])
        wanted = torch.cat([*(x @ d.T for x, d in zip(scaled, deltas, strict=True)), identity @ sum(deltas).T])  # type: ignore[union-attr]
        expected = torch.linalg.lstsq(system, wanted).solution.T
        torch.testing.assert_close(delta(merged.layers[path]), expected, rtol=0, atol=1e-8, msg=path)


def test_matrix_form_keeps_rank_and_weighs_outputs(either_base: Base, pair: Pair) -> None:
    merged, plain = (
        ziplora_matrix(either_base, [pair], MatrixKnobs(output_weights=weighted))[0] for weighted in (True, False)
    )
    assert merged.mergers is None
    for mine, source in ((merged.subject, pair.subject), (merged.style, pair.style)):
        assert {path: layer.rank for path, layer in mine.layers.items()} == {
            path: layer.rank for path, layer in source.layers.items()
        }
        assert all(torch.equal(layer.up, source.layers[path].up) for path, layer in mine.layers.items())
    path = EVERY_KIND[0]
    assert not torch.allclose(merged.subject.layers[path].down, plain.subject.layers[path].down)


# A model of one layer, whose end-to-end loss is the layer's own


class OneLayer(nn.Module):
    """y = W·x on every value of the latent; what a UNet would be if it were a single attention linear."""

    def __init__(self) -> None:
        super().__init__()
        block = SimpleNamespace(attn1=nn.Module())
        self.mid_block = nn.Module()
        self.mid_block.attentions = nn.ModuleList([nn.Module()])
        self.mid_block.attentions[0].transformer_blocks = nn.ModuleList([nn.Module()])
        self.mid_block.attentions[0].transformer_blocks[0].attn1 = block.attn1
        block.attn1.to_q = nn.Linear(6, 6, bias=False, dtype=torch.float64)
        self.dtype, self.device = torch.float64, torch.device("cpu")

    def forward(self, noisy: Tensor, *_: object, **__: object) -> tuple[Tensor]:
        layer = self.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
        return (layer(noisy.flatten(2).mT).mT.reshape(noisy.shape),)


def one_layer_pair() -> tuple[Base, Pair]:
    unet = OneLayer().requires_grad_(False)
    base = Base(SimpleNamespace(unet=unet, vae_scale_factor=8), "sd15", Slots({"unet": unet}), torch.ones(1000))
    generator = torch.Generator().manual_seed(0)
    loras = [random_lora(base.slots, rank, seed) for seed, rank in enumerate((2, 3))]
    calibrations = []
    for lora in loras:
        noisy = torch.randn(4, 6, 3, 3, generator=generator, dtype=torch.float64)
        rows = noisy.flatten(2).mT.flatten(0, 1)
        nothing, path = torch.zeros(1, 1, 1, dtype=torch.float64), next(iter(base.slots.targets))
        with base.slots.loaded([[lora]]):
            target = base.predict_noise(noisy, torch.zeros(4), Conditioning(nothing))
        calibrations.append(
            Calibration("", noisy, torch.zeros(4), target, Conditioning(nothing), "images",
                        {path.rpartition(".")[0]: rows.mT @ rows / len(rows)}, {path: 1 / 6})
        )  # fmt: skip
    return base, Pair(*loras, *calibrations)


def test_gradient_of_the_loss_vanishes_at_the_solution_of_a_one_layer_model() -> None:
    base, pair = one_layer_pair()
    knobs = ZipLoRAKnobs(penalty_weight=0.0, batch=4)

    def gradient(mergers: Mergers) -> float:
        base.slots.load([[pair.subject, pair.style]])
        parameters = base.slots.attach_mergers()
        with torch.no_grad():
            for path, parameter in parameters.items():
                parameter.copy_(torch.stack([mergers.subject[path], mergers.style[path]])[None])
        noisy, timesteps, target = batch([(pair.subject_calibration, pair.style_calibration)], 0, 4)
        conditioning = Conditioning(torch.zeros(8, 1, 1, dtype=torch.float64))
        eq3_losses(base, parameters, noisy, timesteps, conditioning, target, knobs).reconstruction.sum().backward()
        base.slots.close()
        return max(float(parameter.grad.abs().max()) for parameter in parameters.values())  # type: ignore[union-attr]

    solved = column_solution(base, pair, ridge=1e-12).mergers
    ones = Mergers(*({path: torch.ones_like(m) for path, m in half.items()} for half in (solved.subject, solved.style)))
    assert gradient(ones) > 1e-3
    assert gradient(solved) < 1e-10 * gradient(ones)


def test_whitened_lbfgs_solves_a_one_layer_model() -> None:
    """Its factors are those of the loss itself there: the first step is Newton's, up to the ridge; of all other models
    it is a guess that the next steps correct."""
    base, pair = one_layer_pair()
    knobs = RefinedKnobs(optimizer="lbfgs", steps=2, batch=4, draws=4, ridge=1e-9)
    closed = column_solution(base, pair, ridge=1e-12).mergers
    start = column_solution(base, pair, knobs.ridge, weighted=True, keep_factors=True)
    halfway = Mergers(*({p: (m + 1) / 2 for p, m in half.items()} for half in (closed.subject, closed.style)))
    optimization = Optimization(
        base, [pair], knobs.engine(), initial=[halfway], descent=whitened_lbfgs([_to_loss(pair, start)])
    )
    steps = list(optimization)
    for path, m in closed.subject.items():
        torch.testing.assert_close(optimization.mergers[0].subject[path], m, rtol=0, atol=1e-5)
    assert steps[-1].subject_loss < steps[0].subject_loss


# Degenerate pairs


def objective(base: Base, pair: Pair, merged: LoRA) -> Tensor:
    """J summed over layers, w = 1: Σ_q tr(D G_q Dᵀ), D what is wrong in run q."""
    total = torch.zeros((), dtype=torch.float64)
    for path in merged.layers:
        for lora, calibration in ((pair.subject, pair.subject_calibration), (pair.style, pair.style_calibration)):
            wrong = delta(merged.layers[path]) - dense_delta(base, lora, path)
            total += ((wrong @ calibration.moments[input_of(path)]) * wrong).sum()  # type: ignore[union-attr,index]
    return total


def scaled_up(lora: LoRA, factor: float) -> LoRA:
    return LoRA({path: Layer(layer.down, layer.up * factor) for path, layer in lora.layers.items()})


@pytest.fixture(scope="module")
def degenerate_pairs(base: Base) -> dict[str, Pair]:
    subject, style = small_lora(base, 3, seed=0), small_lora(base, 3, seed=1)
    one, other = (observed(base, lora, style) for lora in (subject, small_lora(base, 1, seed=2)))
    left = {path: layer for path, layer in subject.layers.items() if ".attn1." in path}
    right = {path: layer for path, layer in style.layers.items() if ".attn2." in path}
    flat = {name: torch.ones_like(g) for name, g in one.subject_calibration.moments.items()}  # type: ignore[union-attr]
    none = {name: torch.zeros_like(g) for name, g in flat.items()}

    def with_moments(moments: dict[str, Tensor]) -> Pair:
        both = (one.subject_calibration, one.style_calibration)
        return Pair(subject, style, *(dataclasses.replace(c, moments=moments) for c in both))  # type: ignore[type-var]

    return {
        "zero delta": dataclasses.replace(one, subject=scaled_up(subject, 0.0)),
        "both zero": dataclasses.replace(one, subject=scaled_up(subject, 0.0), style=scaled_up(style, 0.0)),
        "identical": dataclasses.replace(one, style=subject),
        "opposite": dataclasses.replace(one, style=scaled_up(subject, -1.0)),
        "no common layer": dataclasses.replace(one, subject=LoRA(left), style=LoRA(right)),
        "rank 1": other,
        "rank 256": dataclasses.replace(one, subject=small_lora(base, 256, seed=3)),
        "moments of rank 1": with_moments(flat),
        "moments of rank 0": with_moments(none),
    }


def test_degenerate_pairs_are_never_worse_than_the_direct_merge(base: Base, degenerate_pairs: dict[str, Pair]) -> None:
    for name, pair in degenerate_pairs.items():
        direct = objective(base, pair, METHODS["direct"].load()(base, [pair], None)[0].lora())
        for method, knobs in (("ziplora-closed", ClosedKnobs()), ("ziplora-matrix", MatrixKnobs(output_weights=False))):
            merged = METHODS[method].load()(base, [pair], knobs)[0]
            assert all(torch.isfinite(layer.down).all() for layer in merged.lora().layers.values()), name
            assert objective(base, pair, merged.lora()) <= direct * (1 + 1e-9), (name, method)
            assert merged.lora().layers.keys() == pair.subject.layers.keys() | pair.style.layers.keys()


def test_where_nothing_conflicts_the_direct_merge_stays(base: Base, degenerate_pairs: dict[str, Pair]) -> None:
    pairs = degenerate_pairs
    for name in ("both zero", "moments of rank 0"):
        mergers = ziplora_closed(base, [pairs[name]], ClosedKnobs())[0].mergers
        assert mergers is not None
        assert all(torch.equal(m, torch.ones_like(m)) for m in mergers.subject.values()), name
    zero = pairs["zero delta"]  # the style meets no rival; only in the subject's run it is unwelcome
    twice = dataclasses.replace(zero, subject_calibration=_without_inputs(zero.subject_calibration))
    merged = ziplora_matrix(base, [twice], MatrixKnobs(output_weights=False))[0]
    for path, layer in merged.style.layers.items():
        torch.testing.assert_close(layer.down, zero.style.layers[path].down, rtol=0, atol=1e-9)


def _without_inputs(calibration: Calibration | None) -> Calibration:
    assert calibration is not None
    assert calibration.moments is not None
    return dataclasses.replace(calibration, moments={n: torch.zeros_like(g) for n, g in calibration.moments.items()})


def test_identical_loras_merge_to_what_either_is(base: Base) -> None:
    """Half of each: what the direct merge doubles."""
    lora = small_lora(base, 3, seed=0)
    pair = observed(base, lora, lora)
    pair = dataclasses.replace(pair, style_calibration=pair.subject_calibration)
    merged = ziplora_matrix(base, [pair], MatrixKnobs(ridge=1e-9))[0].lora()
    assert objective(base, pair, merged) < 1e-6 * objective(base, pair, ziplora_direct(pair))
    closed = ziplora_closed(base, [pair], ClosedKnobs(ridge=1e-9))[0]
    assert objective(base, pair, closed.lora()) < 1e-6 * objective(base, pair, ziplora_direct(pair))


def ziplora_direct(pair: Pair) -> LoRA:
    return concat([pair.subject, pair.style])


# The solver


def test_layers_that_fp32_cannot_solve_are_solved_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))[0]
    hard = (vectors * torch.logspace(0, -9, 40, dtype=torch.float64)) @ vectors.mT
    system = torch.stack([torch.eye(40, dtype=torch.float64), hard]).float()
    right = torch.randn(2, 40, 1, generator=generator)
    right[1] = system[1] @ right[1]
    solution, factor, n_hard = solve(system, right)
    assert n_hard == 1
    torch.testing.assert_close(solution[0], right[0])
    assert (system[1] @ solution[1] - right[1]).norm() < 1e-3 * right[1].norm()
    assert torch.isfinite(factor).all()


def test_what_is_not_finite_is_an_error(base: Base) -> None:
    pair = observed(base, small_lora(base, 2, seed=0), small_lora(base, 2, seed=1))
    broken = dataclasses.replace(pair, subject=scaled_up(pair.subject, float("nan")))
    with pytest.raises(ArithmeticError, match="not finite: is a LoRA broken"):
        ziplora_closed(base, [broken], ClosedKnobs())


def test_calibrations_without_moments_are_refused(base: Base) -> None:
    lora = small_lora(base, 2)
    pair = observed(base, lora, lora, dataclasses.replace(SETTINGS, moments="none"))
    with pytest.raises(ValueError, match="calibrate with moments 'inputs'"):
        ziplora_closed(base, [pair], ClosedKnobs())
    with pytest.raises(ValueError, match="needs calibrations of both"):
        ziplora_matrix(base, [Pair(lora, lora)], MatrixKnobs(output_weights=False))
    inputs_only = observed(base, lora, lora, dataclasses.replace(SETTINGS, moments="inputs"))
    with pytest.raises(ValueError, match=r"moments 'inputs\+outputs'"):
        ziplora_matrix(base, [inputs_only], MatrixKnobs())


def test_batches_do_not_matter(either_base: Base, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    base = either_base
    whole = column_solution(base, pair, 1e-3, weighted=True).mergers
    matrix = ziplora_matrix(base, [pair], MatrixKnobs())[0].lora()
    monkeypatch.setattr("ziplora.closed_form.SYSTEM_BYTES", 1)
    single = column_solution(base, pair, 1e-3, weighted=True).mergers
    for path, m in whole.subject.items():
        torch.testing.assert_close(single.subject[path], m, rtol=0, atol=1e-9)
    one_by_one = ziplora_matrix(base, [pair], MatrixKnobs())[0].lora()
    for path, layer in matrix.layers.items():
        torch.testing.assert_close(one_by_one.layers[path].down, layer.down, rtol=0, atol=1e-9)


def test_single_precision_is_enough() -> None:
    down, gram, moments = (
        torch.randn(4, *shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        for i, shape in enumerate([(2, 3, 32), (6, 8), (2, 32, 20)])
    )
    gram, moments = gram @ gram.mT, moments @ moments.mT  # of rank 20: only the ridge makes them regular
    weights = torch.ones(4, 2, dtype=torch.float64)
    exact = column_mergers(down, gram, moments, weights, 1e-3)[0]
    single, _, n_hard = column_mergers(down.float(), gram.float(), moments.float(), weights.float(), 1e-3)
    assert n_hard == 0
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-3)


# Refinement


def loss_at(base: Base, pair: Pair, mergers: Mergers | None) -> float:
    """Both terms of Eq. 3 on the draws that refinement uses."""
    optimization = Optimization(
        base, [pair], ZipLoRAKnobs(steps=1, batch=2, draws=2), initial=None if mergers is None else [mergers]
    )
    step = next(iter(list(optimization)))
    return float(step.subject_loss + step.style_loss)


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_refinement_starts_at_the_closed_form_and_lowers_its_loss(base: Base, optimizer: str) -> None:
    settings = dataclasses.replace(SETTINGS, draws=2)
    pairs = [
        observed(base, small_lora(base, 3, seed=2 * i), small_lora(base, 4, seed=2 * i + 1), settings) for i in range(2)
    ]
    knobs = RefinedKnobs(steps=8, batch=2, draws=2, optimizer=optimizer, learning_rate=0.003)  # type: ignore[arg-type]
    together = ziplora_refined(base, pairs, knobs)
    for pair, mine in zip(pairs, together, strict=True):
        closed = ziplora_closed(base, [pair], ClosedKnobs(output_weights=True))[0].mergers
        alone = ziplora_refined(base, [pair], knobs)[0].mergers
        assert closed is not None
        assert alone is not None
        assert mine.mergers is not None
        for path, merger in alone.subject.items():
            torch.testing.assert_close(mine.mergers.subject[path], merger, rtol=0, atol=1e-5)
        losses = [loss_at(base, pair, mergers) for mergers in (None, closed, mine.mergers)]
        assert losses[0] > losses[1] > losses[2]
        assert mine.report["subject_loss"][0] + mine.report["style_loss"][0] == pytest.approx(losses[1])
        if optimizer == "lbfgs":  # whose last evaluation is of what it answers with, or of what it takes back
            assert mine.report["subject_loss"][1] + mine.report["style_loss"][1] == pytest.approx(losses[2])


# The shipped pocket world


@torch.no_grad()
def held_out_loss(base: Base, pair: Pair, merged: LoRA) -> float:
    total = 0.0
    with base.slots.loaded([[merged]]):
        for calibration in (pair.subject_calibration, pair.style_calibration):
            assert calibration is not None
            predicted = predictions(base, calibration.noisy, calibration.timesteps, calibration.conditioning)
            total += (predicted - calibration.target).square().mean().item()
    return total


def test_the_closed_forms_beat_the_direct_merge_of_trained_loras() -> None:
    """On draws that nothing was fitted to. Which closed form is the better one is a question for a bench."""
    base = load_base(pocket.path())
    concepts = (pocket.SUBJECTS[0], pocket.STYLES[0])
    loras = [read_lora(concept.lora).lora for concept in concepts]

    def pair(settings: CalibrationSettings) -> Pair:
        calibrations = [
            calibrate(base, lora, concept.prompt, [Image.open(image) for image in concept.images], settings)
            for lora, concept in zip(loras, concepts, strict=True)
        ]
        return Pair(*loras, *calibrations)

    known = pair(CalibrationSettings(16, 0, "separate", None, "inputs+outputs"))
    held_out = pair(CalibrationSettings(16, 1, "separate", None))
    direct = held_out_loss(base, held_out, ziplora_direct(known))
    losses = {
        name: held_out_loss(base, held_out, METHODS[name].load()(base, [known], METHODS[name].knobs())[0].lora())
        for name in ("ziplora-closed", "ziplora-matrix", "ziplora-refined")
    }
    assert max(losses.values()) < 0.7 * direct
    assert losses["ziplora-refined"] < losses["ziplora-closed"]
