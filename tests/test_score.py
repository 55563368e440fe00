"""Alignment scores: the arithmetic, and that the pocket world's judges rank rendered truth correctly."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from ziplora import pocket
from ziplora.pocket import world
from ziplora.score import Judge, load_clip, load_dino, mean_cosine, score


@pytest.fixture(scope="module")
def clip() -> Judge:
    torch.set_num_threads(1)
    return load_clip(pocket.scorer("clip"))


@pytest.fixture(scope="module")
def dino() -> Judge:
    torch.set_num_threads(1)
    return load_dino(pocket.scorer("dino"))


def pictures(shapes: tuple[str, ...], styles: tuple[str, ...], seed: int) -> dict[tuple[str, str], Image.Image]:
    pairs = itertools.product(shapes, styles)
    return {pair: world.picture(world.truth(*pair), seed + i) for i, pair in enumerate(pairs)}


def test_mean_cosine_is_the_mean_over_all_pairs() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 5), torch.randn(4, 5)
    pairs = [torch.dot(x, y) / (x.norm() * y.norm()) for x in a for y in b]
    assert mean_cosine(a, b) == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-6)


def test_style_alignment_ranks_truth(clip: Judge) -> None:
    """A picture is nearer to a reference in its own style (showing something else) than to one in another style."""
    samples = pictures(world.NEW_SHAPES, world.NEW_STYLES, seed=50_000)
    references = clip.images([world.picture(world.truth("house", style), 1) for style in world.NEW_STYLES])
    cosines = (clip.images(list(samples.values())) @ references.T).numpy()
    assert share_right(cosines, [world.NEW_STYLES.index(style) for _, style in samples]) >= 0.95


def test_subject_alignment_ranks_truth(dino: Judge) -> None:
    """A picture in a style is nearer to photos of its own subject than to photos of another."""
    samples = pictures(world.NEW_SHAPES, world.NEW_STYLES, seed=60_000)
    photos = [[world.picture(world.truth(shape, None), seed) for seed in range(4)] for shape in world.NEW_SHAPES]
    references = torch.stack([dino.images(group).mean(0) for group in photos])
    cosines = (dino.images(list(samples.values())) @ references.T).numpy()
    assert share_right(cosines, [world.NEW_SHAPES.index(shape) for shape, _ in samples]) >= 0.95


def test_text_alignment_ranks_truth(clip: Judge) -> None:
    """A picture is nearer to its own caption than to those of other pictures."""
    assert clip.texts is not None
    samples = pictures(world.NEW_SHAPES, world.NEW_STYLES, seed=70_000)
    captions = clip.texts([world.caption(world.truth(*pair)) for pair in samples])
    cosines = (clip.images(list(samples.values())) @ captions.T).numpy()
    assert share_right(cosines, list(range(len(samples)))) >= 0.95


def share_right(cosines: np.ndarray, own: list[int]) -> float:
    """Share of (sample, other reference) pairs in which the sample's own reference scores higher."""
    matching = cosines[np.arange(len(own)), own][:, None]
    mismatched = np.ones_like(cosines, dtype=bool)
    mismatched[np.arange(len(own)), own] = False
    return float((matching > cosines)[mismatched].mean())


def test_score_is_the_three_means(clip: Judge, dino: Judge) -> None:
    samples = list(pictures(("cat", "key"), ("ice", "neon"), seed=0).values())
    photos = [world.picture(world.truth("key", None), seed) for seed in range(3)]
    style = [world.picture(world.truth("star", "ice"), 9)]
    prompts = ["a cat in ice style", "a cat in neon style", "a key in ice style", "a key in neon style"]
    scores = score(samples, prompts=prompts, style_images=style, subject_images=photos, clip=clip, dino=dino)
    assert clip.texts is not None
    assert scores.style == pytest.approx(mean_cosine(clip.images(samples), clip.images(style)))
    assert scores.subject == pytest.approx(mean_cosine(dino.images(samples), dino.images(photos)))
    assert scores.text == pytest.approx(float((clip.images(samples) * clip.texts(prompts)).sum(1).mean()), abs=1e-5)
    assert score(samples, prompts=prompts[0], clip=clip).style is None


def test_size_of_the_batch_changes_nothing() -> None:
    samples = list(pictures(("cat", "key"), ("ice", "neon"), seed=0).values())
    one, many = (load_clip(pocket.scorer("clip"), batch=size) for size in (1, 32))
    assert one.digest == many.digest
    assert torch.allclose(one.images(samples), many.images(samples), atol=1e-5)


def test_bad_input(clip: Judge) -> None:
    with pytest.raises(ValueError, match="no samples"):
        score([], prompts="a cat", clip=clip)
    with pytest.raises(ValueError, match="2 prompts for 1 samples"):
        score([world.picture(world.truth("cat", "ice"), 0)], prompts=["a", "b"], clip=clip)
