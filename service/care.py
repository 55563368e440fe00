"""The care of a catalog: every object held against its sha256, garbage found and removed, entries taken back.

Deleting is the only dangerous thing here. What an entry names is never garbage, a job whose entry cannot be read is
left alone, and an attempt without an entry is garbage only when it is older than any commit can be: see
`catalog.COMMIT_S`.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby
from pathlib import Path

from service.entry import ATTEMPT, JOB_ID, Entry, Object, Unreadable
from service.errors import NotFound, StorageError
from service.files import local_errors
from service.pull import THREADS, difference
from service.steps import Steps, parallel
from service.storage import ObjectInfo, Store, Unfinished

ATTEMPT_KEY = re.compile(rf"(pairs/({JOB_ID.pattern})/({ATTEMPT.pattern}))/.+")


@dataclass(frozen=True, slots=True)
class Checked:
    """One object of a catalog, sound unless there is a problem."""

    key: str
    job_id: str  # of a LoRA that a run trained: its training's
    name: str
    size: int  # bytes, as the entry says
    sha256: str  # as the entry says
    problem: str | None = None


def verify(
    store: Store,
    promised: Iterable[tuple[str, Object]],
    unreadable: Sequence[Unreadable] = (),
    known: Mapping[str, str] | None = None,
) -> Steps[Checked]:
    """Every object that is promised, (id of job or training, object), read and compared, many at a time. A store that
    does not answer ends it, all else is a result. Objects of `known` (key → sha256: a `VerifyRecord`'s) that are
    promised the same are not read again."""
    known = known or {}
    objects = [(job_id, item) for job_id, item in promised if known.get(item.key) != item.sha256]

    def check(work: tuple[str, Object]) -> Checked:
        job_id, item = work
        return Checked(item.key, job_id, item.name, item.size, item.sha256, _problem(store, item))

    def start() -> Iterator[Checked]:
        for record in unreadable:
            yield Checked(record.key, "", "", 0, "", record.reason)
        yield from parallel(check, objects, THREADS, ordered=False)

    return Steps(len(objects) + len(unreadable), start)


def _problem(store: Store, item: Object) -> str | None:
    digest, size = hashlib.sha256(), 0
    try:
        for chunk in store.stream(item.key):
            digest.update(chunk)
            size += len(chunk)
            if size > item.size:
                break
    except NotFound:
        return "it is missing"
    return difference(item, size, digest.hexdigest())


class VerifyRecord:
    """What a verification has found so far, a line per object, so that one that was cut short goes on where it stopped.

    The first line names the catalog. A last line that was cut by a kill does not count.
    """

    def __init__(self, path: Path, catalog: str) -> None:
        self.path = path
        self.sound: dict[str, str] = {}  # key → sha256
        with local_errors(path):
            lines = path.read_text(errors="replace").splitlines() if path.exists() else []
            if lines and _line(lines[0]).get("catalog") != catalog:
                raise StorageError(f"{path} is no record of verifying {catalog}: name another file")
            for line in map(_line, lines[1:]):
                if line.get("problem") is None and isinstance(line.get("key"), str):
                    self.sound[line["key"]] = str(line.get("sha256"))
                else:
                    self.sound.pop(str(line.get("key")), None)
            self.file = path.open("a")
            self.file.write("\n" if lines else json.dumps({"catalog": catalog}) + "\n")

    def add(self, checked: Checked) -> None:
        with local_errors(self.path):
            at = datetime.now(UTC).isoformat(timespec="seconds")
            line = {"key": checked.key, "sha256": checked.sha256, "problem": checked.problem, "at": at}
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def close(self) -> None:
        self.file.close()


def _line(text: str) -> dict:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


# Garbage


@dataclass(frozen=True, slots=True)
class Garbage:
    """What may go: the objects of an attempt that no entry names, a trained LoRA that no record names, an abandoned
    checkpoint, or an upload that was never finished."""

    name: str
    objects: tuple[ObjectInfo, ...]
    unfinished: Unfinished | None
    reason: str

    @property
    def size(self) -> int:
        """Bytes, as far as they are known: a store does not say what lies in an unfinished upload."""
        return sum(item.size for item in self.objects)


def find_garbage(
    store: Store, committed: Collection[str], entry: Callable[[str], Entry | None], older_than_s: float, now: datetime
) -> Iterator[Garbage]:
    """What is garbage at `now`. `committed` are the ids of all entries, `entry` reads one: None when there is none,
    Corrupted when it cannot be used, in which case nothing of that job is touched.

    One listing; entries are read only of jobs that have several attempts.
    """
    limit = now - timedelta(seconds=older_than_s)
    for job_id, attempts in _attempts(store):
        if job_id in committed and len(attempts) == 1:
            continue
        for name, objects in attempts.items():
            if max(item.modified for item in objects) < limit:
                found = Garbage(name, tuple(objects), None, "no entry names it")
                if is_garbage(found, entry):
                    yield found
    for upload in store.unfinished():
        if upload.started < limit:
            yield Garbage(upload.key, (), upload, f"begun {upload.started:%Y-%m-%d %H:%M} and never finished")


def is_garbage(garbage: Garbage, entry: Callable[[str], Entry | None]) -> bool:
    """Whether no entry names any of an attempt's objects."""
    try:
        found = entry(garbage.name.split("/")[1])
    except StorageError:  # unreadable, or no answer: then nothing is known
        return False
    named = {item.key for item in found.objects.values()} if found else set()
    return not named & {item.key for item in garbage.objects}


def collect(
    store: Store, garbage: Iterable[Garbage], is_still: Callable[[Garbage], bool]
) -> Iterator[tuple[Garbage, bool]]:
    """Delete it; (what, whether it is gone). Whether it `is_still` garbage is asked of each right before."""

    def remove(item: Garbage) -> tuple[Garbage, bool]:
        if item.unfinished is not None:
            store.discard(item.unfinished)
            return item, True
        if not is_still(item):
            return item, False
        for found in item.objects:
            store.delete(found.key)
        return item, True

    return parallel(remove, garbage, THREADS, ordered=False)


def _attempts(store: Store) -> Iterator[tuple[str, dict[str, list[ObjectInfo]]]]:
    """(job id, attempt prefix → its objects) of everything under pairs/; keys of another form are nobody's garbage."""
    matched = ((ATTEMPT_KEY.fullmatch(found.key), found) for found in store.list("pairs/"))
    ours = ((match, found) for match, found in matched if match)
    for job_id, group in groupby(ours, lambda pair: pair[0][2]):
        attempts: dict[str, list[ObjectInfo]] = {}
        for match, found in group:
            attempts.setdefault(match[1], []).append(found)
        yield job_id, attempts


# Taking back


def remove(store: Store, keys: Callable[[str], str], entries: Sequence[Entry]) -> Steps[Entry]:
    """Take these entries back: first the entry, at `keys(job_id)`, so that no reader ever sees half of one, then its
    objects. What a kill leaves in between is garbage, which `find_garbage` finds."""

    def gone(entry: Entry) -> Entry:
        store.delete(keys(entry.job_id))
        for item in entry.objects.values():
            store.delete(item.key)
        return entry

    return Steps(len(entries), lambda: parallel(gone, entries, THREADS, ordered=False))
