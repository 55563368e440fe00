"""The styles of the pocket world: palette, fill, background, outline and edge."""

from __future__ import annotations

from dataclasses import dataclass

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
