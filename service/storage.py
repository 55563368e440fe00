"""Where objects live: a flat map from keys to bytes, in a local directory (here) or in S3 (`s3.py`).

Every write is atomic: a reader sees the old object, the new one or none. Errors are those of `errors.py`.
"""

import contextlib
import hashlib
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

from service.errors import AlreadyCommitted, NotFound, StorageError
from service.files import create, link, local_errors, make_directories, replacing, settle, settle_directory

CHUNK = 1 << 20  # bytes per read of a stream
MAX_KEY_BYTES = 1024  # S3's limit
UNSAFE = re.compile(r"[\\\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # backslash, control characters, what UTF-8 cannot write
TEMPORARY = ".tmp"  # the local store's directory of unfinished writes; listings and keys leave it out
LEFTOVER_S = 24 * 3600  # age at which an unfinished write is taken as abandoned


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    key: str
    size: int  # bytes
    modified: datetime  # aware, UTC
    etag: str | None  # changes whenever the content does


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An upload that has begun and not ended: of a writer at work, or of one that was killed."""

    key: str  # what it would become; of a local store the name of the temporary file
    id: str
    started: datetime  # aware, UTC


class Store(Protocol):
    """A flat map of objects. Keys are relative posix paths, see `check_key`. Every method may raise Unavailable or
    AccessDenied besides its own errors; every store can be used by several threads and processes at once."""

    @property
    def url(self) -> str:
        """What `open_store` takes, and what messages name."""

    def get(self, key: str) -> bytes:
        """The whole object; NotFound."""

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop), cut at the object's end as a slice is; NotFound."""

    def stream(self, key: str, start: int = 0) -> Iterator[bytes]:
        """The bytes from `start` on in chunks; a connection that breaks is taken up again where it broke. NotFound."""

    def download(self, key: str, path: Path) -> None:
        """Into a file that appears under its name only when it is complete; NotFound, StoreFull (the local disk)."""

    def put(self, key: str, body: bytes | Path, *, content_type: str | None = None, create_only: bool = False) -> None:
        """Write bytes or a file's content; StoreFull. With `create_only`: AlreadyCommitted when the key exists.

        Where `creates_only` is false, two writers in the same instant may both succeed, and the later one's bytes stay.
        """

    def head(self, key: str) -> ObjectInfo:
        """NotFound."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key starts with `prefix`, sorted by key (code points), a page at a time."""

    def delete(self, key: str) -> None:
        """The object is gone afterwards, whether or not it was there."""

    def unfinished(self) -> Iterator[Unfinished]:
        """Uploads that take space without being objects."""

    def discard(self, upload: Unfinished) -> None:
        """Give their space back; nothing happens if it has ended meanwhile."""

    def link(self, key: str, expires_s: int, file_name: str) -> str:
        """A URL that gives the object to whoever has it, for so long, under this name; StorageError where it cannot."""

    def probe(self, *, write: bool = True) -> None:
        """Fail early, with one clear error, and learn `creates_only`; `write=False` asks only if it can be read."""

    @property
    def creates_only(self) -> bool:
        """Whether the store itself refuses `put(create_only=True)` on a key that exists."""


def open_store(url: str | Path) -> Store:
    """`s3://bucket/prefix`, `file:///directory` or a plain path. Touches neither disk nor network: see `probe`."""
    text = str(url)
    if text.startswith("s3://"):
        from service.s3 import S3Store

        bucket, _, prefix = text.removeprefix("s3://").partition("/")
        return S3Store(bucket, prefix)
    return LocalStore(local_path(text).absolute())


def split_location(location: str | Path) -> tuple[Store, str]:
    """A single object, `s3://bucket/key` or a file: its store and its key there. Links in a path are followed."""
    text = str(location)
    if text.startswith("s3://"):
        bucket, _, key = text.removeprefix("s3://").partition("/")
        if not key:
            raise StorageError(f"{text} names a bucket, not an object: write s3://bucket/key")
        return open_store(f"s3://{bucket}"), check_key(key)
    path = local_path(text).resolve()
    return LocalStore(path.parent), check_key(path.name)


def local_path(text: str) -> Path:
    """The path that a plain path or a file URL means; StorageError for other schemes."""
    if not text:
        raise StorageError("the location is empty: write a directory or s3://bucket/prefix")
    if "://" not in text:
        return Path(os.path.expanduser(text))
    parts = urlsplit(text)
    if parts.scheme != "file":
        raise StorageError(f"{text}: the scheme {parts.scheme}:// is not known here: use s3://bucket/prefix or a path")
    if parts.netloc not in ("", "localhost"):
        raise StorageError(
            f"{text} names the host {parts.netloc}: a local file is written file:///path, with three slashes"
        )
    return Path(unquote(parts.path))


def check_key(key: str) -> str:
    """The key, if it is safe as an S3 key and as a path below a directory on any system; StorageError otherwise.

    Parts are separated by '/', none is empty, '.' or '..'; no backslash or control character; at most 1024 bytes of
    UTF-8. Most S3 servers take `p/../q` without a word, so this is asked on writing *and* on reading.
    """
    problem = _key_problem(key)
    if problem:
        raise StorageError(f"the key {key[:200]!r} {problem}: keys are relative paths such as pairs/dog/merged.png")
    return key


def _key_problem(key: str) -> str | None:
    if not key:
        return "is empty"
    if key.startswith("/"):
        return "is an absolute path"
    if UNSAFE.search(key):
        return "holds a backslash or a control character"
    if len(key.encode()) > MAX_KEY_BYTES:
        return f"is {len(key.encode())} bytes long, {MAX_KEY_BYTES} are allowed"
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "has an empty, '.' or '..' part"
    if parts[0] == TEMPORARY:
        return f"starts with {TEMPORARY}, which is kept for unfinished writes"
    return None


def sha256_of(store: Store, key: str) -> str:
    """Hex sha256 of the object, streamed; NotFound."""
    digest = hashlib.sha256()
    for chunk in store.stream(key):
        digest.update(chunk)
    return digest.hexdigest()


def download(store: Store, key: str, path: Path) -> None:
    """`Store.download` by way of `Store.stream`."""
    with replacing(path) as file:
        for chunk in store.stream(key):
            file.write(chunk)


class LocalStore:
    """A directory. Safe for any number of processes and threads, also over NFS as far as rename and link are."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.creates_only = True  # until `probe` finds a file system without hard links

    @property
    def url(self) -> str:
        return str(self.root)

    def get(self, key: str) -> bytes:
        with self._open(key) as file:
            return file.read()

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        with self._open(key) as file:
            file.seek(start)
            return file.read(max(0, stop - start))

    def stream(self, key: str, start: int = 0) -> Iterator[bytes]:
        with self._open(key) as file:
            file.seek(start)
            while chunk := file.read(CHUNK):
                yield chunk

    def download(self, key: str, path: Path) -> None:
        download(self, key, path)

    def put(self, key: str, body: bytes | Path, *, content_type: str | None = None, create_only: bool = False) -> None:
        path = self._path(key)
        part = self.root / TEMPORARY / uuid.uuid4().hex
        with local_errors(path):
            try:
                make_directories(part.parent)
                with create(part) as file:
                    _fill(file, body)
                    settle(file)
                self._publish(part, path, create_only)
            except (NotADirectoryError, IsADirectoryError) as error:
                raise StorageError(f"{path}: a directory cannot hold both a key and keys below it ({error})") from error
            finally:
                with contextlib.suppress(OSError):
                    part.unlink()

    def head(self, key: str) -> ObjectInfo:
        with self._open(key) as file:
            return _described(key, os.fstat(file.fileno()))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        directory = prefix.rpartition("/")[0]
        if directory:
            self._path(directory)
        yield from self._walk(f"{directory}/" if directory else "", prefix)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with local_errors(path):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                path.unlink()
            with contextlib.suppress(OSError):  # directories that this leaves empty go too, up to one that is not
                for parent in PurePosixPath(key).parents[:-1]:
                    (self.root / parent).rmdir()

    def unfinished(self) -> Iterator[Unfinished]:
        directory = self.root / TEMPORARY
        with local_errors(directory):
            for part in sorted(directory.iterdir()) if directory.is_dir() else []:
                with contextlib.suppress(FileNotFoundError):  # finished since the scan
                    started = datetime.fromtimestamp(part.lstat().st_mtime, UTC)
                    yield Unfinished(f"{TEMPORARY}/{part.name}", part.name, started)

    def discard(self, upload: Unfinished) -> None:
        path = self.root / TEMPORARY / PurePosixPath(upload.id).name
        with local_errors(path), contextlib.suppress(IsADirectoryError):
            path.unlink(missing_ok=True)

    def link(self, key: str, expires_s: int, file_name: str) -> str:
        """A file URL, good on this machine for as long as the file is there."""
        self.head(key)
        return self._path(key).absolute().as_uri()

    def probe(self, *, write: bool = True) -> None:
        with local_errors(self.root):
            if self.root.exists() and not self.root.is_dir():
                raise StorageError(f"{self.root} is a file: a catalog is a directory or s3://bucket/prefix")
            if not write:
                os.scandir(self.root).close()
                return
            make_directories(self.root / TEMPORARY)
            self._remove_leftovers()
            a, b = (self.root / TEMPORARY / uuid.uuid4().hex for _ in range(2))
            try:
                create(a).close()
                self.creates_only = link(a, b)
            finally:
                a.unlink(missing_ok=True)
                b.unlink(missing_ok=True)

    def _publish(self, part: Path, path: Path, create_only: bool) -> None:
        for attempt in range(10):
            try:
                make_directories(path.parent)
                if create_only:
                    self._publish_new(part, path)
                else:
                    part.replace(path)
            except FileNotFoundError:  # a delete has just removed an empty directory on the way
                if attempt == 9:
                    raise
            else:
                break
        settle_directory(path.parent)

    def _publish_new(self, part: Path, path: Path) -> None:
        taken = f"{path} exists already"
        try:
            if link(part, path):
                return
        except FileExistsError as error:
            raise AlreadyCommitted(taken) from error
        if path.exists():
            raise AlreadyCommitted(taken)
        part.replace(path)

    def _walk(self, directory: str, prefix: str) -> Iterator[ObjectInfo]:
        """Depth first; a directory sorts as its name with '/', which gives the order of keys: 'a-b' before 'a/b'."""
        path = self.root / directory
        with local_errors(path):
            try:
                with os.scandir(path) as scan:
                    found = sorted((f"{directory}{e.name}{'/' * e.is_dir(follow_symlinks=False)}", e) for e in scan)
            except (FileNotFoundError, NotADirectoryError):
                return
            for key, entry in found:
                if not (key.startswith(prefix) or prefix.startswith(key)) or key == f"{TEMPORARY}/":
                    continue
                if key.endswith("/"):
                    yield from self._walk(key, prefix)
                elif entry.is_file(follow_symlinks=False) and key.startswith(prefix):
                    with contextlib.suppress(FileNotFoundError):  # deleted since the scan
                        yield _described(key, entry.stat(follow_symlinks=False))

    def _path(self, key: str) -> Path:
        path = self.root / check_key(key)
        real, root = os.path.realpath(path), os.path.realpath(self.root)
        if not real.startswith(root.rstrip("/") + "/"):
            raise StorageError(f"{path} leads out of {self.root} through a symbolic link, to {real}: refused")
        return path

    def _open(self, key: str) -> BinaryIO:
        path = self._path(key)
        with local_errors(path):
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO must not block us
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise NotFound(f"{path} is not a file")
            return os.fdopen(descriptor, "rb")

    def _remove_leftovers(self) -> None:
        for part in (self.root / TEMPORARY).iterdir():
            with contextlib.suppress(FileNotFoundError):
                if part.stat().st_mtime < time.time() - LEFTOVER_S:
                    part.unlink()


def _fill(file: BinaryIO, body: bytes | Path) -> None:
    if isinstance(body, bytes):
        file.write(body)
        return
    with local_errors(body):
        source = body.open("rb")
    with source:
        shutil.copyfileobj(source, file, CHUNK)


def _described(key: str, status: os.stat_result) -> ObjectInfo:
    etag = f"{status.st_mtime_ns:x}-{status.st_ino:x}-{status.st_size:x}"
    return ObjectInfo(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC), etag)
