"""Where a credential stands that should not: in texts, files, objects, command lines, variables of processes."""

import base64
import contextlib
import io
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq

from service.storage import Store

Found = dict[str, list[str]]  # where → names of the credentials


class Search:
    """For credentials by name, as they are and in base64 (as Secrets have them), in whatever is shown to it."""

    def __init__(self, credentials: dict[str, str]) -> None:
        self.forms = {
            name: (value.encode(), base64.b64encode(value.encode()).rstrip(b"=")[:-1])
            for name, value in credentials.items()
        }

    def names_in(self, content: bytes) -> list[str]:
        return [name for name, forms in self.forms.items() if any(form in content for form in forms)]

    def through(self, contents: Iterable[tuple[str, bytes]]) -> tuple[Found, int]:
        """What was found where, and how many contents were searched."""
        found, n = {}, 0
        for where, content in contents:
            n += 1
            if names := self.names_in(content):
                found[where] = names
        return found, n


def files(directory: Path, leave_out: Iterable[str] = ()) -> Iterator[tuple[str, bytes]]:
    """All files below, but for directories of these names."""
    for path in sorted(directory.rglob("*")):
        within = path.relative_to(directory)
        if path.is_file() and not path.is_symlink() and not set(leave_out) & set(within.parts):
            yield str(within), path.read_bytes()


def objects(store: Store) -> Iterator[tuple[str, bytes]]:
    """All objects; tables uncompressed."""
    for item in store.list():
        content = store.get(item.key)
        if item.key.endswith(".parquet"):
            content = str(pq.read_table(io.BytesIO(content)).to_pylist()).encode()
        yield item.key, content


class Processes(threading.Thread):
    """Looks at all processes again and again: command lines, and in which variables of those in other network
    namespaces (the pods') a credential stands. There it must stand: Secrets come as variables."""

    def __init__(self, search: Search, every_s: float = 2.0) -> None:
        super().__init__(daemon=True)
        self.search, self.every_s = search, every_s
        self.command_lines: set[bytes] = set()
        self.variables: set[str] = set()
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(self.every_s):
            self.look()

    def look(self) -> None:
        for pid in psutil.pids():
            with contextlib.suppress(OSError):
                self.command_lines.add(Path(f"/proc/{pid}/cmdline").read_bytes())
                if os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net"):
                    for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                        if self.search.names_in(variable):
                            self.variables.add(variable.partition(b"=")[0].decode())

    def stop(self) -> None:
        self.ended.set()
        self.join()
