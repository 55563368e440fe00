"""A LoRA that is another one later in sampling: in each module first one LoRA is applied, then a second.

A sampler calls what `applied` or `applied_side_by_side` yield before each step, with the share of the steps that are
done; plain LoRAs take no notice.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from ziplora.lora import LoRA, concat, select
from ziplora.slots import Slots

Follow = Callable[[float | Sequence[float]], None]  # of the whole batch, or of each merge in it


@dataclass(frozen=True, slots=True, eq=False)
class Switched:
    """`until`: module path → the share of the steps up to which, and at which, `first` is applied there; then `second`.
    Below 0 that is from the start, and at 1 never. A module that `until` does not name has both throughout."""

    first: LoRA
    second: LoRA
    until: Mapping[str, float]

    def shows_first(self, share: float) -> frozenset[str]:
        """The modules of `until` that have `first` when this share of the steps is done."""
        return frozenset(path for path, until in self.until.items() if share <= until)

    def at(self, share: float) -> LoRA:
        """What is applied when this share of the steps is done."""
        first = self.shows_first(share)
        return concat(
            [
                select(self.first, lambda path: path not in self.until or path in first),
                select(self.second, lambda path: path not in first),
            ]
        )

    def part(self, predicate: Callable[[str], bool]) -> "Switched":
        """The modules whose path satisfies the predicate."""
        until = {path: share for path, share in self.until.items() if predicate(path)}
        return Switched(select(self.first, predicate), select(self.second, predicate), until)


def part(lora: LoRA | Switched, predicate: Callable[[str], bool]) -> LoRA | Switched:
    """`lora.select` of either."""
    return lora.part(predicate) if isinstance(lora, Switched) else select(lora, predicate)


@contextmanager
def applied(slots: Slots, lora: LoRA | Switched) -> Iterator[Follow]:
    """`lora` in the place of the base's weights (`Slots.fused`), changed only where a switch is due."""
    if isinstance(lora, LoRA):
        with slots.fused(lora):
            yield lambda share: None
        return
    with ExitStack() as held:
        shown: frozenset[str] | None = None

        def follow(share: float | Sequence[float]) -> None:
            nonlocal shown
            assert isinstance(share, float)
            first = lora.shows_first(share)
            if first != shown:
                held.close()
                held.enter_context(slots.fused(lora.at(share)))
                shown = first

        yield follow


@contextmanager
def applied_side_by_side(slots: Slots, loras: Sequence[LoRA | Switched]) -> Iterator[Follow]:
    """Each of `loras` in a slot of its own, all of one kind. Both LoRAs of a switched one stay in its slot, one of them
    times 0, so that the shape of what is computed does not depend on the choice. Raises ValueError for a mixture."""
    switched = [lora for lora in loras if isinstance(lora, Switched)]
    if not switched:
        with slots.loaded([[lora] for lora in loras if isinstance(lora, LoRA)]):
            yield lambda share: None
        return
    if len(switched) < len(loras):
        raise ValueError("LoRAs that change during sampling share no batch with those that do not")
    paths = sorted({path for lora in switched for path in lora.until})
    like = next(iter(slots.layers.values())).weight
    shown: list[frozenset[str]] = []

    def follow(share: float | Sequence[float]) -> None:
        nonlocal shown
        shares = [share] * len(switched) if isinstance(share, float) else share
        first = [lora.shows_first(at) for lora, at in zip(switched, shares, strict=True)]
        if first != shown:
            rows = [[_weights(*one, path) for one in zip(switched, first, strict=True)] for path in paths]
            # moved at once: to a GPU, one small copy for each module would take longer than the step
            slots.weigh(dict(zip(paths, torch.tensor(rows).to(like), strict=True)))
            shown = first

    with slots.loaded([[lora.first, lora.second] for lora in switched]):
        yield follow


def _weights(lora: Switched, first: frozenset[str], path: str) -> list[float]:
    if path not in lora.until:
        return [1.0, 1.0]
    return [1.0, 0.0] if path in first else [0.0, 1.0]
