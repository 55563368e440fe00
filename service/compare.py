"""Two catalogs: how they differ, and one copied into the other. LoRAs that runs trained are part of both."""

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from service.entry import Entry, Object, Unreadable
from service.errors import AlreadyCommitted, Corrupted, NotFound, StorageError
from service.files import local_errors
from service.jobs import TRAINING
from service.pull import difference
from service.steps import Steps, parallel
from service.storage import Store
from service.trained import TrainedLoRA, TrainedLoRAs

ENTRIES = 4  # copied at a time; each takes the disk space of its largest object meanwhile


@dataclass(frozen=True, slots=True)
class Difference:
    """One job of which two catalogs do not hold the same, or one LoRA that a run trained: that has a subject or a style
    and the method `train`. `details` names objects, or fields of the identity."""

    kind: Literal["only first", "only second", "objects differ", "made otherwise"]
    subject: str
    style: str
    method: str
    job_ids: tuple[str, ...]
    details: tuple[str, ...] = ()

    @property
    def pair(self) -> str:
        """What messages call it: dog/ink, or subjects.dog of a trained LoRA."""
        if self.method == TRAINING:
            return f"subjects.{self.subject}" if self.subject else f"styles.{self.style}"
        return f"{self.subject}/{self.style}"


@dataclass(frozen=True, slots=True)
class Held:
    """What a catalog holds under one id, for comparing."""

    id: str
    name: tuple[str, str, str]  # subject, style, method
    made_of: Mapping[str, Any]  # the identity
    content: Mapping[str, str]  # object name → sha256


def held(one: Entry | TrainedLoRA) -> Held:
    if isinstance(one, Entry):
        return Held(one.job_id, (one.subject, one.style, one.method), one.job, _content(one))
    names = (one.name, "") if one.role == "subject" else ("", one.name)
    return Held(one.training_id, (*names, TRAINING), one.training, {one.object.name: one.sha256})


def differences(first: Iterable[Held], second: Iterable[Held]) -> list[Difference]:
    """What differs, sorted by pair and method; none for catalogs of the same content.

    A job is its identity. Two entries of the same pair and method under different ids were made otherwise: then the
    fields of the identity that differ are named. All is kept while this runs.
    """
    a, b = ({item.id: item for item in items} for items in (first, second))
    found = [_objects_differ(a[id], b[id]) for id in a.keys() & b.keys() if a[id].content != b[id].content]
    lone = _by_name(a[id] for id in a.keys() - b.keys()), _by_name(b[id] for id in b.keys() - a.keys())
    for name in lone[0].keys() | lone[1].keys():
        mine, theirs = (side.get(name, []) for side in lone)
        pairs = min(len(mine), len(theirs))
        for one, other in zip(mine[:pairs], theirs[:pairs], strict=True):
            fields = tuple(changed_fields(one.made_of, other.made_of))
            found.append(Difference("made otherwise", *name, (one.id, other.id), fields))
        found += [Difference("only first", *name, (item.id,)) for item in mine[pairs:]]
        found += [Difference("only second", *name, (item.id,)) for item in theirs[pairs:]]
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


def _objects_differ(one: Held, other: Held) -> Difference:
    mine, theirs = one.content, other.content
    names = tuple(name for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name))
    return Difference("objects differ", *one.name, (one.id,), names)


def _content(entry: Entry) -> dict[str, str]:
    return {item.name: item.sha256 for item in entry.objects.values()}


def _by_name(items: Iterable[Held]) -> dict[tuple[str, str, str], list[Held]]:
    found: dict[tuple[str, str, str], list[Held]] = {}
    for item in sorted(items, key=lambda item: item.id):
        found.setdefault(item.name, []).append(item)
    return found


@dataclass(frozen=True, slots=True)
class Copied:
    """What became of one entry, or of one LoRA that a run `trained`. `kept`: it was there, with the same content; a
    failed one is not committed there."""

    job_id: str
    pair: str
    state: Literal["copied", "kept", "failed"]
    n_bytes: int = 0
    problem: str | None = None
    trained: bool = False


def copy(
    source: Store,
    dest: Store,
    entries: Sequence[Entry],
    loras: Sequence[TrainedLoRA],
    unreadable: Sequence[Unreadable],
    existing: Callable[[str], Entry | None],
    publish: Callable[[Entry, datetime], Entry],
) -> Steps[Copied]:
    """Copy entries with their objects and trained LoRAs, verified on the way, several at a time; running it again goes
    on.

    `existing` and `publish` are the receiving catalog's: an entry is written after its objects, under the same protocol
    as a worker's, and so is a LoRA's record. What is there with other content stays as it is and is a failure here.
    """

    def entry_copied(entry: Entry) -> int | None:
        """Bytes; None where it was there."""
        began, found = datetime.now(UTC), existing(entry.job_id)
        if found is None:
            for item in entry.objects.values():
                _copy_object(source, dest, item)
            with contextlib.suppress(AlreadyCommitted):  # compared below, as if it had been there before
                publish(entry, began)
                return entry.n_bytes
            found = existing(entry.job_id)
        if found is None or _content(found) != _content(entry):
            raise _other_content(dest, f"job {entry.job_id[:12]} ({entry.subject}/{entry.style})")
        return None

    def lora_copied(lora: TrainedLoRA) -> int | None:
        there, n_bytes = TrainedLoRAs(dest), None
        try:
            found = there.get(lora.training_id)
        except NotFound:
            _copy_object(source, dest, lora.object)
            found, n_bytes = there.publish(lora), lora.size
        if found.sha256 != lora.sha256:
            raise _other_content(dest, f"training {lora.training_id[:12]} ({lora.called})")
        return n_bytes

    def one(item: Entry | TrainedLoRA) -> Copied:
        if isinstance(item, TrainedLoRA):
            told = Copied(item.training_id, item.called, "kept", trained=True)
        else:
            told = Copied(item.job_id, f"{item.subject}/{item.style}", "kept")
        try:
            n_bytes = lora_copied(item) if isinstance(item, TrainedLoRA) else entry_copied(item)
        except StorageError as error:
            return replace(told, state="failed", problem=str(error))
        return told if n_bytes is None else replace(told, state="copied", n_bytes=n_bytes)

    def start() -> Iterator[Copied]:
        for record in unreadable:
            yield Copied("", record.key, "failed", problem=record.reason)
        items: list[Entry | TrainedLoRA] = [*loras, *entries]
        yield from parallel(one, items, ENTRIES, ordered=False)

    return Steps(len(entries) + len(loras) + len(unreadable), start)


def _other_content(dest: Store, what: str) -> Corrupted:
    return Corrupted(f"{dest.url} has {what} with other content: see `ziplora diff`, and remove one of them")


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
