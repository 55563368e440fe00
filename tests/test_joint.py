"""Joint training: one LoRA from two sets of pictures, on the pocket base and through the command line."""

import dataclasses
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch

from service import events
from service.catalog import Catalog
from service.entry import Entry
from service.pool import InlinePool
from service.run import run
from tests.commands import started, wait_until, ziplora
from tests.grid import Grid
from tests.test_worker import jobs_of, settings
from ziplora import formats, pocket
from ziplora import lora as lora_value
from ziplora.base import Base, load_base
from ziplora.calibration_settings import Passes
from ziplora.joint import joint, joint_training
from ziplora.lora import LoRA, max_rank
from ziplora.merged import Instances, Pair, Pictures
from ziplora.methods import METHODS
from ziplora.pocket import train_loras
from ziplora.train import Training, TrainSettings, drawn_in_turn
from ziplora.train_settings import JointKnobs

KNOBS = JointKnobs(rank=2, steps=3, lr=1e-3)


@pytest.fixture(scope="module")
def base() -> Base:
    torch.set_num_threads(1)
    return load_base(pocket.path())


def instances(task: train_loras.Task, n: int) -> Instances:
    return Instances(tuple(task.images()[:n]), (task.prompt,) * n, task.prompt, task.trigger)


def pictures(seed: int = 0) -> Pictures:
    subject, style = train_loras.subject_task("guitar"), train_loras.style_task("thermal", "star")
    return Pictures(instances(subject, 2), instances(style, 1), seed)


def made(base: Base, given: Pictures) -> LoRA:
    (merged,) = joint(base, [Pair(LoRA({}), LoRA({}), pictures=given)], KNOBS)
    assert merged.report["steps"] == 3
    assert not merged.style.layers
    assert merged.subject_rank == max_rank(merged.lora()) == 2
    return merged.lora()


def test_of_two_sets_that_are_the_same_it_is_ordinary_training_of_one(base: Base) -> None:
    task = train_loras.subject_task("guitar")
    same = instances(task, 2)
    with joint_training(base, Pictures(same, same, 5), KNOBS) as training:
        losses, together = [step.loss for step in training], training.lora()
    settings = TrainSettings(task.prompt, task.trigger, rank=2, steps=3, lr=1e-3, seed=5)
    with Training(base, same.images, settings, captions=same.captions) as training:
        assert [step.loss for step in training] == losses
        assert lora_value.digest(training.lora()) == lora_value.digest(together)


@pytest.mark.parametrize(("sizes", "batch"), [((5, 1), 1), ((5, 1), 4), ((3, 2), 3), ((1, 1), 5)])
def test_either_set_gives_half_of_the_pictures_whatever_their_numbers(sizes: tuple[int, int], batch: int) -> None:
    sets = [list(range(sizes[0])), list(range(sizes[0], sum(sizes)))]
    generator = torch.Generator().manual_seed(0)
    rows: list[int] = []
    for step in range(600):
        rows += drawn_in_turn(sets, step * batch, batch, generator)
        assert abs(2 * sum(row < sizes[0] for row in rows) - len(rows)) <= 1  # at every step, not in the mean
    counts = Counter(rows)
    assert set(counts) == set(range(sum(sizes)))
    for one in sets:  # and within a set no picture is preferred
        assert min(counts[row] for row in one) > 0.5 * max(counts[row] for row in one)


def test_a_seed_decides_the_lora_and_the_base_is_as_it_was(base: Base) -> None:
    before = [value.clone() for value in base.unet.state_dict().values()]
    first, second, other = made(base, pictures()), made(base, pictures()), made(base, pictures(seed=1))
    assert lora_value.digest(first) == lora_value.digest(second) != lora_value.digest(other)
    assert all(torch.equal(a, b) for a, b in zip(before, base.unet.state_dict().values(), strict=True))


def test_both_captions_are_learned_and_a_state_of_other_sets_is_refused(base: Base) -> None:
    given = pictures()
    with joint_training(base, given, KNOBS) as training:
        assert training.captions == (*given.subject.captions, *given.style.captions)
        state = training.state()
    swapped = Pictures(given.style, given.subject, 0)
    with joint_training(base, swapped, KNOBS) as training, pytest.raises(ValueError, match="other settings"):
        training.restore(state)


def test_what_is_missing_is_named(base: Base) -> None:
    with pytest.raises(ValueError, match="learns from pictures of subject and style, and was given none"):
        joint(base, [Pair(LoRA({}), LoRA({}))], KNOBS)
    given = pictures()
    with pytest.raises(ValueError, match="the style has no pictures"):
        joint_training(base, Pictures(given.subject, Instances((), (), "x", "x"), 0), KNOBS)
    with pytest.raises(ValueError, match="rank is 0; it must be at least 1"):
        JointKnobs(rank=0)
    with pytest.raises(ValueError, match="size is 4; at least 8"):
        JointKnobs(size=4)


