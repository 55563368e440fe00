"""sha256 of files and objects that seldom change, remembered between runs: a base model's 7 GB are hashed once."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service.errors import StorageError
from service.files import make_directories, replacing
from service.storage import Store, sha256_of


class DigestCache:
    """sha256 of files, remembered by (path, size, modification time) in one JSON file; without a path, only in memory.

    Safe for threads; two processes at most lose each other's additions. A damaged cache file counts as empty.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._known: dict[str, list[Any]] = _json_or_empty(path) if path else {}
        self._changed = False

    def sha256(self, path: Path) -> str:
        """Of a local file; OSError."""
        status = path.stat()
        return self._known_or(str(path.resolve()), [status.st_size, status.st_mtime_ns], lambda: _sha256(path))

    def sha256_of_object(self, store: Store, key: str) -> str:
        """Of an object, read as a stream when its size, time or ETag are new; StorageError."""
        info = store.head(key)
        name, state = f"{store.url}/{key}", [info.size, info.modified.isoformat(), info.etag]
        return self._known_or(name, state, lambda: sha256_of(store, key))

    def _known_or(self, name: str, state: list[Any], compute: Callable[[], str]) -> str:
        with self._lock:
            known = self._known.get(name)
        if known and known[:-1] == state:
            return str(known[-1])
        digest = compute()
        with self._lock:
            self._known[name] = [*state, digest]
            self._changed = True
        return digest

    def save(self) -> None:
        """Write the cache if anything in it is new. Failing to costs time, nothing else, so it is no error."""
        if self.path is None or not self._changed:
            return
        with self._lock:
            content = json.dumps(self._known).encode()
        with contextlib.suppress(StorageError):
            make_directories(self.path.parent)
            with replacing(self.path) as file:
                file.write(content)
            self._changed = False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json_or_empty(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: value for key, value in known.items() if isinstance(value, list) and len(value) >= 2}
