"""Two catalogs: how they differ, and one copied into the other."""

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from service.entry import Entry, Object, Unreadable
from service.errors import AlreadyCommitted, Corrupted, StorageError
from service.files import local_errors
from service.pull import difference
from service.steps import Steps, parallel
from service.storage import Store

ENTRIES = 4  # copied at a time; each takes the disk space of its largest object meanwhile


@dataclass(frozen=True, slots=True)
class Difference:
    """One job of which two catalogs do not hold the same. `details` names objects, or fields of the identity."""

    kind: Literal["only first", "only second", "objects differ", "made otherwise"]
    subject: str
    style: str
    method: str
    job_ids: tuple[str, ...]
    details: tuple[str, ...] = ()


def differences(first: Iterable[Entry], second: Iterable[Entry]) -> list[Difference]:
    """What differs, sorted by pair and method; none for catalogs of the same content (`Catalog.digest`).

    A job is its identity. Two entries of the same pair and method under different ids were made otherwise: then the
    fields of the identity that differ are named. Entries are kept while this runs.
    """
    a, b = ({entry.job_id: entry for entry in entries} for entries in (first, second))
    found = [_objects_differ(a[id], b[id]) for id in a.keys() & b.keys() if _content(a[id]) != _content(b[id])]
    lone = _by_name(a[id] for id in a.keys() - b.keys()), _by_name(b[id] for id in b.keys() - a.keys())
    for name in lone[0].keys() | lone[1].keys():
        mine, theirs = (side.get(name, []) for side in lone)
        pairs = min(len(mine), len(theirs))
        for one, other in zip(mine[:pairs], theirs[:pairs], strict=True):
            fields = tuple(changed_fields(one.job, other.job))
            found.append(Difference("made otherwise", *name, (one.job_id, other.job_id), fields))
        found += [Difference("only first", *name, (entry.job_id,)) for entry in mine[pairs:]]
        found += [Difference("only second", *name, (entry.job_id,)) for entry in theirs[pairs:]]
    return sorted(found, key=lambda item: (item.subject, item.style, item.method, item.kind, item.job_ids))


def changed_fields(one: Any, other: Any, field: str = "") -> Iterator[str]:
    """`knobs.steps: 100 → 200` for every field that differs."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for name in sorted(one.keys() | other.keys()):
            yield from changed_fields(one.get(name), other.get(name), f"{field}.{name}".lstrip("."))
    elif one != other:
        yield f"{field}: {_short(one)} → {_short(other)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def _objects_differ(one: Entry, other: Entry) -> Difference:
    mine, theirs = _content(one), _content(other)
    names = tuple(name for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name))
    return Difference("objects differ", one.subject, one.style, one.method, (one.job_id,), names)


def _content(entry: Entry) -> dict[str, str]:
    return {item.name: item.sha256 for item in entry.objects.values()}


def _by_name(entries: Iterable[Entry]) -> dict[tuple[str, str, str], list[Entry]]:
    found: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: entry.job_id):
        found.setdefault((entry.subject, entry.style, entry.method), []).append(entry)
    return found


@dataclass(frozen=True, slots=True)
class Copied:
    """What became of one entry. `kept`: it was there, with the same content; a failed one is not committed there."""

    job_id: str
    pair: str
    state: Literal["copied", "kept", "failed"]
    n_bytes: int = 0
    problem: str | None = None


def copy(
    source: Store,
    dest: Store,
    entries: Sequence[Entry],
    unreadable: Sequence[Unreadable],
    existing: Callable[[str], Entry | None],
    publish: Callable[[Entry, datetime], Entry],
) -> Steps[Copied]:
    """Copy entries with their objects, verified on the way, several at a time; running it again goes on.

    `existing` and `publish` are the receiving catalog's: an entry is written after its objects, under the same protocol
    as a worker's. An entry that is there with other content stays as it is and is a failure here.
    """

    def one(entry: Entry) -> Copied:
        pair = f"{entry.subject}/{entry.style}"
        try:
            began, found = datetime.now(UTC), existing(entry.job_id)
            if found is None:
                for item in entry.objects.values():
                    _copy_object(source, dest, item)
                with contextlib.suppress(AlreadyCommitted):  # compared below, as if it had been there before
                    publish(entry, began)
                    return Copied(entry.job_id, pair, "copied", entry.n_bytes)
                found = existing(entry.job_id)
            if found is None or _content(found) != _content(entry):
                raise Corrupted(
                    f"{dest.url} has job {entry.job_id[:12]} ({pair}) with other content: see `ziplora diff`,"
                    " and remove one of them"
                )
            return Copied(entry.job_id, pair, "kept")
        except StorageError as error:
            return Copied(entry.job_id, pair, "failed", problem=str(error))

    def start() -> Iterator[Copied]:
        for record in unreadable:
            yield Copied("", record.key, "failed", problem=record.reason)
        yield from parallel(one, entries, ENTRIES, ordered=False)

    return Steps(len(entries) + len(unreadable), start)


def _copy_object(source: Store, dest: Store, item: Object) -> None:
    """By way of a local file: it is put only once it is known to be what the entry says."""
    with tempfile.TemporaryDirectory(prefix="ziplora-copy-") as directory:
        path, digest, size = Path(directory, "object"), hashlib.sha256(), 0
        with local_errors(path), path.open("wb") as file:
            for chunk in source.stream(item.key):
                size += len(chunk)
                if size > item.size:
                    break
                digest.update(chunk)
                file.write(chunk)
        problem = difference(item, size, digest.hexdigest())
        if problem:
            raise Corrupted(f"{source.url}/{item.key} is not what its entry says: {problem}; verify the catalog")
        dest.put(item.key, path, content_type=item.content_type)