def test_the_row_has_the_papers_settings_and_says_what_it_costs() -> None:
    method = METHODS["joint"]
    knobs = method.knobs()
    assert (knobs.rank, knobs.steps, knobs.batch, knobs.lr) == (64, 1000, 1, 5e-5)
    assert method.passes(JointKnobs(steps=10, batch=3)) == Passes(backward=30)


# In a run


def test_killed_in_mid_training_a_run_goes_on_from_the_checkpoint(grid: Grid) -> None:
    merge = {"method": "joint", "rank": 2, "steps": 24, "lr": 1e-3}
    path = grid.manifest(subjects=1, styles=1, merge=merge, samples={"prompts": []})
    checkpoints = grid.root / "catalog/checkpoints"
    killed = started("run", path, "--checkpoint-every", 0, "--no-gallery", "--inline")
    wait_until(lambda: bool(list(checkpoints.glob("*.pt"))), timeout_s=480)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    (job,) = jobs_of(path)
    assert [left.name for left in checkpoints.iterdir()] == [f"{job.job_id}.pt"]

    def ended(catalog: Path) -> tuple[list[events.TrainingAt], Entry]:
        pool, seen = InlinePool(dataclasses.replace(settings(grid), catalog=str(catalog))), list[events.Event]()
        run([job], pool, Catalog(catalog), run_id="test", observers=[seen.append])
        pool.close()
        return [event for event in seen if isinstance(event, events.TrainingAt)], Catalog(catalog).entry(job.job_id)

    said, entry = ended(grid.root / "catalog")
    assert 1 <= said[0].step < said[-1].step == 24
    assert entry.report["merge"]["steps"] == 24
    assert not list(checkpoints.glob("*"))
    said, other = ended(grid.root / "whole")  # what it would have come to without a break
    assert said[0].step == 0
    name = "merged.safetensors"
    assert entry.objects[name].sha256 == other.objects[name].sha256


# The command line


def arguments(place: Path, **options: object) -> list[object]:
    given = {
        "base": place / "base",
        "prompt": "a photo of sks gem",
        "trigger": "sks gem",
        "out": place / "both.safetensors",
    }
    given |= {"style_prompt": "a house in szn wax style", "style_trigger": "szn wax style"}
    given |= {"rank": 2, "steps": 4, "lr": 1e-3, **options}
    named = (part for name, value in given.items() for part in (f"--{name}".replace("_", "-"), value))
    return ["train", "joint", place / "gem", place / "wax.png", *named]


@pytest.fixture
def place(grid: Grid) -> Path:
    """Three pictures of a subject, and one in a style."""
    (grid.root / "gem").mkdir()
    for id in ("dog", "cat", "owl"):
        shutil.copy(grid.root / f"{id}.png", grid.root / "gem")
    shutil.copy(grid.root / "ink.png", grid.root / "wax.png")
    return grid.root


def test_from_two_sets_of_pictures_to_a_file_that_says_so(place: Path) -> None:
    (place / "gem/cat.txt").write_text("sks gem on a beach")
    done = ziplora(*arguments(place))
    assert done.returncode == 0, done.stderr
    assert "training on 4 pictures of " in done.stdout
    assert "; 1 with captions of their own" in done.stdout
    assert "rank 2, trigger 'sks gem', 'szn wax style'" in done.stdout
    file = formats.read_lora(place / "both.safetensors")
    assert file.trigger == "sks gem, szn wax style"
    assert file.metadata["ziplora.train.style_prompt"] == "a house in szn wax style"
    assert file.metadata["ziplora.train.images_of_each"] == "3, 1"
    assert any(bool(layer.up.any()) for layer in file.lora.layers.values())
    again = ziplora(*arguments(place))
    assert "is there already, trained like this to the end (4 steps)" in again.stdout
    (place / "gem/cat.txt").unlink()
    other = ziplora(*arguments(place, style_prompt="a cat in szn wax style"))
    assert other.returncode == 2
    assert "was trained with other style_prompt, captions: name another" in other.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"style_prompt": "a house"}, "the prompt 'a house' does not contain the trigger 'szn wax style'"),
        ({"size": 36}, "36 pixels do not fit the base; expected a multiple of 8"),
    ],
)
def test_bad_input_is_one_line(place: Path, options: dict[str, object], text: str) -> None:
    done = ziplora(*arguments(place, **options))
    assert done.returncode == 2, done.stdout
    assert text in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (place / "both.safetensors").exists()


def test_a_style_without_pictures(place: Path) -> None:
    (place / "wax.png").unlink()
    done = ziplora(*arguments(place))
    assert done.returncode == 2
    assert f"no such picture or directory: {place / 'wax.png'}" in done.stderr
