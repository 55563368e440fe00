"""Pulling from a catalog while a batch fills it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from service.choose import Choice, matches, not_compared
from service.entry import Entry, Unreadable
from service.errors import Corrupted, NotFound, Unavailable
from service.pull import Pulled, PullOptions, pull

if TYPE_CHECKING:
    from service.catalog import Catalog


def follow(
    catalog: "Catalog",
    dest: Path,
    options: PullOptions,
    patterns: tuple[str, str, str],
    choice: Callable[[list[Entry]], Choice],
    wait: Callable[[], None],
) -> Iterator[Pulled]:
    """Pull what `choice` takes of the entries that match (subject, style, method), `wait`, pull what has come since,
    and so on, until a run leaves its record: a `runs/<id>/summary.json` that was not there at the beginning.

    Only entries that are new are read. A file that fails is reported, and tried again in the next round. With a
    choice by score, what a later merge surpasses stays where it was pulled.
    """
    before = _records(catalog)
    entries: dict[str, Entry] = {}
    reported: set[str] = set()
    done: set[str] = set()
    while True:
        ended = _records(catalog) > before  # before the listing: what was committed until then is seen below
        unreadable = list(_read_new(catalog, entries, reported))
        chosen = choice([entries[job_id] for job_id in sorted(entries) if matches(entries[job_id], *patterns)])
        skipped = [item for item in not_compared(chosen) if ended]  # before that, its score may still come
        fresh = [entry for entry in chosen.entries if entry.job_id not in done]
        failed = set()
        for pulled in pull(catalog.store, fresh, dest, options, unreadable=unreadable, skipped=skipped):
            failed |= {pulled.job_id} if pulled.state == "failed" else set()
            yield pulled
        done |= {entry.job_id for entry in fresh} - failed
        if ended:
            return
        wait()


def _read_new(catalog: "Catalog", entries: dict[str, Entry], reported: set[str]) -> Iterator[Unreadable]:
    """Add the entries that are not known yet; each that cannot be read is reported once."""
    for job_id in sorted(catalog.committed() - entries.keys() - reported):
        try:
            entries[job_id] = catalog.entry(job_id)
        except Corrupted as error:
            reported.add(job_id)
            yield Unreadable(job_id, str(error))
        except (NotFound, Unavailable):  # taken back since the listing, or the store is busy: next time
            continue


def _records(catalog: "Catalog") -> set[str]:
    return {found.key for found in catalog.store.list("runs/") if found.key.endswith("/summary.json")}
