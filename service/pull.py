"""Files out of a catalog: under readable names, in parallel, resumed after a cut, and never complete unless verified.

A catalog may be somebody else's. Its entries have been checked (`entry.py`); here, file names are made from scratch,
nothing is written but below the destination, no more bytes are taken than an entry promises, and a file appears under
its final name only when its sha256 is the entry's.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, Literal

from service.entry import Entry, Object, Unreadable
from service.errors import Corrupted, NotFound, StorageError, StoreFull, Unavailable
from service.files import local_errors, make_directories, settle, settle_directory
from service.steps import Steps, parallel
from service.storage import CHUNK, Store

THREADS = 8
NAME_BYTES = 60  # of each part of a file name: subject, style, method


@dataclass(frozen=True, slots=True)
class Pulled:
    """What became of one file. `failed` carries the problem; nothing new then lies under the file's name."""

    path: Path
    job_id: str  # empty for an entry that cannot be read
    name: str  # of the object in its entry
    state: Literal["pulled", "resumed", "kept", "failed"]
    size: int  # bytes of the file
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Checked:
    """One object of a catalog, sound unless there is a problem."""

    key: str
    job_id: str
    name: str
    size: int  # bytes, as the entry says
    problem: str | None = None


def verify(store: Store, entries: Sequence[Entry], unreadable: Sequence[Unreadable] = ()) -> Steps[Checked]:
    """Every object of these entries, read and compared. A store that does not answer ends it, all else is a result."""
    objects = [(entry, item) for entry in entries for item in entry.objects.values()]

    def check(work: tuple[Entry, Object]) -> Checked:
        entry, item = work
        return Checked(item.key, entry.job_id, item.name, item.size, _problem(store, item))

    def start() -> Iterator[Checked]:
        for record in unreadable:
            yield Checked(record.key, "", "", 0, record.reason)
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
    return _difference(item, size, digest.hexdigest())


def _difference(item: Object, size: int, sha256: str) -> str | None:
    """How content differs from what its entry promises."""
    if size > item.size:
        return f"it has more than the {item.size} bytes promised"
    if size != item.size:
        return f"it has {size} bytes, {item.size} were promised"
    return None if sha256 == item.sha256 else f"its sha256 is {sha256[:12]}…, {item.sha256[:12]}… was promised"


def pull(
    store: Store, entries: Sequence[Entry], unreadable: Sequence[Unreadable], dest: Path, extras: Iterable[str] = ()
) -> Steps[Pulled]:
    """Copy the merged LoRAs of these entries, with their sidecars, to `dest`; running it again goes on where it
    stopped.

    One step per file, as they finish: `<subject>__<style>__<method>-<job>.safetensors`, `.json` and `.png`; objects
    whose name matches one of the patterns `extras` go to a directory of that name. A file that is there and has the
    right sha256 is kept; a `.part` is continued. A problem with one file is its result and does not stop the others.
    """
    extras = tuple(extras)
    files = [
        (entry, item, dest / path)
        for entry, stem in zip(entries, stems(entries), strict=True)
        for item in entry.objects.values()
        if (path := file_name(stem, item.name, extras)) is not None
    ]
    stop = threading.Event()

    def fetch(work: tuple[Entry, Object, Path]) -> Pulled:
        entry, item, path = work
        try:
            return Pulled(path, entry.job_id, item.name, _fetch(store, item, path, stop), item.size)
        except StorageError as error:
            return Pulled(path, entry.job_id, item.name, "failed", item.size, str(error))

    def start() -> Iterator[Pulled]:
        make_directories(dest)
        for record in unreadable:
            yield Pulled(dest, "", record.key, "failed", 0, record.reason)
        yield from parallel(fetch, files, THREADS, ordered=False, stop=stop)

    return Steps(len(files) + len(unreadable), start)


def stems(entries: Sequence[Entry]) -> list[str]:
    """A readable file name without suffix for each entry; all differ, also where case does not count."""
    short = [_stem(entry, 8) for entry in entries]
    seen = Counter(stem.casefold() for stem in short)
    return [s if seen[s.casefold()] == 1 else _stem(entry, 64) for s, entry in zip(short, entries, strict=True)]


def file_name(stem: str, object_name: str, extras: Iterable[str]) -> Path | None:
    """Where an object goes, relative to the destination; None when it is not wanted."""
    if object_name.startswith("merged."):
        return Path(stem + object_name.removeprefix("merged"))
    if any(fnmatchcase(object_name, pattern) for pattern in extras):
        return Path(stem, *object_name.split("/"))
    return None


def _stem(entry: Entry, digits: int) -> str:
    parts = (_file_part(text) for text in (entry.subject, entry.style, entry.method))
    return f"{'__'.join(parts)}-{entry.job_id[:digits]}"


def _file_part(text: str) -> str:
    """Letters, digits, '-' and '_' of a text: nothing that a shell, Windows or a '..' could read another way."""
    safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in unicodedata.normalize("NFC", text))
    short = safe.encode()[:NAME_BYTES].decode(errors="ignore").lstrip("-")
    return short or "_"


def _fetch(store: Store, item: Object, path: Path, stop: threading.Event) -> Literal["pulled", "resumed", "kept"]:
    """Corrupted, StoreFull, …; an incomplete `.part` stays for the next time, a wrong one does not."""
    if path.is_file() and path.stat().st_size == item.size and _sha256(path) == item.sha256:
        return "kept"
    part = path.with_name(f"{path.name}.part")
    with local_errors(path):
        make_directories(path.parent)
        with _opened(part) as file:
            have = os.fstat(file.fileno()).st_size
            free = shutil.disk_usage(part.parent).free
            if item.size - have > free:
                raise StoreFull(
                    f"{path} takes {item.size - have:,} bytes more, {free:,} are free: make room, then go on"
                )
            resumed = 0 < have <= item.size
            problem = _fill(store, item, file, stop, fresh=not resumed)
            if problem and resumed:  # the part was of something else
                resumed, problem = False, _fill(store, item, file, stop, fresh=True)
            if problem:
                part.unlink()
                raise Corrupted(f"{store.url}/{item.key} is not what its entry says: {problem}; verify the catalog")
            settle(file)
            part.replace(path)
            settle_directory(path.parent)
    return "resumed" if resumed else "pulled"


def _fill(store: Store, item: Object, file: BinaryIO, stop: threading.Event, *, fresh: bool) -> str | None:
    """Complete the file from where it ends, or from nothing; what is wrong with its content, if anything."""
    digest = hashlib.sha256()
    if fresh:
        file.truncate(0)
    file.seek(0)
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    size = file.tell()
    for chunk in store.stream(item.key, size):
        if stop.is_set():
            raise Unavailable("interrupted; run it again to go on")
        size += len(chunk)
        if size > item.size:
            break
        file.write(chunk)
        digest.update(chunk)
    return _difference(item, size, digest.hexdigest())


@contextlib.contextmanager
def _opened(part: Path) -> Iterator[BinaryIO]:
    """The partial file for reading and writing, ours alone; a symbolic link in its place is refused."""
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with open(descriptor, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Unavailable(f"{part} is being written by another pull: wait for it, then run this again") from error
        yield file


def _sha256(path: Path) -> str:
    with local_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
