"""Files out of a catalog: under readable names, in parallel, resumed after a cut, and never complete unless verified.

A catalog may be somebody else's. Its entries have been checked (`entry.py`); here, file names are made from scratch,
nothing is written but below the destination, no more bytes are taken than an entry promises and the limit allows, and a
file appears under its final name only when its sha256 is the entry's.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

from service.entry import Entry, Object, Unreadable, why_no_lora
from service.errors import Corrupted, StorageError, StoreFull, Unavailable
from service.file_names import stems
from service.files import local_errors, make_directories, replacing, settle, settle_directory
from service.pull_layouts import Placed, Shown, placed
from service.steps import Steps, parallel
from service.storage import CHUNK, Store
from ziplora.headers import LIMITS

THREADS = 8
PART = ".part"  # suffix of a file that is being written

State = Literal["pulled", "resumed", "kept", "skipped", "failed"]


@dataclass(frozen=True, slots=True)
class Pulled:
    """What became of one file, or of an entry that has none to pull (skipped). `problem` says why it was skipped or
    failed; nothing new then lies under the file's name."""

    path: Path
    job_id: str  # empty for an entry that cannot be read
    name: str  # of the object in its entry; of the file, if it was made here
    state: State
    size: int  # bytes of the file
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class PullOptions:
    """`extras` are patterns of further objects, such as `samples/*`; `limit_bytes` holds for each file; `base_model` is
    the hub id that model cards name."""

    layout: str = "flat"
    extras: tuple[str, ...] = ()
    limit_bytes: int = LIMITS.max_bytes  # the largest LoRA file that is ever read
    base_model: str | None = None


def pull(
    store: Store,
    entries: Sequence[Entry],
    dest: Path,
    options: PullOptions = PullOptions(),
    *,
    unreadable: Iterable[Unreadable] = (),
    skipped: Iterable[tuple[Entry, str]] = (),
) -> Steps[Pulled]:
    """Copy the merged LoRAs of these entries, with their sidecars, to `dest`; running it again goes on where it
    stopped.

    One step per file, as they finish. A file that is there and has the right sha256 is kept; a `.part` is continued. A
    problem with one file is its result and does not stop the others. ValueError for an unknown layout.
    """
    skipped, files = list(skipped), []
    for entry, stem in zip(entries, stems(entries), strict=True):
        found = placed(options.layout, entry, stem, options.extras, Shown(options.base_model))
        files += [(entry, file) for file in found]
        if not found:
            skipped.append((entry, why_no_lora(entry)))
    before = [Pulled(dest, "", record.key, "failed", 0, record.reason) for record in unreadable]
    before += [Pulled(dest, entry.job_id, "", "skipped", 0, reason) for entry, reason in skipped]
    stop = threading.Event()

    def fetch(work: tuple[Entry, Placed]) -> Pulled:
        entry, file = work
        path = dest / file.path
        source = file.source
        name, size = (path.name, len(source)) if isinstance(source, bytes) else (source.name, source.size)
        state: State
        try:
            if isinstance(source, bytes):
                state = write(source, dest, file.path)
            else:
                state = _fetch(store, source, dest, file.path, options, stop)
            return Pulled(path, entry.job_id, name, state, size)
        except StorageError as error:
            return Pulled(path, entry.job_id, name, "failed", size, str(error))

    def start() -> Iterator[Pulled]:
        with local_errors(dest):
            make_directories(dest)
        yield from before
        yield from parallel(fetch, files, THREADS, ordered=False, stop=stop)

    return Steps(len(before) + len(files), start)


def difference(item: Object, size: int, sha256: str) -> str | None:
    """How content differs from what its entry promises."""
    if size > item.size:
        return f"it has more than the {item.size} bytes promised"
    if size != item.size:
        return f"it has {size} bytes, {item.size} were promised"
    return None if sha256 == item.sha256 else f"its sha256 is {sha256[:12]}…, {item.sha256[:12]}… was promised"


def _fetch(
    store: Store, item: Object, dest: Path, relative: PurePosixPath, options: PullOptions, stop: threading.Event
) -> Literal["pulled", "resumed", "kept"]:
    """Corrupted, StoreFull, …; an incomplete `.part` stays for the next time, a wrong one does not."""
    path = _inside(dest, relative)
    if path.is_file() and path.stat().st_size == item.size and _sha256(path) == item.sha256:
        return "kept"
    if item.size > options.limit_bytes:
        raise StorageError(
            f"{path} would be {item.size:,} bytes, {options.limit_bytes:,} are allowed: raise the limit if it is right"
        )
    part = path.with_name(path.name + PART)
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


def write(content: bytes, dest: Path, relative: PurePosixPath) -> Literal["pulled", "kept"]:
    """Put content that was made here below the destination; StorageError where a link leads out of it."""
    path = _inside(dest, relative)
    with local_errors(path):
        if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
            return "kept"
        make_directories(path.parent)
        with replacing(path) as file:
            file.write(content)
    return "pulled"


def _inside(dest: Path, relative: PurePosixPath) -> Path:
    """The path, if no symbolic link on the way leads out of the destination and its name is no unfinished file's."""
    path = dest / relative
    if any(part in ("", ".", "..") or part.casefold().endswith(PART) for part in relative.parts):
        raise Corrupted(f"{relative} is no name for a pulled file: those that end in {PART} are unfinished ones")
    real, root = os.path.realpath(path.parent), os.path.realpath(dest)
    if not f"{real}/".startswith(f"{root.rstrip('/')}/"):
        raise StorageError(f"{path} would lead out of {dest} through a symbolic link, to {real}: refused")
    return path


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
    return difference(item, size, digest.hexdigest())


@contextlib.contextmanager
def _opened(part: Path) -> Iterator[BinaryIO]:
    """The partial file for reading and writing, ours alone; a link, symbolic or hard, or a pipe in its place is
    refused: what is written there would end up elsewhere."""
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    with open(descriptor, "r+b") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise StorageError(f"{part} is no file of its own but a pipe, a device or a second name: remove it")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Unavailable(f"{part} is being written by another pull: wait for it, then run this again") from error
        if not part.exists() or part.stat().st_ino != status.st_ino:
            raise Unavailable(f"{part} has just been finished by another pull: run this again")
        yield file


def _sha256(path: Path) -> str:
    with local_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
