"""A pool of rendered training pictures with captions and labels, written once and mapped into memory afterwards."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ziplora.pocket import world


@dataclass(frozen=True, slots=True)
class Pool:
    pixels: np.ndarray  # uint8 [n, SIZE, SIZE, 3]
    captions: Sequence[str]
    shapes: np.ndarray  # [n], index into world.SHAPES
    styles: np.ndarray  # [n], index into world.STYLES; -1 photo, -2 described style


Example = Callable[[np.random.Generator], tuple[world.Scene, str]]


def _chunk(task: tuple[int, int, int, Example]) -> tuple[np.ndarray, list[str], list[int], list[int]]:
    seed, chunk, n, example = task
    rng = np.random.default_rng((seed, chunk))
    shape_index = {name: i for i, name in enumerate(world.SHAPES)}
    style_index = {name: i for i, name in enumerate(world.STYLES)} | {"described": -2}
    pixels, captions, shapes, styles = np.empty((n, world.SIZE, world.SIZE, 3), np.uint8), [], [], []
    for i in range(n):
        scene, words = example(rng)
        pixels[i] = world.render(scene, rng)
        captions.append(words)
        shapes.append(shape_index[scene.shape])
        styles.append(-1 if scene.style is None else style_index[scene.style.name])
    return pixels, captions, shapes, styles


def write_pool(
    folder: Path,
    n: int,
    *,
    seed: int,
    workers: int = 1,
    example: Example = world.training_example,
    chunk: int = 1000,
) -> None:
    """Render `n` training examples (about 2 ms each). What is drawn depends on `seed` and `chunk`, not on `workers`."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [(seed, i, min(chunk, n - i * chunk), example) for i in range((n + chunk - 1) // chunk)]
    pixels = np.lib.format.open_memmap(folder / "pixels.npy", "w+", np.uint8, (n, world.SIZE, world.SIZE, 3))
    captions: list[str] = []
    shapes: list[int] = []
    styles: list[int] = []
    with multiprocessing.Pool(workers) as processes:
        for part, words, shape_ids, style_ids in processes.imap(_chunk, tasks):
            pixels[len(captions) : len(captions) + len(part)] = part
            captions += words
            shapes += shape_ids
            styles += style_ids
    pixels.flush()
    np.savez(folder / "labels.npz", shapes=np.array(shapes), styles=np.array(styles))
    (folder / "captions.json").write_text(json.dumps(captions))


def read_pool(folder: Path) -> Pool:
    labels = np.load(folder / "labels.npz")
    captions = json.loads((folder / "captions.json").read_text())
    return Pool(np.load(folder / "pixels.npy", mmap_mode="r"), captions, labels["shapes"], labels["styles"])
