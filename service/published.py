"""What the ZipLoRA paper reports of itself and of what it compares with (arXiv 2311.13600v2), to stand beside one's own
figures. Those of the paper come from its own subjects, styles, base models and judges: what can be compared is which
method comes before which, not the level.
"""

from collections.abc import Mapping
from dataclasses import dataclass

PAPER = "https://arxiv.org/abs/2311.13600"
SOURCE = (
    "published: arXiv 2311.13600v2, style / subject / text alignment on the paper's own 4 subjects × 8 styles,"
    " StyleDrop on Muse; other data, base and judges than these merges have, so compare the order of methods and not"
    " the level"
)


@dataclass(frozen=True, slots=True)
class Published:
    """Alignments by base architecture as (style: CLIP-I, subject: DINO, text: CLIP-T), from the paper's main table
    (SDXL 1.0) and its supplement's Table 1 (SD 1.5). `preferred`: share of answers that preferred ZipLoRA over this
    method (its poster); `seconds`: for a pair on one A100."""

    name: str
    alignments: Mapping[str, tuple[float, float, float]]
    preferred: float | None = None
    seconds: float | None = None


PUBLISHED: dict[str, Published] = {
    "ziplora": Published("ZipLoRA", {"sdxl": (0.699, 0.420, 0.303), "sd15": (0.651, 0.413, 0.283)}, None, 560.0),
    "joint": Published("joint training", {"sdxl": (0.680, 0.378, 0.296), "sd15": (0.579, 0.235, 0.247)}, 0.711, 3540.0),
    "direct": Published("direct merge", {"sdxl": (0.702, 0.357, 0.275), "sd15": (0.581, 0.222, 0.241)}, 0.827),
    "styledrop": Published(
        "StyleDrop + DreamBooth", {"sdxl": (0.646, 0.394, 0.263), "sd15": (0.646, 0.394, 0.263)}, 0.680
    ),
    "mix-of-show": Published(
        "Mix-of-Show", {"sdxl": (0.635, 0.374, 0.251), "sd15": (0.618, 0.323, 0.221)}, 0.873, 4980.0
    ),
    "custom-diffusion": Published(
        "Custom Diffusion", {"sdxl": (0.616, 0.346, 0.262), "sd15": (0.574, 0.311, 0.237)}, 0.881, 3890.0
    ),
}
