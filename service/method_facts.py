"""What a manifest's method is, whether one of METHODS or `best`, before anything of it is done. No torch."""

from collections.abc import Mapping
from typing import Any

from service.choose import BEST
from ziplora.methods import METHODS


def method_names(method: str, knobs: Mapping[str, Any]) -> tuple[str, ...]:
    """The methods that a merge may come from: its own, or `best`'s candidates."""
    return tuple(one["method"] for one in knobs["of"]) if method == BEST else (method,)


def trains(method: str) -> bool:
    """Whether the method learns from the pictures of each pair; `best` does not take such."""
    return method != BEST and METHODS[method].trains


def masked(method: str) -> bool:
    """Whether it works on a masked-token base of its own, with an adapter for each concept."""
    return method != BEST and METHODS[method].masked
