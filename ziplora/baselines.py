"""Merges that need nothing but the two LoRAs."""

from collections.abc import Sequence

from ziplora.base import Base
from ziplora.baseline_knobs import DirectKnobs
from ziplora.merged import Merged, Pair


def direct(base: Base, pairs: Sequence[Pair], knobs: DirectKnobs) -> list[Merged]:
    """ΔW_m = ΔW_c + ΔW_s: Eq. 1 of ZipLoRA (arXiv 2311.13600v2), the merge everyone does."""
    return [Merged(pair.subject, pair.style, None, {}) for pair in pairs]
