"""A base model that lies in object storage, copied once per node. Neither torch nor Ray.

A copy is named by what the listing says of the objects (keys, sizes, etags), so a base that is replaced under the same
prefix becomes another copy. It appears under its name only when it is complete; what an interrupted attempt has
fetched is kept for the next one.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from service.errors import Corrupted, ManifestError, StoreFull
from service.files import local_errors, make_directories, settle_directory
from service.inputs import user_cache
from service.steps import parallel
from service.storage import ObjectInfo, open_store

MAX_BYTES = 60 * 2**30  # of all copies on a node; SDXL takes 7 GB in half precision, 14 GB in full
IN_USE_S = 3600.0  # a copy asked for less than this ago may still be read by a worker that starts
FILES_AT_ONCE = 4
COPY = re.compile(r"[0-9a-f]{32}")


def copied(
    url: str, patterns: Callable[[list[str]], list[str]], directory: Path | None = None, max_bytes: int = MAX_BYTES
) -> Path:
    """The local directory with the objects below `url` (s3://bucket/prefix) that match `patterns` of their names.

    Safe for any number of processes: one copies, the others wait. Beyond `max_bytes`, copies that were not asked for
    for long are removed. Raises ManifestError when nothing is there, StoreFull when the disk is, StorageError.
    """
    store = open_store(url)
    listed = {found.key: found for found in store.list() if not found.key.endswith("/")}
    wanted = patterns(list(listed))
    chosen = [found for key, found in sorted(listed.items()) if any(fnmatchcase(key, one) for one in wanted)]
    if not chosen:
        raise ManifestError(f"base {url} holds no model: expected model_index.json, unet/ … below s3://bucket/prefix")
    root = directory or user_cache() / "bases"
    target = root / _version(store.url, chosen)
    with local_errors(target):
        make_directories(root)
        with (root / f"{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                _make_room(root, max_bytes - sum(found.size for found in chosen), target)
                _copy(url, chosen, target)
            os.utime(target)
    return target


def _version(url: str, objects: list[ObjectInfo]) -> str:
    lines = [url, *(f"{found.key} {found.size} {found.etag}" for found in objects)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _copy(url: str, objects: list[ObjectInfo], target: Path) -> None:
    """By way of a directory beside it; files that are in there are whole."""
    store, part = open_store(url), target.with_name(f"{target.name}.part")

    def fetch(found: ObjectInfo) -> None:
        path = part / found.key
        if not path.exists():
            make_directories(path.parent)
            store.download(found.key, path)
        if path.stat().st_size != found.size:
            path.unlink()
            raise Corrupted(f"{url}/{found.key} was replaced while it was copied: try again")

    needed = sum(found.size for found in objects if not (part / found.key).exists())
    if needed > (free := shutil.disk_usage(target.parent).free):
        raise StoreFull(
            f"base {url} needs {needed:,} bytes in {target.parent}, {free:,} are free: free some, or set"
            " XDG_CACHE_HOME to a directory on a larger disk"
        )
    for _ in parallel(fetch, objects, FILES_AT_ONCE):
        pass
    part.rename(target)
    settle_directory(target.parent)


def _make_room(root: Path, max_bytes: int, keep: Path) -> None:
    """Remove copies, the longest unasked-for first, until those that stay take at most `max_bytes`."""
    copies = sorted((used, size, path) for used, size, path in _copies(root) if path.stem != keep.name)
    total = sum(size for _, size, _ in copies)
    for used, size, path in copies:
        if total > max_bytes and time.time() - used > IN_USE_S:
            with (root / f"{path.stem}.lock").open("w") as lock, contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not one that is being made
                shutil.rmtree(path, ignore_errors=True)
                total -= size


def _copies(root: Path) -> Iterator[tuple[float, int, Path]]:
    """(when it was last asked for, bytes, directory), of unfinished ones too."""
    for path in root.iterdir():
        if COPY.fullmatch(path.stem) and path.suffix in ("", ".part"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                yield path.stat().st_mtime, size, path
