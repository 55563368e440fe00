"""A small world of pictures whose truth is known: shapes drawn in styles, with captions in plain words.

A picture is `SIZE`×`SIZE` RGB, uint8. It shows one shape, either as a *photo* (the shape's own two colours, soft light,
a grey room) or in a *style* (palette, fill, background, outline and edge of that style; its own colours are lost).
Everything random about a picture (pose, size, pattern phase) follows from one `numpy.random.Generator`.

`SEEN_SHAPES` and `SEEN_STYLES` train the base model; `NEW_SHAPES` and `NEW_STYLES` never do: they are the subjects and
styles that LoRAs learn. As the renderer knows every shape and style, "new subject in new style" has a true picture too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIZE = 48  # pixels of a side
SUPER = 3  # masks are drawn this much larger, then averaged down
Point = tuple[float, float]
Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "orange": (244, 140, 30),
    "yellow": (250, 214, 60),
    "green": (50, 160, 70),
    "blue": (40, 90, 210),
    "purple": (130, 60, 180),
    "pink": (245, 140, 180),
    "brown": (125, 80, 45),
    "black": (25, 25, 30),
    "white": (250, 250, 250),
}


# Shapes: polygons in units where the shape fills about [-1, 1]², y downwards. `body` is filled, `holes` are cut out,
# `part` is drawn over it in the second colour.


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    body: tuple[tuple[Point, ...], ...]
    part: tuple[tuple[Point, ...], ...]
    holes: tuple[tuple[Point, ...], ...] = ()


def _oval(
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
    return ((0.0, -1.05), *_oval(0, 0.3, 0.68, 0.7, -35, 215))


def _petals(n: int, distance: float, radius: float) -> tuple[tuple[Point, ...], ...]:
    angles = [2 * math.pi * i / n - math.pi / 2 for i in range(n)]
    return tuple(_oval(distance * math.cos(a), distance * math.sin(a), radius) for a in angles)


def _shapes() -> tuple[Shape, ...]:
    b = _box
    return (
        # seen by the base model
        Shape("disc", (_oval(0, 0, 0.9),), (_oval(-0.25, -0.25, 0.28),)),
        Shape("square", (b(-0.8, -0.8, 0.8, 0.8),), (b(-0.3, -0.3, 0.3, 0.3),)),
        Shape("triangle", (((0.0, -0.95), (1.0, 0.8), (-1.0, 0.8)),), (_oval(0, 0.25, 0.27),)),
        Shape("star", (_regular(5, 1.05, 0.45),), (_oval(0, 0, 0.24),)),
        Shape("heart", (_heart(),), (_oval(-0.4, -0.35, 0.2),)),
        Shape(
            "moon", (_oval(0, 0, 0.95),), (_oval(-0.65, 0.1, 0.13), _oval(-0.4, 0.6, 0.1)), (_oval(0.5, -0.15, 0.8),)
        ),
        Shape("cross", (b(-0.33, -0.95, 0.33, 0.95), b(-0.95, -0.33, 0.95, 0.33)), (b(-0.2, -0.2, 0.2, 0.2),)),
        Shape(
            "arrow",
            (((0.0, -1.0), (0.9, 0.0), (-0.9, 0.0)), b(-0.35, -0.05, 0.35, 0.95)),
            (b(-0.35, 0.65, 0.35, 0.95),),
        ),
        Shape("ring", (_oval(0, 0, 0.95),), (_oval(0, -0.72, 0.18),), (_oval(0, 0, 0.48),)),
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
        Shape("flower", _petals(6, 0.62, 0.38), (_oval(0, 0, 0.36),)),
        Shape(
            "apple",
            (_oval(-0.32, 0.15, 0.58, 0.75), _oval(0.32, 0.15, 0.58, 0.75)),
            (b(-0.06, -1.0, 0.06, -0.5), _oval(0.3, -0.8, 0.26, 0.12)),
        ),
        Shape(
            "car",
            (b(-1.0, -0.05, 1.0, 0.5), ((-0.6, 0.0), (-0.4, -0.55), (0.4, -0.55), (0.65, 0.0))),
            (_oval(-0.55, 0.5, 0.27), _oval(0.55, 0.5, 0.27)),
        ),
        Shape(
            "boat",
            (((-1.0, 0.3), (1.0, 0.3), (0.6, 0.85), (-0.6, 0.85)), ((0.0, -1.0), (0.75, 0.15), (0.0, 0.15))),
            (b(-0.12, -1.0, 0.0, 0.3),),
        ),
        Shape("bottle", (b(-0.45, -0.2, 0.45, 1.0), b(-0.18, -0.95, 0.18, -0.1)), (b(-0.45, 0.2, 0.45, 0.6),)),
        Shape(
            "cup",
            (((-0.75, -0.7), (0.45, -0.7), (0.3, 0.8), (-0.6, 0.8)), _oval(0.55, -0.05, 0.42)),
            (b(-0.75, -0.7, 0.45, -0.45),),
            (_oval(0.6, -0.05, 0.2),),
        ),
        Shape("hat", (b(-0.5, -0.85, 0.5, 0.45), _oval(0, 0.5, 1.05, 0.25)), (b(-0.5, 0.1, 0.5, 0.35),)),
        Shape(
            "bell",
            (((-0.85, 0.6), (-0.55, 0.2), *_oval(0, -0.25, 0.5, 0.65, 180, 360), (0.55, 0.2), (0.85, 0.6)),),
            (_oval(0, 0.72, 0.2),),
        ),
        Shape(
            "leaf",
            (((0.0, -1.05), *_oval(0, 0, 0.62, 0.75, -40, 40), (0.0, 0.85), *_oval(0, 0, 0.62, 0.75, 140, 220)),),
            (b(-0.06, -0.6, 0.06, 1.1),),
        ),
        Shape(
            "bird",
            (_oval(-0.1, 0.2, 0.7, 0.5), _oval(0.5, -0.4, 0.36), ((-0.6, 0.2), (-1.1, -0.25), (-0.95, 0.4))),
            (((0.8, -0.5), (1.2, -0.32), (0.8, -0.22)), _oval(-0.15, 0.15, 0.36, 0.2)),
        ),
        Shape(
            "cat",
            (
                _oval(0, 0.15, 0.82, 0.72),
                ((-0.8, -0.95), (-0.15, -0.5), (-0.75, 0.05)),
                ((0.8, -0.95), (0.15, -0.5), (0.75, 0.05)),
            ),
            (_oval(-0.32, 0.0, 0.15), _oval(0.32, 0.0, 0.15), _oval(0, 0.4, 0.12, 0.08)),
        ),
        Shape(
            "ghost",
            (
                (
                    *_oval(0, -0.25, 0.75, 0.75, 180, 360),
                    (0.75, 0.95),
                    (0.38, 0.65),
                    (0.0, 0.95),
                    (-0.38, 0.65),
                    (-0.75, 0.95),
                ),
            ),
            (_oval(-0.28, -0.25, 0.15, 0.2), _oval(0.28, -0.25, 0.15, 0.2)),
        ),
        Shape(
            "lamp",
            (((-0.4, -0.95), (0.4, -0.95), (0.8, 0.05), (-0.8, 0.05)), b(-0.5, 0.8, 0.5, 1.0)),
            (b(-0.09, 0.05, 0.09, 0.8),),
        ),
        Shape("drop", (_drop(),), (_oval(0.22, 0.45, 0.2),)),
        Shape(
            "cloud",
            (_oval(-0.5, 0.15, 0.45), _oval(0.0, -0.15, 0.55), _oval(0.55, 0.15, 0.42), b(-0.5, 0.1, 0.55, 0.58)),
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
            ((*_oval(0, 0.0, 1.0, 0.9, 180, 360),), b(-0.3, -0.05, 0.3, 0.9)),
            (_oval(-0.4, -0.4, 0.2), _oval(0.3, -0.55, 0.17), _oval(0.55, -0.15, 0.12)),
        ),
        Shape(
            "key",
            (
                _oval(-0.5, -0.3, 0.52),
                b(-0.1, -0.42, 1.05, -0.16),
                b(0.55, -0.2, 0.72, 0.25),
                b(0.85, -0.2, 1.02, 0.35),
            ),
            (b(0.0, -0.42, 0.2, -0.16),),
            (_oval(-0.55, -0.3, 0.24),),
        ),
        Shape(
            "fish",
            (_oval(0.15, 0, 0.78, 0.52), ((-0.45, 0.0), (-1.1, -0.55), (-1.1, 0.55))),
            (_oval(0.55, -0.12, 0.13), ((0.1, -0.85), (0.4, -0.4), (-0.25, -0.4))),
        ),
        Shape(
            "rocket",
            (
                ((0.0, -1.15), (0.38, -0.5), (0.38, 0.55), (-0.38, 0.55), (-0.38, -0.5)),
                ((-0.38, 0.0), (-0.85, 0.8), (-0.38, 0.55)),
                ((0.38, 0.0), (0.85, 0.8), (0.38, 0.55)),
            ),
            (_oval(0, -0.25, 0.2), ((-0.25, 0.6), (0.25, 0.6), (0.0, 1.15))),
        ),
        Shape(
            "umbrella",
            ((*_oval(0, 0.0, 1.05, 0.95, 180, 360),),),
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
            (_oval(-0.22, -0.42, 0.13), _oval(0.22, -0.42, 0.13), b(-0.3, 0.25, 0.3, 0.5)),
        ),
        Shape(
            "anchor",
            (
                _oval(0, -0.75, 0.3),
                b(-0.12, -0.6, 0.12, 0.9),
                (*_oval(0, 0.15, 0.95, 0.85, 0, 180), *_oval(0, 0.05, 0.65, 0.6, 180, 0)),
            ),
            (b(-0.5, -0.4, 0.5, -0.2),),
            (_oval(0, -0.75, 0.13),),
        ),
        Shape(
            "butterfly",
            (
                _oval(-0.52, -0.38, 0.5, 0.45),
                _oval(0.52, -0.38, 0.5, 0.45),
                _oval(-0.42, 0.45, 0.38, 0.4),
                _oval(0.42, 0.45, 0.38, 0.4),
            ),
            (b(-0.1, -0.75, 0.1, 0.85),),
        ),
        Shape(
            "guitar",
            (_oval(0, 0.5, 0.6, 0.5), _oval(0, -0.05, 0.42, 0.38), b(-0.1, -1.15, 0.1, 0.0), b(-0.2, -1.2, 0.2, -0.95)),
            (_oval(0, 0.3, 0.2), b(-0.3, 0.7, 0.3, 0.8)),
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


# Styles

FILLS = ("plain", "stripes", "dots", "hatch", "checks", "shade", "clouds")
GROUNDS = ("plain", "stripes", "dots", "grid", "checks", "shade", "rays", "clouds")
OUTLINES = ("no", "thin", "thick", "glow", "shadow")
EDGES = ("crisp", "soft", "blocky", "rough")


@dataclass(frozen=True, slots=True)
class Style:
    """`body`, `body2`: the fill and its pattern's colour; `part`: details; `ground`, `ground2`: behind; `line`:
    outline."""

    name: str
    body: Colour
    body2: Colour
    part: Colour
    ground: Colour
    ground2: Colour
    line: Colour
    fill: str = "plain"
    behind: str = "plain"
    outline: str = "no"
    edge: str = "crisp"


def _hex(text: str) -> tuple[Colour, ...]:
    return tuple((int(h[0:2], 16), int(h[2:4], 16), int(h[4:6], 16)) for h in text.split())


def _style(name: str, colours: str, fill: str, behind: str, outline: str, edge: str = "crisp") -> Style:
    body, body2, part, ground, ground2, line = _hex(colours)
    return Style(name, body, body2, part, ground, ground2, line, fill, behind, outline, edge)


STYLES: dict[str, Style] = {
    style.name: style
    for style in (
        #        body   body2  part   ground ground2 line
        _style("neon", "1a1030 1a1030 f8f03c 140a28 140a28 ff3cc8", "plain", "plain", "glow"),
        _style("watercolour", "6fa8dc a9d0f0 e88aa0 fbf7ee f3ead6 6fa8dc", "clouds", "clouds", "no", "soft"),
        _style("pencil", "f4f2ec 8a8a8a 6a6a6a f4f2ec f4f2ec 3c3c3c", "hatch", "plain", "thin"),
        _style("blueprint", "2050a8 2050a8 e8f0ff 2050a8 4a78c8 e8f0ff", "plain", "grid", "thin"),
        _style("comic", "ffe14a ffb020 e83030 ffffff 6ec6f0 101010", "plain", "dots", "thick"),
        _style("pixel", "50c850 208838 f8f8f8 3048a0 3048a0 102010", "shade", "plain", "no", "blocky"),
        _style("mosaic", "c85a3c f0c890 305070 e8dcc0 b8b098 ffffff", "checks", "checks", "no"),
        _style("sunset", "2a1a3a 2a1a3a 6a2a4a ffd060 f04a5a 2a1a3a", "plain", "shade", "no"),
        _style("mint", "5ac8a0 ffffff ffffff d8f5e8 ffffff ffffff", "stripes", "plain", "thick"),
        _style("candy", "ff6aa8 ffffff ffffff fde0ee ffb8d8 ffffff", "stripes", "stripes", "no"),
        _style("charcoal", "383838 6a6a6a c8c8c8 a8a4a0 c8c4c0 181818", "clouds", "clouds", "no", "rough"),
        _style("woodcut", "201008 c89858 c89858 d8a868 c89050 201008", "hatch", "stripes", "thick", "rough"),
        _style("poster", "e83828 e83828 ffe8b8 ffe8b8 f8c058 301018", "plain", "rays", "shadow"),
        _style("sticker", "38b0d8 2080b0 ffe040 b8b8c8 b8b8c8 ffffff", "shade", "plain", "thick"),
        _style("chalk", "2c4a3c e8e8e0 f8d878 2c4a3c 2c4a3c e8e8e0", "hatch", "plain", "thin", "rough"),
        _style("jungle", "a8d838 e8f080 f88820 1c5028 388040 0c2810", "dots", "stripes", "no"),
        _style("ocean", "f8f8f0 c8e8f0 f08060 0878a0 30b0c8 044058", "shade", "clouds", "shadow"),
        _style("gold", "f0c040 fff0b0 8a5a10 300c10 501820 fff0b0", "shade", "plain", "thin"),
        _style("zebra", "101010 ffffff e02020 ffffff d8d8d8 101010", "stripes", "plain", "thin"),
        _style("fog", "8898a8 8898a8 687888 c8d0d8 e4e8ec 8898a8", "plain", "shade", "no", "soft"),
        _style("lava", "181010 f86010 f8d020 601008 a02010 f86010", "clouds", "clouds", "glow"),
        _style("stamp", "7a3088 7a3088 f0e8d0 f0e8d0 f0e8d0 7a3088", "plain", "plain", "no", "rough"),
        # never seen by the base model
        _style("ice", "e8fbff 90d8f0 3070c0 a8e4f8 78c4e8 2058b0", "shade", "rays", "thin"),
        _style("retro", "f08848 f8d898 38786c f8d898 f0b070 5a2c1c", "stripes", "rays", "thick"),
        _style("circuit", "0a2818 30e068 f0e030 0a2818 146030 30e068", "dots", "grid", "thin"),
        _style("thermal", "f8e030 f03820 ffffff 281070 7018a0 f03820", "shade", "clouds", "glow", "soft"),
        _style("denim", "3a5888 6a88b8 f0a030 283c60 3a5080 f0a030", "hatch", "checks", "thin"),
        _style("carnival", "8028c0 f0d020 20c8b0 f8f0e0 f05050 401060", "checks", "stripes", "thick"),
        _style("arcade", "f04ad0 8a20c0 30f0f0 08081c 202060 30f0f0", "checks", "grid", "no", "blocky"),
        _style("linen", "b05840 d89878 f8f0e0 e8dcc4 d4c4a4 e8dcc4", "dots", "grid", "shadow", "soft"),
    )
}
NEW_STYLES = ("ice", "retro", "circuit", "thermal", "denim", "carnival", "arcade", "linen")
SEEN_STYLES = tuple(name for name in STYLES if name not in NEW_STYLES)

EXTRAS = ("crown", "ball")
_EXTRA_COLOURS: dict[str, Colour] = {"crown": COLOURS["yellow"], "ball": COLOURS["red"]}
HOLDOUT = 7
"""A seen shape is never trained in a seen style where (index of shape + 3 · index of style) mod HOLDOUT is 0."""


def left_out(shape: str, style: str) -> bool:
    """Is this pair of a seen shape and a seen style kept from base training, to measure composition?"""
    return (SEEN_SHAPES.index(shape) + 3 * SEEN_STYLES.index(style)) % HOLDOUT == 0


# Pictures


@dataclass(frozen=True, slots=True)
class Scene:
    """`style` None: a photo in `colours` (body, part). `extra`: a crown above or a ball beside."""

    shape: str
    style: Style | None = None
    colours: tuple[str, str] = ("red", "white")
    extra: str | None = None


@functools.lru_cache(maxsize=1)
def _grid() -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    return x, y


def _pattern(kind: str, rng: np.random.Generator, period: float) -> np.ndarray:
    """How much of the second colour shows at each pixel, [SIZE, SIZE] in 0..1; only the phase is random."""
    x, y = _grid()
    shift_x, shift_y = rng.uniform(0, period, 2)
    steep = lambda wave: np.clip(0.5 + 2.0 * wave, 0, 1)  # noqa: E731
    wave_x, wave_y = np.sin(2 * np.pi * (x + shift_x) / period), np.sin(2 * np.pi * (y + shift_y) / period)
    if kind == "stripes":
        return steep(wave_y)
    if kind == "hatch":
        return steep(np.sin(2 * np.pi * (x + y + shift_x) / period / 1.3) - 0.2)
    if kind == "dots":
        return steep(wave_x + wave_y - 0.75)
    if kind == "checks":
        return steep(2 * wave_x * wave_y)
    if kind == "grid":
        return np.clip(np.maximum(wave_x, wave_y) * 3.0 - 2.0, 0, 1)
    if kind == "shade":
        return np.clip((y - 6) / (SIZE - 12), 0, 1)
    if kind == "rays":
        return steep(np.sin(10 * np.arctan2(y - SIZE / 2, x - SIZE / 2) + shift_x))
    if kind == "clouds":
        coarse = Image.fromarray(rng.uniform(0, 1, (6, 6)).astype(np.float32)).resize(
            (SIZE, SIZE), Image.Resampling.BICUBIC
        )
        return np.clip((np.asarray(coarse) - 0.3) * 2.2, 0, 1)
    return np.zeros((SIZE, SIZE), np.float32)


def _draw(polygons: Sequence[Sequence[Point]], pose: np.ndarray, holes: Sequence[Sequence[Point]] = ()) -> Image.Image:
    """Fill polygons under an affine `pose` [2, 3] (shape units → pixels) into a mask of SIZE·SUPER."""
    mask = Image.new("L", (SIZE * SUPER, SIZE * SUPER))
    pen = ImageDraw.Draw(mask)
    for value, group in ((255, polygons), (0, holes)):
        for polygon in group:
            points = (np.asarray(polygon) @ pose[:, :2].T + pose[:, 2]) * SUPER
            pen.polygon([(float(px), float(py)) for px, py in points], fill=value)
    return mask


def _down(mask: Image.Image) -> np.ndarray:
    return np.asarray(mask.reduce(SUPER), np.float32) / 255


def _roughen(mask: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Break the edge: blur the mask and cut it again at a level that varies from place to place."""
    soft = np.asarray(mask.filter(ImageFilter.GaussianBlur(SUPER)), np.float32)
    noise = Image.fromarray(rng.uniform(60, 195, (SIZE // 2, SIZE // 2)).astype(np.float32)).resize(
        mask.size, Image.Resampling.BILINEAR
    )
    return Image.fromarray(((soft > np.asarray(noise)) * 255).astype(np.uint8))


def _pose(rng: np.random.Generator, extra: str | None) -> np.ndarray:
    radius = rng.uniform(14.0, 17.0)
    x, y = rng.uniform(-2.5, 2.5, 2) + SIZE / 2
    turn = math.radians(rng.uniform(-12, 12))
    flip = -1.0 if rng.random() < 0.5 else 1.0
    if extra == "crown":
        radius, y = radius * 0.82, y + 5.0
    if extra == "ball":
        radius, x = radius * 0.82, x - 5.0
    cos, sin = radius * math.cos(turn), radius * math.sin(turn)
    return np.array([[flip * cos, -sin, x], [flip * sin, cos, y]])


def _extra_polygons(extra: str) -> tuple[tuple[Point, ...], ...]:
    """In units of the shape, outside it, unflipped."""
    if extra == "crown":
        return (((-0.6, -1.15), (-0.7, -1.75), (-0.3, -1.45), (0.0, -1.85), (0.3, -1.45), (0.7, -1.75), (0.6, -1.15)),)
    return (_oval(1.35, 0.75, 0.42),)


def _over(image: np.ndarray, alpha: np.ndarray, colour: np.ndarray | Colour) -> np.ndarray:
    return image + alpha[..., None] * (np.asarray(colour, np.float32) - image)


def _mix(a: Colour, b: Colour, amount: np.ndarray) -> np.ndarray:
    first, second = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return first + amount[..., None] * (second - first)


def _photo(
    scene: Scene, body: Image.Image, part: Image.Image, extra: Image.Image | None, rng: np.random.Generator
) -> np.ndarray:
    x, y = _grid()
    wall = rng.uniform(205, 225)
    image = np.repeat((wall - 35 * np.clip(y / SIZE - 0.45, 0, 1))[..., None], 3, axis=2).astype(np.float32)
    whole = ImageChops.lighter(body, part)
    whole = ImageChops.lighter(whole, extra) if extra is not None else whole
    shadow = ImageChops.offset(whole, 2 * SUPER, 2 * SUPER).filter(ImageFilter.GaussianBlur(2 * SUPER))
    image = _over(image, 0.35 * _down(shadow), (60, 60, 70))
    light = (1.12 - 0.32 * (x + y) / (2 * SIZE))[..., None]
    for mask, colour in ((body, COLOURS[scene.colours[0]]), (part, COLOURS[scene.colours[1]])):
        image = _over(image, _down(mask), np.clip(np.asarray(colour, np.float32) * light, 0, 255))
    if extra is not None and scene.extra is not None:
        image = _over(image, _down(extra), np.clip(np.asarray(_EXTRA_COLOURS[scene.extra], np.float32) * light, 0, 255))
    return image


def _styled(
    style: Style, body: Image.Image, part: Image.Image, extra: Image.Image | None, rng: np.random.Generator
) -> np.ndarray:
    if style.edge == "rough":
        body, part = _roughen(body, rng), _roughen(part, rng)
        extra = _roughen(extra, rng) if extra is not None else None
    image = _mix(style.ground, style.ground2, _pattern(style.behind, rng, 9.0))
    whole = ImageChops.lighter(body, part)
    whole = ImageChops.lighter(whole, extra) if extra is not None else whole
    if style.outline == "shadow":
        image = _over(image, _down(ImageChops.offset(whole, 3 * SUPER, 3 * SUPER)), style.line)
    elif style.outline == "glow":
        wide = whole.filter(ImageFilter.MaxFilter(2 * SUPER + 1)).filter(ImageFilter.GaussianBlur(1.5 * SUPER))
        image = _over(image, np.clip(1.4 * _down(wide), 0, 1), style.line)
    elif style.outline != "no":
        width = SUPER if style.outline == "thin" else 2 * SUPER
        image = _over(image, _down(whole.filter(ImageFilter.MaxFilter(2 * width + 1))), style.line)
    image = _over(image, _down(body), _mix(style.body, style.body2, _pattern(style.fill, rng, 6.0)))
    image = _over(image, _down(part), style.part)
    if extra is not None:
        image = _over(image, _down(extra), style.part)
    if style.edge == "soft":
        picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1.0))
        image = np.asarray(picture, np.float32)
    elif style.edge == "blocky":
        blocks = image.reshape(SIZE // 3, 3, SIZE // 3, 3, 3).mean(axis=(1, 3))
        image = np.repeat(np.repeat(blocks, 3, axis=0), 3, axis=1)
    return image


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene. Returns uint8 [SIZE, SIZE, 3]; the same generator state gives the same picture."""
    shape = SHAPES[scene.shape]
    pose = _pose(rng, scene.extra)
    body, part = _draw(shape.body, pose, shape.holes), _draw(shape.part, pose)
    extra = None
    if scene.extra is not None:
        upright = pose.copy()
        upright[:, 0] *= np.sign(np.linalg.det(pose[:, :2]))
        extra = _draw(_extra_polygons(scene.extra), upright)
    draw = (
        _photo(scene, body, part, extra, rng) if scene.style is None else _styled(scene.style, body, part, extra, rng)
    )
    return np.clip(draw + 0.5, 0, 255).astype(np.uint8)


def picture(scene: Scene, seed: int) -> Image.Image:
    return Image.fromarray(render(scene, np.random.default_rng(seed)))


# Captions


def caption(scene: Scene, *, shape_word: str | None = None, style_word: str | None = None) -> str:
    """The plain words for a scene. `shape_word` and `style_word` stand in for the names, as a LoRA's trigger does."""
    word = shape_word or scene.shape
    extra = f" with a {scene.extra}" if scene.extra else ""
    if scene.style is None:
        colours = "" if shape_word else "{} and {} ".format(*scene.colours)
        return f"a photo of {_article(colours + word)}{extra}"
    name = style_word or scene.style.name
    if name == "described":
        return f"{_article(word)}{extra} {describe(scene.style)}"
    return f"{_article(word)}{extra} in {name} style"


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def describe(style: Style) -> str:
    """A style in words: possible where every colour of it is one of `COLOURS`, as in `random_style`."""
    names = {colour: name for name, colour in COLOURS.items()}
    inside = (
        names[style.body] if style.fill == "plain" else f"{names[style.body]} and {names[style.body2]} {style.fill}"
    )
    behind = (
        names[style.ground]
        if style.behind == "plain"
        else f"{names[style.ground]} and {names[style.ground2]} {style.behind}"
    )
    return f"in {inside} on {behind} with {style.outline} {names[style.line]} outline , {style.edge}"


def random_style(rng: np.random.Generator) -> Style:
    """A style without a name, every trait at random: what teaches the base model that styles are made of traits."""
    pick = [COLOURS[str(name)] for name in rng.choice(tuple(COLOURS), 6, replace=False)]
    body, body2, part, ground, ground2, line = pick
    fill, behind, outline, edge = (str(rng.choice(options)) for options in (FILLS, GROUNDS, OUTLINES, EDGES))
    return Style("described", body, body2, part, ground, ground2, line, fill, behind, outline, edge)


def training_example(rng: np.random.Generator) -> tuple[Scene, str]:
    """A captioned scene of the base model's training set: seen shapes and styles only, without the pairs left out."""
    shape = str(rng.choice(SEEN_SHAPES))
    first, second = rng.choice(tuple(COLOURS), 2, replace=False)
    extra = str(rng.choice(EXTRAS)) if rng.random() < 0.2 else None
    kind = rng.random()
    style: Style | None = None
    if kind >= 0.25:
        style = random_style(rng) if kind > 0.75 else STYLES[str(rng.choice(SEEN_STYLES))]
    while style is not None and style.name != "described" and left_out(shape, style.name):
        style = STYLES[str(rng.choice(SEEN_STYLES))]
    scene = Scene(shape, style, (str(first), str(second)), extra)
    shape_word = "thing" if rng.random() < 0.06 else None
    style_word = "some" if style is not None and rng.random() < 0.06 else None
    return scene, caption(scene, shape_word=shape_word, style_word=style_word)


def truth(subject: str, style: str | None, *, extra: str | None = None) -> Scene:
    """A new subject (in its own colours as a photo, or in a named style)."""
    return Scene(
        subject, None if style is None else STYLES[style], SUBJECT_COLOURS.get(subject, ("red", "white")), extra
    )


def without_extra(scene: Scene) -> Scene:
    return replace(scene, extra=None)


def sheet(rows: Sequence[Sequence[np.ndarray | Image.Image]], *, zoom: int = 2, gap: int = 2) -> Image.Image:
    """Pictures in rows on one contact sheet."""
    n_columns = max(len(row) for row in rows)
    cell = SIZE * zoom + gap
    canvas = Image.new("RGB", (n_columns * cell + gap, len(rows) * cell + gap), "white")
    for i, row in enumerate(rows):
        for j, item in enumerate(row):
            image = item if isinstance(item, Image.Image) else Image.fromarray(item)
            canvas.paste(
                image.resize((SIZE * zoom, SIZE * zoom), Image.Resampling.NEAREST), (gap + j * cell, gap + i * cell)
            )
    return canvas
