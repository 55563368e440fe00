"""What was made on this node and can be made again, kept over runs: bytes by a key that says all they depend on."""

import contextlib
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from service.errors import StorageError
from service.files import local_errors, make_directories, replacing
from service.inputs import make_room


class NodeCache:
    """At most `max_bytes` in `directory`; the longest unused go first. Safe for several processes and their deaths: one
    makes a value while others that want it wait. A disk that is full or fails is no error: nothing is kept then."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.values, self.locks = directory / "values", directory / "locks"
        self.max_bytes = max_bytes
        self.hits = self.misses = 0

    def get(self, key: str, make: Callable[[], bytes]) -> bytes:
        """The value, made and kept if it is not there; what `make` raises."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(StorageError), local_errors(self.locks):
                make_directories(self.values)
                make_directories(self.locks)
                lock = stack.enter_context((self.locks / key).open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            if (found := self._read(key)) is not None:
                self.hits += 1
                return found
            self.misses += 1
            value = make()
            self._write(key, value)
        return value

    def forget(self, key: str) -> None:
        """What is kept is of no use."""
        with contextlib.suppress(OSError):
            (self.values / key).unlink()

    def _read(self, key: str) -> bytes | None:
        path = self.values / key
        try:
            os.utime(path)  # used now
            return path.read_bytes()
        except OSError:
            return None

    def _write(self, key: str, value: bytes) -> None:
        with contextlib.suppress(StorageError, OSError):
            for part in self.values.glob(f".{key}.*.part"):  # of a process that was killed: the lock is ours
                part.unlink(missing_ok=True)
            with replacing(self.values / key) as file:
                file.write(value)
            make_room(self.values, self.max_bytes, self.values / key)
