"""`ziplora styledrop`: pictures and a recipe from two concepts, adapters that are used again, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service.cli_styledrop import styledrop
from service.errors import BadInput
from tests.tiny import tiny_amused, tiny_sdxl
from tests.tiny_scorers import tiny_clip
from ziplora.adapter_files import read_adapter
from ziplora.errors import FormatError


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_amused().save_pretrained(root / "amused")
    tiny_sdxl().save_pretrained(root / "sdxl")
    tiny_clip(root / "clip")
    return root


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two pictures of a subject, one with a caption of its own, and one of a style."""
    (tmp_path / "dog").mkdir()
    for i, path in enumerate((tmp_path / "dog/0.png", tmp_path / "dog/1.png", tmp_path / "ink.png")):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 24, 3), np.uint8)).save(path)
    (tmp_path / "dog/1.txt").write_text("a sks dog on a beach\n")
    return tmp_path


def arguments(place: Path, models: Path, **options: Any) -> list[str]:
    given = {
        "base": models / "amused",
        "subject": place / "dog",
        "subject_prompt": "a photo of a sks dog",
        "subject_trigger": "sks dog",
        "style": place / "ink.png",
        "style_prompt": "a house in szn style",
        "style_trigger": "szn style",
        "out": place / "out",
        "train_steps": 2,
        "rank": 2,
        "steps": 2,
        "seed": 7,
    } | options
    return [str(part) for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]


def run(place: Path, models: Path, **options: Any) -> int:
    return styledrop.main(arguments(place, models, **options), standalone_mode=False)


def test_two_rounds_and_the_recipe(place: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, models, feedback_clip=models / "clip", content="a cat", keep=1, per_content=2) == 0
    assert "wrote 1 pictures and recipe.json" in capsys.readouterr().out
    out = place / "out"
    assert Image.open(out / "0-7.png").size == (16, 16)
    assert (out / "feedback/0.txt").read_text() == "a cat in szn style\n"
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["method"] == "styledrop"
    assert recipe["pictures"] == [{"file": "0-7.png", "prompt": "a sks dog in szn style", "seed": 7}]
    assert recipe["adapters"]["subject"]["captions"] == ["a photo of a sks dog", "a sks dog on a beach"]
    assert set(recipe["adapters"]) == {"subject", "style-round-1", "style"}
    assert len(recipe["feedback"]["scores"]) == 1
    _, metadata = read_adapter(out / "style.safetensors")
    assert metadata["ziplora.adapter.images"] == "2"  # the user's and the one that was picked


def test_adapters_are_used_again_and_never_mistaken(
    place: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(place, models) == 0
    files = {name: (place / "out" / f"{name}.safetensors").read_bytes() for name in ("subject", "style")}
    picture = (place / "out/0-7.png").read_bytes()
    capsys.readouterr()
    assert run(place, models, style_weight=40.0, subject_weight=0.0, text=0.0) == 0
    assert capsys.readouterr().out.count("adapter: there already") == 2
    assert {name: (place / "out" / f"{name}.safetensors").read_bytes() for name in files} == files
    assert (place / "out/0-7.png").read_bytes() != picture
    with pytest.raises(BadInput, match=r"subject\.safetensors is there, but was trained otherwise: .* --overwrite it"):
        run(place, models, rank=3)
    assert styledrop.main([*arguments(place, models), "--overwrite"], standalone_mode=False) == 0
    assert (place / "out/0-7.png").read_bytes() == picture
    (place / "out/subject.safetensors").write_bytes(b"broken")
    with pytest.raises(FormatError, match="cannot be read as an adapter"):
        run(place, models)


def test_refusals(place: Path, models: Path) -> None:
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "another kind of base": ({"base": models / "sdxl"}, "incompatible base: .* a StableDiffusionXLPipeline"),
        "no base": ({"base": models / "nowhere"}, "nowhere"),
        "no pictures": ({"subject": models}, "subject: no pictures in"),
        "no such picture": ({"style": place / "none.png"}, "no such picture or directory: .*none.png"),
        "trigger": ({"style_trigger": "ink"}, "style: the prompt 'a house in szn style' does not contain"),
        "template": ({"prompt": "a {thing}"}, "only {subject} and {style} are replaced, not 'thing'"),
        "weight": ({"style_weight": -1}, "the weight style is -1"),
        "learning rate": ({"lr": 0}, "lr is 0"),
        "no clip": ({"feedback_clip": models / "none"}, "none"),
    }
    for options, message in wrong.values():
        with pytest.raises(BadInput, match=message):
            run(place, models, **options)
        assert not (place / "out").exists()
