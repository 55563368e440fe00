"""Local files that appear complete or not at all, survive a power cut, and whose errors are those of `errors.py`."""

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from service.errors import AccessDenied, NotFound, StorageError, StoreFull, Unavailable


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write; it takes `path`'s place, durably, if the block ends well, and vanishes otherwise. StoreFull."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    with local_errors(path):
        try:
            with create(part) as file:
                yield file
                settle(file)
            part.replace(path)
            settle_directory(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise


def create(path: Path) -> BinaryIO:
    """A new file for writing, its owner's to read and write even under a umask such as 0777. FileExistsError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    if mode & 0o600 != 0o600:
        os.fchmod(descriptor, mode | 0o600)
    return os.fdopen(descriptor, "wb")


def make_directories(path: Path) -> None:
    """The directory with its parents, its owner's to use whatever the umask."""
    if path.is_dir():
        return
    make_directories(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir()
        path.chmod(stat.S_IMODE(path.stat().st_mode) | 0o700)
        settle_directory(path.parent)


def settle(file: BinaryIO) -> None:
    """The file's content is on disk afterwards."""
    file.flush()
    os.fsync(file.fileno())


def settle_directory(path: Path) -> None:
    """The directory's names are on disk afterwards, where the file system can promise that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def link(old: Path, new: Path) -> bool:
    """Give `old` the second name `new`; False where the file system has no hard links. FileExistsError."""
    try:
        os.link(old, new)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV):
            return False
        raise
    return True


@contextlib.contextmanager
def local_errors(path: Path) -> Iterator[None]:
    """OSError of work on `path` → StorageError, here only."""
    try:
        yield
    except OSError as error:
        raise _translated(error, path) from error


def _translated(error: OSError, path: Path) -> StorageError:
    reason = error.strerror or str(error)
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR | errno.EISDIR:
            return NotFound(f"{path}: {reason.lower()}")
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return StoreFull(f"{path} cannot be written: {reason.lower()}; free some space or write elsewhere")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return AccessDenied(
                f"{path}: {reason.lower()}; check its owner and mode, and that it is not mounted read-only"
            )
        case errno.EIO | errno.ESTALE | errno.ETIMEDOUT | errno.EAGAIN | errno.EBUSY | errno.EMFILE | errno.ENFILE:
            return Unavailable(f"{path}: {reason.lower()}; the disk or its server does not answer now")
        case _:
            return StorageError(f"{path}: {reason.lower()}")
