"""The table of methods: every row can be loaded, and says what it needs and costs."""

from dataclasses import replace

import pytest

from ziplora.calibration_settings import CalibrationSettings, Passes
from ziplora.closed_form_knobs import ClosedKnobs, MatrixKnobs, RefinedKnobs
from ziplora.methods import METHODS
from ziplora.optimize_knobs import ComposedKnobs, ZipLoRAKnobs
from ziplora.styledrop_knobs import StyleDropKnobs


@pytest.mark.parametrize("name", METHODS)
def test_every_row_can_be_loaded_and_has_defaults(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    assert callable(method.load())
    knobs = method.knobs()
    assert knobs == replace(knobs)
    assert method.load().__doc__
    assert method.file == (not method.instead)


def test_what_the_methods_observe() -> None:
    wanted = {name: method.calibration(method.knobs(), 3) for name, method in METHODS.items()}
    assert wanted["direct"] is None
    assert wanted["ziplora"] == wanted["ziplora-composed"] == CalibrationSettings(100, 3, "separate", None, "none")
    assert wanted["ziplora-closed"] == CalibrationSettings(16, 3, "separate", None, "inputs")
    assert wanted["ziplora-matrix"] == CalibrationSettings(16, 3, "separate", None, "inputs+outputs")
    assert wanted["ziplora-refined"] == CalibrationSettings(32, 3, "separate", None, "inputs+outputs")


def test_what_a_pair_costs_in_model_passes() -> None:
    passes = {name: method.passes(method.knobs()) for name, method in METHODS.items()}
    assert {name: some for name, some in passes.items() if some != Passes()} == {
        "ziplora": Passes(200, 0),
        "ziplora-refined": Passes(80, 0),
        "ziplora-composed": Passes(300, 32),
        "joint": Passes(1000, 0),
    }
    assert ComposedKnobs(combined_target="sum", combined_draws=10, steps=2).passes() == Passes(6, 30)
    assert ComposedKnobs(combined_weight=0.0).passes() == Passes(200, 0)
    assert {name for name, method in METHODS.items() if method.flop is None} == {
        "direct", "ziplora", "ziplora-composed", "joint", "styledrop"
    }  # fmt: skip


def test_the_combined_prompt_is_rendered_for_those_who_look_at_it() -> None:
    composed = METHODS["ziplora-composed"]
    assert composed.combined_prompt(ComposedKnobs(), "sks dog", "szn ink style") == "a sks dog in szn ink style"
    assert METHODS["ziplora"].combined_prompt(ZipLoRAKnobs(), "a", "b") is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ComposedKnobs(combined_weight=-1), "combined_weight is at least 0"),
        (lambda: ComposedKnobs(combined_draws=3), "combined_draws is 3; an even number from 2"),
        (lambda: ComposedKnobs(combined_prompt="a {subject}"), r"a template with \{subject\} and \{style\}"),
        (lambda: ComposedKnobs(combined_prompt="{subject} {style"), r"a template with \{subject\} and \{style\}"),
        (lambda: ComposedKnobs(combined_prompt="{subject:3} {style}"), r"a template with \{subject\} and \{style\}"),
        (lambda: ComposedKnobs(steps=0), "steps is 0; at least 1"),
        (lambda: StyleDropKnobs(rank=0), "rank is 0; at least 1"),
        (lambda: StyleDropKnobs(style_weight=-1), "the weight style is -1; a finite number, at least 0"),
        (lambda: StyleDropKnobs(sample_steps=0), "sample_steps is 0; at least 1"),
        (lambda: ClosedKnobs(draws=0), "draws is 0; at least 1"),
        (lambda: MatrixKnobs(ridge=0), "ridge is 0; above 0"),
        (lambda: RefinedKnobs(steps=0), "steps is 0; at least 1"),
        (lambda: RefinedKnobs(optimizer="lbfgs", output_weights=False), "output_weights is off"),
        (lambda: RefinedKnobs(optimizer="lbfgs", steps=1), "steps is 1; at least 2"),
        (lambda: RefinedKnobs(optimizer="lbfgs", batch=64), "batch is 64, draws 32"),
    ],
)
def test_knobs_are_checked(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
