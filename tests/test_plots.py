"""Figures as files, from the command line."""

from pathlib import Path

import click
import pytest
import torch
from PIL import Image

from service.cli import cli
from service.errors import BadInput
from tests.lora_files import random_lora
from tests.test_diagnose import SHAPES, K, Q
from ziplora.errors import ShapeMismatch
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


def test_what_a_published_merge_shows_is_merged_already(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mergers = ("--mergers", files / "mergers.safetensors")
    inspect(files / "merged.safetensors", "--plot", files / "figure.png")
    alone = capsys.readouterr().out
    inspect(files / "merged.safetensors", "--plot", files / "figure.png", *mergers)
    said = [line for line in capsys.readouterr().out.splitlines() if "interference" in line]
    assert said == [line for line in alone.splitlines() if "interference" in line]
    assert said[1].startswith("  interference merged: ")


def test_a_merge_whose_style_has_no_rows_of_its_own_is_one_lora(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = random_lora({Q: SHAPES[Q]}, rank=3, seed=0)
    content = write_kohya(lora, metadata={"ziplora.subject_rank": "3"}, architecture="sdxl")
    (files / "svd.safetensors").write_bytes(content)
    inspect(files / "svd.safetensors", "--plot", files / "figure.png")
    assert "svd: " in capsys.readouterr().out


def test_what_cannot_be_shown_or_written_is_said(files: Path) -> None:
    text = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (8, 8)}
    content = write_kohya(random_lora(text, rank=2, seed=0), metadata={}, architecture="sdxl")
    (files / "text.safetensors").write_bytes(content)
    with pytest.raises(BadInput, match=r"text\.safetensors: no attention layer"):
        inspect(files / "text.safetensors", "--plot", files / "figure.png")
    more = ("--beside", files / "ink.safetensors", "--mergers", files / "mergers.safetensors")
    (files / "q.safetensors").write_bytes(
        write_kohya(random_lora({Q: SHAPES[Q]}, rank=3, seed=0), metadata={}, architecture="sdxl")
    )
    with pytest.raises(ShapeMismatch, match=r"the subject's mergers have 1 modules that it lacks"):
        inspect(files / "q.safetensors", "--plot", files / "figure.png", *more)
    with pytest.raises(click.UsageError, match=r"nowhere/figure\.png cannot be written: No such file"):
        inspect(files / "dog.safetensors", "--plot", files / "nowhere" / "figure.png")


def test_other_suffixes_are_refused(files: Path) -> None:
    with pytest.raises(click.UsageError, match=r"figures are written as \.png or \.svg"):
        inspect(files / "dog.safetensors", "--plot", files / "figure.gif")
    assert not (files / "figure.gif").exists()
