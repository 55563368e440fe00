"""DreamBooth training of LoRAs, on the pocket base."""

import hashlib
from pathlib import Path

import pytest
import torch

from ziplora import lora as lora_value
from ziplora import pocket
from ziplora.base import Base, load_base
from ziplora.pocket import train_loras
from ziplora.train import Training, TrainSettings, read_images
from ziplora.train_settings import read_captions


@pytest.fixture(scope="module")
def base() -> Base:
    torch.set_num_threads(1)
    return load_base(pocket.path())


def test_training_a_lora_leaves_the_base_as_it_was(base: Base) -> None:
    def digest() -> str:
        sha = hashlib.sha256()
        for value in base.unet.state_dict().values():
            sha.update(value.numpy().tobytes())
        return sha.hexdigest()

    before = digest()
    task = train_loras.subject_task("guitar", settings=train_loras.Settings(steps=3))
    lora, metadata, _ = train_loras.train(base, task)
    assert digest() == before
    assert set(lora.layers) == set(base.slots.targets)
    assert metadata["ziplora.train.prompt"] == task.prompt
    assert train_loras.effect(base, lora, task, n=4) > 0


def test_interrupted_training_resumes_bit_for_bit(base: Base, tmp_path: Path) -> None:
    images = train_loras.style_task("thermal", "star").images()
    settings = TrainSettings("a star in szn style", "szn style", rank=2, steps=4, batch=2, lr=1e-3)
    with Training(base, images, settings) as through:
        steps = iter(through)
        next(steps)
        next(steps)
        through.save_state(tmp_path / "state")
        losses = [step.loss for step in steps]
        expected = lora_value.digest(through.lora())
    with Training(base, images, settings) as resumed:
        resumed.load_state(tmp_path / "state")
        assert [step.loss for step in resumed] == losses
        assert lora_value.digest(resumed.lora()) == expected


def test_a_state_of_other_settings_is_refused(base: Base, tmp_path: Path) -> None:
    images = train_loras.style_task("thermal", "star").images()
    with Training(base, images, TrainSettings("a star in szn style", "szn style", rank=2, steps=4)) as one:
        one.save_state(tmp_path / "state")
    with (
        Training(base, images, TrainSettings("a star in szn style", "szn style", rank=2, steps=5)) as other,
        pytest.raises(ValueError, match="other settings"),
    ):
        other.load_state(tmp_path / "state")


def test_bad_input(base: Base, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not contain the trigger"):
        TrainSettings("a photo of a thing", "sks thing")
    with pytest.raises(ValueError, match="no pictures"):
        read_images(tmp_path)
    with pytest.raises(ValueError, match="no pictures"):
        Training(base, [], TrainSettings("a photo of a sks thing", "sks thing"))
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        read_images(tmp_path)


def test_prior_preservation_adds_its_own_term(base: Base) -> None:
    images = train_loras.subject_task("guitar").images()
    plain = TrainSettings("a photo of a sks thing", "sks thing", rank=2, steps=1, lr=1e-3)
    prior = TrainSettings(
        "a photo of a sks thing",
        "sks thing",
        rank=2,
        steps=1,
        lr=1e-3,
        prior_prompt="a photo of a thing",
        prior_images=1,
    )
    with Training(base, images, plain) as training:
        assert training.prior is None
        without = next(iter(training)).loss
    with Training(base, images, prior) as training:
        assert training.prior is not None
        assert training.prior[0].shape == (1, 4, 12, 12)
        assert next(iter(training)).loss != without


def test_captions_of_their_own_decide_what_each_picture_teaches(base: Base, tmp_path: Path) -> None:
    images = train_loras.subject_task("guitar").images()[:2]
    settings = TrainSettings("a photo of a sks", "sks", rank=2, steps=2, lr=1e-3)

    def losses(captions: list[str] | None) -> list[float]:
        with Training(base, images, settings, captions=captions) as training:
            return [step.loss for step in training]

    plain = losses(None)
    assert losses([settings.prompt] * 2) == plain
    assert losses(["a sks in pixel style"] * 2) != plain
    with pytest.raises(ValueError, match="1 captions for 2 pictures"):
        losses(["a sks"])


def test_captions_are_read_from_text_files_beside_the_pictures(tmp_path: Path) -> None:
    settings = TrainSettings("a photo of a sks", "sks")
    paths = [tmp_path / "1.png", tmp_path / "2.png"]
    (tmp_path / "2.txt").write_text("a sks in pixel style\n")
    assert read_captions(paths, settings) == ["a photo of a sks", "a sks in pixel style"]
    (tmp_path / "2.txt").write_text("a guitar in pixel style")
    with pytest.raises(ValueError, match=r"2\.txt, 'a guitar in pixel style', does not contain the trigger 'sks'"):
        read_captions(paths, settings)
    (tmp_path / "2.txt").write_bytes(b"\xff\xfe sks")
    with pytest.raises(ValueError, match="cannot be read as text"):
        read_captions(paths, settings)


def test_two_concepts_start_from_different_directions(base: Base) -> None:
    settings = TrainSettings("a photo of a sks", "sks", rank=2, steps=1)
    downs = []
    for name in ("guitar", "fish"):
        with Training(base, train_loras.subject_task(name).images(), settings) as training:
            downs.append(torch.cat([layer.down.flatten() for layer in training.lora().layers.values()]))
    assert abs(torch.cosine_similarity(downs[0], downs[1], dim=0)) < 0.1
