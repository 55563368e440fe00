"""`ziplora train` as a user runs it: from a directory of pictures to a LoRA, through kills, and its refusals."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests.commands import started, wait_until, ziplora
from tests.grid import Grid
from ziplora import formats
from ziplora.layouts import inspect_file

PROMPT, TRIGGER = "a photo of sks gem", "sks gem"


@pytest.fixture
def place(grid: Grid) -> Path:
    """A base, three pictures and a note beside them."""
    pictures = grid.root / "gem"
    pictures.mkdir()
    for id in ("dog", "cat", "owl"):
        shutil.copy(grid.root / f"{id}.png", pictures)
    (pictures / "notes.txt").write_text("from the garden")
    return grid.root


def arguments(place: Path, out: str = "gem.safetensors", **options: object) -> list[object]:
    given = {"base": place / "base", "prompt": PROMPT, "trigger": TRIGGER, "rank": 2, "steps": 4, "lr": 1e-3}
    given |= {"out": place / out, **options}
    return [
        "train",
        place / "gem",
        *(part for name, value in given.items() for part in (f"--{name}".replace("_", "-"), value)),
    ]


def test_from_pictures_to_a_lora_that_knows_how_it_was_made(place: Path) -> None:
    options = {"class_prompt": "a photo of a gem", "class_images": 1, "preview": TRIGGER, "preview_every": 2}
    done = ziplora(*arguments(place, **options, preview_steps=1))
    assert done.returncode == 0, done.stderr
    assert "training on 3 pictures" in done.stdout
    assert "not looked at: notes.txt" in done.stdout
    assert re.search(r"step 4 of 4: loss \d\.\d{4}", done.stdout)
    assert "rank 2, trigger 'sks gem'" in done.stdout
    assert {path.name for path in (place / "gem-previews").iterdir()} == {"step-00002-0.png", "step-00004-0.png"}
    assert Image.open(place / "gem-previews/step-00004-0.png").size == (64, 64)
    assert not list(place.glob("gem.safetensors.*"))

    seen = inspect_file(place / "gem.safetensors")
    assert (seen.n_targets, seen.triggers[0], seen.refusals) == (176, "sks gem", ())
    inspected = ziplora("inspect", place / "gem.safetensors")
    assert inspected.returncode == 0, inspected.stderr
    assert "sks gem" in inspected.stdout
    file = formats.read_lora(place / "gem.safetensors")
    assert file.metadata["ziplora.train.prompt"] == PROMPT
    assert file.metadata["ziplora.train.step"] == "4"
    assert any(bool(layer.up.any()) for layer in file.lora.layers.values())

    again = ziplora(*arguments(place, **options, preview_steps=1))
    assert again.returncode == 0, again.stderr
    assert "nothing to do: " in again.stdout
    assert "is there already, trained like this to the end (4 steps)" in again.stdout
    other = ziplora(*arguments(place, **options, steps=5))
    assert other.returncode == 2
    assert "was trained with other steps: name another, or --overwrite it" in other.stderr


def test_a_caption_beside_a_picture_takes_the_place_of_the_prompt(place: Path) -> None:
    (place / "gem/cat.txt").write_text("sks gem in oil style")
    done = ziplora(*arguments(place, steps=1))
    assert done.returncode == 0, done.stderr
    assert "training on 3 pictures" in done.stdout
    assert "; 1 with captions of their own; not looked at: notes.txt" in done.stdout
    (place / "gem/cat.txt").write_text("a cat")
    refused(ziplora(*arguments(place)), "cat.txt, 'a cat', does not contain the trigger 'sks gem'")


def test_killed_and_run_again_gives_the_bytes_of_a_training_in_one_go(place: Path) -> None:
    whole = ziplora(*arguments(place, "whole/gem.safetensors", steps=8))
    assert whole.returncode == 0, whole.stderr

    command = arguments(place, "parts/gem.safetensors", steps=8, save_every=1)
    checkpoint = place / "parts/gem.safetensors.training"
    running = started(*command)
    wait_until(checkpoint.exists)
    first = checkpoint.stat().st_mtime_ns
    wait_until(lambda: checkpoint.stat().st_mtime_ns != first)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not (place / "parts/gem.safetensors").exists()

    resumed = ziplora(*command)
    assert resumed.returncode == 0, resumed.stderr
    found = re.search(r"going on after step (\d+), from ", resumed.stdout)
    assert found, resumed.stdout
    assert 0 < int(found[1]) < 8
    assert (place / "parts/gem.safetensors").read_bytes() == (place / "whole/gem.safetensors").read_bytes()
    assert not checkpoint.exists()


def test_ctrl_c_saves_the_step_and_says_how_to_go_on(place: Path) -> None:
    command = arguments(place, steps=50, save_every=50)
    running = started(*command)
    assert running.stdout is not None
    while "step 5 of" not in running.stdout.readline():  # it is in its steps, not still loading
        assert running.poll() is None
    os.killpg(running.pid, signal.SIGINT)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 130, output
    assert re.search(r"interrupted after step \d+ of 50, which is saved\. To go on: ziplora train ", output)
    assert "Traceback" not in output

    changed = ziplora(*arguments(place, steps=6))
    assert changed.returncode == 2
    assert "is of a training with other steps: " in changed.stderr
    (place / "gem.safetensors.training").write_bytes(b"torn")
    torn = ziplora(*command)
    assert torn.returncode == 2
    assert "gem.safetensors.training cannot be read: remove it, or give --overwrite" in torn.stderr


BAD = [
    ({"prompt": "a photo of a gem"}, "the prompt 'a photo of a gem' does not contain the trigger 'sks gem'"),
    ({"trigger": " "}, "does not contain the trigger ' '"),
    ({"base": "nobody/nothing"}, "base nobody/nothing is no directory and not in the local hub cache"),
    ({"base": "/no/such/base"}, "base /no/such/base does not exist; expected a diffusers directory, s3:"),
    ({"size": 36}, "36 pixels do not fit the base; expected a multiple of 8"),
    ({"lr": "nan"}, "lr is nan; it must be a finite number above 0"),
    ({"rank": 0}, "'--rank': 0 is not in the range"),
    ({"out": "gem.bin"}, "gem.bin does not end in .safetensors"),
    ({"out": "/proc/nowhere/gem.safetensors"}, "/proc/nowhere"),
]


@pytest.mark.parametrize(("options", "text"), BAD)
def test_bad_input_is_one_line(place: Path, options: dict[str, object], text: str) -> None:
    refused(ziplora(*arguments(place, **options)), text)


def test_no_pictures_one_unreadable_and_no_such_directory(place: Path) -> None:
    (place / "gem/cat.png").write_bytes((place / "gem/cat.png").read_bytes()[:200])
    refused(ziplora(*arguments(place)), f"{place / 'gem/cat.png'} is damaged")
    for path in (place / "gem").glob("*.png"):
        path.unlink()
    refused(ziplora(*arguments(place)), f"no pictures in {place / 'gem'}: expected files ending in .png")
    shutil.rmtree(place / "gem")
    refused(ziplora(*arguments(place)), f"no such picture or directory: {place / 'gem'}")


def test_a_file_that_is_not_ours_is_left_alone(place: Path) -> None:
    before = (place / "dog.safetensors").read_bytes()
    refused(
        ziplora(*arguments(place, "dog.safetensors")), "is there and was made otherwise: name another, or --overwrite"
    )
    assert (place / "dog.safetensors").read_bytes() == before
    (place / "no.safetensors").write_bytes(b"not a LoRA")
    refused(ziplora(*arguments(place, "no.safetensors")), "is there and no LoRA file")
    replaced = ziplora(*arguments(place, "dog.safetensors", steps=1), "--overwrite")
    assert replaced.returncode == 0, replaced.stderr
    assert (place / "dog.safetensors").read_bytes() != before


def test_out_of_memory_says_what_to_lower(place: Path) -> None:
    done = ziplora(*arguments(place, batch=10**15))  # more than any machine can address
    assert done.returncode == 1, done.stderr
    assert (
        f"out of memory at batch {10**15}, the base's own size, rank 2: lower --batch or --size or --rank, or give"
        in (done.stderr)
    )
    assert "Traceback" not in done.stderr
    assert not (place / "gem.safetensors").exists()


def test_a_learning_rate_that_blows_up_is_told(place: Path) -> None:
    done = ziplora(*arguments(place, lr=1e30, steps=20))
    assert done.returncode == 2, done.stdout
    assert re.search(r"the loss is (nan|inf) at step \d+: lower --lr", done.stderr), done.stderr
    assert not (place / "gem.safetensors").exists()


def refused(result: subprocess.CompletedProcess[str], text: str) -> None:
    assert result.returncode == 2, result.stdout + result.stderr
    assert text in result.stderr
    assert "Traceback" not in result.stderr
    if "Usage" not in result.stderr:
        assert len(result.stderr.splitlines()) == 1, result.stderr
