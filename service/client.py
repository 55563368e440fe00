"""A catalog in somebody's own Python: choose merges, and load each as a local file.

from service import Catalog

for merge in Catalog("s3://bucket/catalog").where(style="water*", method="best"):
    pipeline.load_lora_weights(merge.path)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from service.choose import score
from service.entry import Entry, Object, why_no_lora
from service.errors import Corrupted, NotFound
from service.inputs import LocalCache, user_cache
from service.model_card import triggers
from service.pull_layouts import LORA, samples
from service.storage import Store

CACHE_BYTES = 50 * 2**30


@dataclass(frozen=True, slots=True)
class Merge:
    """One merge; its files are fetched when they are asked for."""

    entry: Entry
    store: Store
    cache: LocalCache

    @property
    def subject(self) -> str:
        return self.entry.subject

    @property
    def style(self) -> str:
        return self.entry.style

    @property
    def method(self) -> str:
        return self.entry.method

    @property
    def trigger(self) -> str:
        """The words that stand for subject and style in a prompt."""
        return triggers(self.entry)

    def score(self, by: str = "harmonic") -> float | None:
        """One of `choose.SCORES`; None if the merge was not scored so."""
        return score(self.entry, by)

    @property
    def path(self) -> Path:
        """The merged LoRA as a local file, verified: the catalog's own where it is a directory, else a copy in this
        user's cache, where it stays until room is needed. NotFound for methods that leave no LoRA, Corrupted, …"""
        return self.file(LORA)

    @property
    def pictures(self) -> list[tuple[str, Path]]:
        """(prompt, local file) of the samples at full style strength."""
        return [(prompt, self.file(name)) for name, prompt in samples(self.entry)]

    def file(self, name: str) -> Path:
        """Any object of the entry by its name, such as `mergers.safetensors`, as a local file, verified."""
        item = self.entry.objects.get(name)
        if item is None and name == LORA:
            raise NotFound(f"the merge {self.subject}/{self.style} has no {name}: {why_no_lora(self.entry)}")
        if item is None:
            raise NotFound(
                f"the merge {self.subject}/{self.style} ({self.method}) has no {name}; it has"
                f" {', '.join(sorted(self.entry.objects))}"
            )
        return _fetched(self.store, item, self.cache)


class Selection(Sequence[Merge]):
    """The merges that were asked for, in the order of their job ids, or best first if there was a `top`."""

    def __init__(self, store: Store, entries: Sequence[Entry], cache: Path | None = None) -> None:
        self.merges = [Merge(entry, store, LocalCache(cache or user_cache(), CACHE_BYTES)) for entry in entries]

    def __len__(self) -> int:
        return len(self.merges)

    def __iter__(self) -> Iterator[Merge]:
        return iter(self.merges)

    @overload
    def __getitem__(self, index: int) -> Merge: ...

    @overload
    def __getitem__(self, index: slice) -> list[Merge]: ...

    def __getitem__(self, index: int | slice) -> Merge | list[Merge]:
        return self.merges[index]


def _fetched(store: Store, item: Object, cache: LocalCache) -> Path:
    size = store.head(item.key).size
    if size != item.size:  # before a byte of it is taken
        raise Corrupted(f"{store.url}/{item.key} has {size} bytes, its entry says {item.size}; verify the catalog")
    return cache.fetch(f"{store.url}/{item.key}", item.sha256)
