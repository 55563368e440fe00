"""The shapes of the pocket world: polygons in units where the shape fills about [-1, 1]², y downwards."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Shape:
    """`body` is filled, `holes` are cut out of it, `part` is drawn over it in the second colour."""

    name: str
    body: tuple[tuple[Point, ...], ...]
    part: tuple[tuple[Point, ...], ...]
    holes: tuple[tuple[Point, ...], ...] = ()


def oval(
    cx: float, cy: float, rx: float, ry: float | None = None, start: float = 0.0, stop: float = 360.0
) -> tuple[Point, ...]:
    ry = rx if ry is None else ry
    angles = np.radians(np.linspace(start, stop, 36))
    return tuple((cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles)


def _box(x0: float, y0: float, x1: float, y1: float) -> tuple[Point, ...]:
    return ((x0, y0), (x1, y0), (x1, y1), (x0, y1))


def _regular(
    n: int, radius: float = 1.0, inner: float | None = None, cx: float = 0.0, cy: float = 0.0
) -> tuple[Point, ...]:
    """A regular n-gon, or with `inner` a star of n tips; the first tip points up."""
    count = n if inner is None else 2 * n
    radii = [radius if inner is None or i % 2 == 0 else inner for i in range(count)]
    angles = [2 * math.pi * i / count - math.pi / 2 for i in range(count)]
    return tuple((cx + r * math.cos(a), cy + r * math.sin(a)) for r, a in zip(radii, angles, strict=True))


def _heart() -> tuple[Point, ...]:
    t = np.linspace(0, 2 * math.pi, 60)
    x = np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16.5
    return tuple((float(a), float(b)) for a, b in zip(x, y, strict=True))


def _drop() -> tuple[Point, ...]:
    return ((0.0, -1.05), *oval(0, 0.3, 0.68, 0.7, -35, 215))


def _petals(n: int, distance: float, radius: float) -> tuple[tuple[Point, ...], ...]:
    angles = [2 * math.pi * i / n - math.pi / 2 for i in range(n)]
    return tuple(oval(distance * math.cos(a), distance * math.sin(a), radius) for a in angles)


def _shapes() -> tuple[Shape, ...]:
    b = _box
    return (
        # seen by the base model
        Shape("disc", (oval(0, 0, 0.9),), (oval(-0.25, -0.25, 0.28),)),
        Shape("square", (b(-0.8, -0.8, 0.8, 0.8),), (b(-0.3, -0.3, 0.3, 0.3),)),
        Shape("triangle", (((0.0, -0.95), (1.0, 0.8), (-1.0, 0.8)),), (oval(0, 0.25, 0.27),)),
        Shape("star", (_regular(5, 1.05, 0.45),), (oval(0, 0, 0.24),)),
        Shape("heart", (_heart(),), (oval(-0.4, -0.35, 0.2),)),
        Shape("moon", (oval(0, 0, 0.95),), (oval(-0.65, 0.1, 0.13), oval(-0.4, 0.6, 0.1)), (oval(0.5, -0.15, 0.8),)),
        Shape("cross", (b(-0.33, -0.95, 0.33, 0.95), b(-0.95, -0.33, 0.95, 0.33)), (b(-0.2, -0.2, 0.2, 0.2),)),
        Shape(
            "arrow",
            (((0.0, -1.0), (0.9, 0.0), (-0.9, 0.0)), b(-0.35, -0.05, 0.35, 0.95)),
            (b(-0.35, 0.65, 0.35, 0.95),),
        ),
        Shape("ring", (oval(0, 0, 0.95),), (oval(0, -0.72, 0.18),), (oval(0, 0, 0.48),)),
        Shape("diamond", (((0.0, -1.05), (0.75, 0.0), (0.0, 1.05), (-0.75, 0.0)),), (b(-0.75, -0.08, 0.75, 0.08),)),
        Shape("hexagon", (_regular(6, 1.0),), (_regular(6, 0.45),)),
        Shape(
            "house",
            (((0.0, -1.0), (1.0, -0.15), (-1.0, -0.15)), b(-0.75, -0.2, 0.75, 0.9)),
            (b(-0.2, 0.25, 0.2, 0.9), b(0.35, 0.05, 0.6, 0.35)),
        ),
        Shape(
            "tree",
            (((0.0, -1.1), (0.6, -0.3), (-0.6, -0.3)), ((0.0, -0.65), (0.85, 0.45), (-0.85, 0.45))),
            (b(-0.18, 0.45, 0.18, 1.0),),
        ),
        Shape("flower", _petals(6, 0.62, 0.38), (oval(0, 0, 0.36),)),
        Shape(
            "apple",
            (oval(-0.32, 0.15, 0.58, 0.75), oval(0.32, 0.15, 0.58, 0.75)),
            (b(-0.06, -1.0, 0.06, -0.5), oval(0.3, -0.8, 0.26, 0.12)),
        ),
        Shape(
            "car",
            (b(-1.0, -0.05, 1.0, 0.5), ((-0.6, 0.0), (-0.4, -0.55), (0.4, -0.55), (0.65, 0.0))),
            (oval(-0.55, 0.5, 0.27), oval(0.55, 0.5, 0.27)),
        ),
        Shape(
            "boat",
            (((-1.0, 0.3), (1.0, 0.3), (0.6, 0.85), (-0.6, 0.85)), ((0.0, -1.0), (0.75, 0.15), (0.0, 0.15))),
            (b(-0.12, -1.0, 0.0, 0.3),),
        ),
        Shape("bottle", (b(-0.45, -0.2, 0.45, 1.0), b(-0.18, -0.95, 0.18, -0.1)), (b(-0.45, 0.2, 0.45, 0.6),)),
        Shape(
            "cup",
            (((-0.75, -0.7), (0.45, -0.7), (0.3, 0.8), (-0.6, 0.8)), oval(0.55, -0.05, 0.42)),
            (b(-0.75, -0.7, 0.45, -0.45),),
            (oval(0.6, -0.05, 0.2),),
        ),
        Shape("hat", (b(-0.5, -0.85, 0.5, 0.45), oval(0, 0.5, 1.05, 0.25)), (b(-0.5, 0.1, 0.5, 0.35),)),
        Shape(
            "bell",
            (((-0.85, 0.6), (-0.55, 0.2), *oval(0, -0.25, 0.5, 0.65, 180, 360), (0.55, 0.2), (0.85, 0.6)),),
            (oval(0, 0.72, 0.2),),
        ),
        Shape(
            "leaf",
            (((0.0, -1.05), *oval(0, 0, 0.62, 0.75, -40, 40), (0.0, 0.85), *oval(0, 0, 0.62, 0.75, 140, 220)),),
            (b(-0.06, -0.6, 0.06, 1.1),),
        ),
        Shape(
            "bird",
            (oval(-0.1, 0.2, 0.7, 0.5), oval(0.5, -0.4, 0.36), ((-0.6, 0.2), (-1.1, -0.25), (-0.95, 0.4))),
            (((0.8, -0.5), (1.2, -0.32), (0.8, -0.22)), oval(-0.15, 0.15, 0.36, 0.2)),
        ),
        Shape(
            "cat",
            (
                oval(0, 0.15, 0.82, 0.72),
                ((-0.8, -0.95), (-0.15, -0.5), (-0.75, 0.05)),
                ((0.8, -0.95), (0.15, -0.5), (0.75, 0.05)),
            ),
            (oval(-0.32, 0.0, 0.15), oval(0.32, 0.0, 0.15), oval(0, 0.4, 0.12, 0.08)),
        ),
        Shape(
            "ghost",
            (
                (
                    *oval(0, -0.25, 0.75, 0.75, 180, 360),
                    (0.75, 0.95),
                    (0.38, 0.65),
                    (0.0, 0.95),
                    (-0.38, 0.65),
                    (-0.75, 0.95),
                ),
            ),
            (oval(-0.28, -0.25, 0.15, 0.2), oval(0.28, -0.25, 0.15, 0.2)),
        ),
        Shape(
            "lamp",
            (((-0.4, -0.95), (0.4, -0.95), (0.8, 0.05), (-0.8, 0.05)), b(-0.5, 0.8, 0.5, 1.0)),
            (b(-0.09, 0.05, 0.09, 0.8),),
        ),
        Shape("drop", (_drop(),), (oval(0.22, 0.45, 0.2),)),
        Shape(
            "cloud",
            (oval(-0.5, 0.15, 0.45), oval(0.0, -0.15, 0.55), oval(0.55, 0.15, 0.42), b(-0.5, 0.1, 0.55, 0.58)),
            (b(-0.5, 0.38, 0.55, 0.58),),
        ),
        Shape(
            "bolt",
            (((0.25, -1.05), (-0.65, 0.2), (-0.05, 0.2), (-0.3, 1.05), (0.65, -0.3), (0.05, -0.3)),),
            (((-0.65, 0.2), (-0.05, 0.2), (-0.3, 1.05)),),
        ),
        Shape("flag", (((-0.6, -0.95), (0.95, -0.5), (-0.6, 0.05)),), (b(-0.8, -1.0, -0.6, 1.05),)),
        # never seen by the base model
        Shape(
            "mushroom",
            ((*oval(0, 0.0, 1.0, 0.9, 180, 360),), b(-0.3, -0.05, 0.3, 0.9)),
            (oval(-0.4, -0.4, 0.2), oval(0.3, -0.55, 0.17), oval(0.55, -0.15, 0.12)),
        ),
        Shape(
            "key",
            (
                oval(-0.5, -0.3, 0.52),
                b(-0.1, -0.42, 1.05, -0.16),
                b(0.55, -0.2, 0.72, 0.25),
                b(0.85, -0.2, 1.02, 0.35),
            ),
            (b(0.0, -0.42, 0.2, -0.16),),
            (oval(-0.55, -0.3, 0.24),),
        ),
        Shape(
            "fish",
            (oval(0.15, 0, 0.78, 0.52), ((-0.45, 0.0), (-1.1, -0.55), (-1.1, 0.55))),
            (oval(0.55, -0.12, 0.13), ((0.1, -0.85), (0.4, -0.4), (-0.25, -0.4))),
        ),
        Shape(
            "rocket",
            (
                ((0.0, -1.15), (0.38, -0.5), (0.38, 0.55), (-0.38, 0.55), (-0.38, -0.5)),
                ((-0.38, 0.0), (-0.85, 0.8), (-0.38, 0.55)),
                ((0.38, 0.0), (0.85, 0.8), (0.38, 0.55)),
            ),
            (oval(0, -0.25, 0.2), ((-0.25, 0.6), (0.25, 0.6), (0.0, 1.15))),
        ),
        Shape(
            "umbrella",
            ((*oval(0, 0.0, 1.05, 0.95, 180, 360),),),
            (b(-0.08, 0.0, 0.08, 0.85), b(-0.4, 0.75, 0.08, 0.92), b(-0.08, -1.1, 0.08, -0.9)),
        ),
        Shape(
            "cactus",
            (
                b(-0.27, -0.95, 0.27, 0.6),
                b(-0.85, -0.4, -0.55, 0.15),
                b(-0.85, 0.0, -0.2, 0.25),
                b(0.55, -0.65, 0.85, -0.05),
                b(0.2, -0.25, 0.85, 0.0),
            ),
            (((-0.5, 0.55), (0.5, 0.55), (0.38, 1.05), (-0.38, 1.05)),),
        ),
        Shape(
            "robot",
            (
                b(-0.5, -0.75, 0.5, -0.05),
                b(-0.7, 0.05, 0.7, 0.75),
                b(-0.5, 0.7, -0.2, 1.05),
                b(0.2, 0.7, 0.5, 1.05),
                b(-0.05, -1.1, 0.05, -0.7),
            ),
            (oval(-0.22, -0.42, 0.13), oval(0.22, -0.42, 0.13), b(-0.3, 0.25, 0.3, 0.5)),
        ),
        Shape(
            "anchor",
            (
                oval(0, -0.75, 0.3),
                b(-0.12, -0.6, 0.12, 0.9),
                (*oval(0, 0.15, 0.95, 0.85, 0, 180), *oval(0, 0.05, 0.65, 0.6, 180, 0)),
            ),
            (b(-0.5, -0.4, 0.5, -0.2),),
            (oval(0, -0.75, 0.13),),
        ),
        Shape(
            "butterfly",
            (
                oval(-0.52, -0.38, 0.5, 0.45),
                oval(0.52, -0.38, 0.5, 0.45),
                oval(-0.42, 0.45, 0.38, 0.4),
                oval(0.42, 0.45, 0.38, 0.4),
            ),
            (b(-0.1, -0.75, 0.1, 0.85),),
        ),
        Shape(
            "guitar",
            (oval(0, 0.5, 0.6, 0.5), oval(0, -0.05, 0.42, 0.38), b(-0.1, -1.15, 0.1, 0.0), b(-0.2, -1.2, 0.2, -0.95)),
            (oval(0, 0.3, 0.2), b(-0.3, 0.7, 0.3, 0.8)),
        ),
    )


SHAPES: dict[str, Shape] = {shape.name: shape for shape in _shapes()}
NEW_SHAPES = ("mushroom", "key", "fish", "rocket", "umbrella", "cactus", "robot", "anchor", "butterfly", "guitar")
SEEN_SHAPES = tuple(name for name in SHAPES if name not in NEW_SHAPES)

SUBJECT_COLOURS: dict[str, tuple[str, str]] = {
    "mushroom": ("red", "white"),
    "key": ("yellow", "red"),
    "fish": ("orange", "blue"),
    "rocket": ("white", "red"),
    "umbrella": ("purple", "yellow"),
    "cactus": ("green", "brown"),
    "robot": ("blue", "yellow"),
    "anchor": ("black", "orange"),
    "butterfly": ("pink", "purple"),
    "guitar": ("brown", "white"),
}
"""Body and part colour of the new subjects as photographed."""
