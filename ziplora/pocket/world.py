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

from ziplora.pocket.shapes import NEW_SHAPES, SEEN_SHAPES, SHAPES, SUBJECT_COLOURS, Point, oval
from ziplora.pocket.styles import (
    COLOURS,
    EDGES,
    FILLS,
    GROUNDS,
    NEW_STYLES,
    OUTLINES,
    SEEN_STYLES,
    STYLES,
    Colour,
    Style,
)

__all__ = [
    "COLOURS",
    "EDGES",
    "EXTRAS",
    "FILLS",
    "GROUNDS",
    "NEW_SHAPES",
    "NEW_STYLES",
    "OUTLINES",
    "SEEN_SHAPES",
    "SEEN_STYLES",
    "SHAPES",
    "SIZE",
    "STYLES",
    "SUBJECT_COLOURS",
    "Scene",
    "Style",
    "caption",
    "describe",
    "left_out",
    "picture",
    "random_style",
    "render",
    "sheet",
    "training_example",
    "truth",
    "without_extra",
]

SIZE = 48  # pixels of a side
SUPER = 3  # masks are drawn this much larger, then averaged down

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
    return (oval(1.35, 0.75, 0.42),)


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
