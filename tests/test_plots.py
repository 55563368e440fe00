"""Figures as files, from the command line."""

from pathlib import Path

import click
import pytest
import torch
from PIL import Image

from service.cli import cli
from tests.lora_files import random_lora
from tests.test_diagnose import SHAPES, K, Q
from ziplora.formats import write_kohya, write_mergers
from ziplora.lora import Mergers, stacked


@pytest.fixture
def files(tmp_path: Path) -> Path:
    shapes = {path: shape for path, shape in SHAPES.items() if path in (Q, K)}
    subject, style = (random_lora(shapes, rank=3, seed=seed) for seed in (0, 1))
    for name, lora in (("dog", subject), ("ink", style)):
        (tmp_path / f"{name}.safetensors").write_bytes(write_kohya(lora, metadata={}, architecture="sdxl"))
    merged = write_kohya(stacked([subject, style]), metadata={"ziplora.subject_rank": "3"}, architecture="sdxl")
    (tmp_path / "merged.safetensors").write_bytes(merged)
    m = {path: torch.linspace(0, 1, shape[1]) for path, shape in shapes.items()}
    (tmp_path / "mergers.safetensors").write_bytes(write_mergers(Mergers(m, {p: 1 - v for p, v in m.items()}), {}))
    return tmp_path


def inspect(*arguments: object) -> None:
    cli.main(["inspect", *map(str, arguments)], standalone_mode=False)


def test_two_loras_and_their_mergers(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--beside", files / "ink.safetensors", "--mergers", files / "mergers.safetensors")
    inspect(files / "dog.safetensors", "--plot", files / "figure.png", *more)
    for name in ("figure", "figure-interference", "figure-mergers"):
        with Image.open(files / f"{name}.png") as picture:
            assert picture.width > 500
            assert len(picture.convert("L").getcolors(300)) > 20  # something is drawn
    said = capsys.readouterr().out
    assert "dog: " in said
    assert "of ‖ΔW‖² are left; effective rank" in said
    assert "interference merged: 0." in said
    assert "cosine of m_c and m_s: 0." in said


def test_a_merge_is_taken_apart_and_equal_content_gives_equal_figures(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        inspect(files / "merged.safetensors", "--plot", files / f"{name}.svg")
    assert "style half: " in capsys.readouterr().out
    assert (files / "one.svg").read_bytes() == (files / "two.svg").read_bytes()
    assert b"<svg" in (files / "one-interference.svg").read_bytes()


def test_other_suffixes_are_refused(files: Path) -> None:
    with pytest.raises(click.UsageError, match=r"figures are written as \.png or \.svg"):
        inspect(files / "dog.safetensors", "--plot", files / "figure.gif")
    assert not (files / "figure.gif").exists()
