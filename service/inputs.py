"""What a job reads, local files or S3 objects: by byte range, by digest, as a file on this node. Neither torch nor Ray.

A digest is computed once per version of a file and remembered per user; a fetched object is kept per node, named by its
digest, so that any number of worker processes download it once.
"""

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from service.errors import Corrupted, StorageError, StoreFull
from service.files import local_errors, make_directories, replacing
from service.steps import Steps, parallel
from service.storage import LocalStore, Store, sha256_of, split_location

HEAD_BYTES = 512 << 10  # read ahead of a remote file: a LoRA's length field and header in one request
ABANDONED_S = 60.0  # age at which a half-written digest is a killed process'
SETTLED_S = 2  # a file modified less than this ago may change again without a new time stamp


@dataclass(slots=True)
class Input:
    """One file or object as it is now. Safe for threads."""

    location: str
    store: Store
    key: str
    size: int  # bytes
    version: str | None  # changes whenever the content does; None: unknown
    settled: bool
    digests: "DigestCache"
    _head: bytes | None = field(default=None, repr=False)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), cut at the end as a slice is; NotFound, Unavailable, AccessDenied."""
        if isinstance(self.store, LocalStore) or stop > HEAD_BYTES:
            return self.store.get_range(self.key, start, stop)
        if self._head is None:
            self._head = self.store.get_range(self.key, 0, HEAD_BYTES)
        return self._head[start:stop]

    def download(self, path: Path) -> None:
        self.store.download(self.key, path)

    def sha256(self) -> str:
        """Hex; read once per version of the file, then remembered for this user."""
        if known := self.digests.get(self):
            return known
        digest = sha256_of(self.store, self.key)
        if self.settled and self.store.head(self.key).etag == self.version:
            self.digests.put(self, digest)
        return digest


def open_input(location: str | Path, digests: "DigestCache | None" = None) -> Input:
    """One request. NotFound (also for a directory), AccessDenied, Unavailable; StorageError for an unsafe key."""
    store, key = split_location(location)
    found = store.head(key)
    settled = not isinstance(store, LocalStore) or time.time() - found.modified.timestamp() > SETTLED_S
    return Input(str(location), store, key, found.size, found.etag, settled, digests or DigestCache())


def digests(locations: Sequence[str], threads: int = 8) -> Steps[tuple[str, str | StorageError]]:
    """(location, sha256 or why there is none) for each, in order; many at a time."""

    def digest(location: str) -> tuple[str, str | StorageError]:
        try:
            return location, open_input(location).sha256()
        except StorageError as error:
            return location, error

    return Steps(len(locations), lambda: parallel(digest, locations, threads))


def user_cache() -> Path:
    """Where this user's programs keep what can be made again (XDG base directories)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ziplora"


class DigestCache:
    """sha256 by (location, size, version). One small file each: safe for processes and their deaths; a cache that fails
    is no error."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory or user_cache() / "digests"

    def get(self, of: Input) -> str | None:
        if of.version is None:
            return None
        try:
            return self._path(of).read_text().strip() or None
        except OSError:
            return None

    def put(self, of: Input, digest: str) -> None:
        path = self._path(of)
        with contextlib.suppress(StorageError, OSError):
            make_directories(path.parent)
            for part in path.parent.glob(".*.part"):  # nobody takes so long to write a line: their writers were killed
                if time.time() - part.stat().st_mtime > ABANDONED_S:
                    part.unlink(missing_ok=True)
            with replacing(path) as file:
                file.write(digest.encode())

    def _path(self, of: Input) -> Path:
        name = hashlib.sha256(f"{of.store.url}\n{of.key}\n{of.size}\n{of.version}".encode()).hexdigest()
        return self.directory / name[:2] / name[2:40]


class LocalCache:
    """Objects on this node's disk, named by their sha256, at most `max_bytes` of them; the longest unused go first.

    Safe for several processes: each object is downloaded by one of them while the others wait for it, and a process
    that is killed leaves no lock behind.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.objects, self.locks = directory / "objects", directory / "locks"
        self.max_bytes = max_bytes
        self.downloaded_bytes = 0  # by this process
        self.digests = DigestCache(directory / "digests")

    def fetch(self, location: str, sha256: str) -> Path:
        """A file with this content: the user's own where it is local, else the copy of this node.

        Open it at once: later on, another process may have made room for something else; use `hold` to keep it longer.
        Raises Corrupted when the content is another, NotFound, StoreFull, Unavailable, AccessDenied.
        """
        store, key = split_location(location)
        if isinstance(store, LocalStore):
            found = open_input(location, self.digests).sha256()
            _check(location, found, sha256)
            return store.root / key
        path = self.objects / f"{sha256}{PurePosixPath(key).suffix}"
        with local_errors(path):
            if not _touch(path):
                make_directories(self.objects)
                make_directories(self.locks)
                with (self.locks / sha256).open("w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    if not _touch(path):
                        self._download(store, key, location, sha256, path)
        return path

    @contextlib.contextmanager
    def hold(self, location: str, sha256: str) -> Iterator[Path]:
        """As `fetch`; the file stays until the block ends."""
        while True:
            path = self.fetch(location, sha256)
            try:
                file = path.open("rb")
            except FileNotFoundError:  # evicted already
                continue
            with file:
                fcntl.flock(file, fcntl.LOCK_SH)
                if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    yield path
                    return

    def _download(self, store: Store, key: str, location: str, sha256: str, path: Path) -> None:
        for part in self.objects.glob(f".{path.name}.*.part"):  # of a process that was killed: the lock is ours
            part.unlink(missing_ok=True)
        try:
            self._write(store, key, location, sha256, path)
        except StoreFull:
            make_room(self.objects, 0, path)
            self._write(store, key, location, sha256, path)
        make_room(self.objects, self.max_bytes, path)

    def _write(self, store: Store, key: str, location: str, sha256: str, path: Path) -> None:
        digest = hashlib.sha256()
        with replacing(path) as file:
            for chunk in store.stream(key):
                file.write(chunk)
                digest.update(chunk)
                self.downloaded_bytes += len(chunk)
            _check(location, digest.hexdigest(), sha256)


def make_room(directory: Path, max_bytes: int, keep: Path) -> None:
    """Remove the longest unused files that nobody holds, until the rest and `keep` take at most `max_bytes`."""
    files = []
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            files.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total > max_bytes and path != keep and path.suffix != ".part" and _remove_unused(path):
            total -= size


def _check(location: str, found: str, expected: str) -> None:
    if found != expected:
        raise Corrupted(f"{location} has sha256 {found[:12]}…, the plan says {expected[:12]}…: it changed; plan again")


def _touch(path: Path) -> bool:
    """Mark as used now; False when it is not there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _remove_unused(path: Path) -> bool:
    """Remove the file unless somebody holds it."""
    with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    return False
