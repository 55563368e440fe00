"""The catalog: what is finished, what was given up, and the one protocol by which a job becomes finished.

    entries/<job_id>.json                  an entry: its presence is the commit
    pairs/<job_id>/<attempt>/<name>        the objects that an attempt left; only those that an entry names count
    failures/<job_id>.json                 given up, with the reason
    loras/…, checkpoints/…                 LoRAs that runs trained, and trainings under way; see trained.py
    runs/<run_id>/…                        what a run leaves about itself
    index/…, index.json                    derived from the above, brought up to date at any time; see index.py

Entries lie apart from their objects so that resuming lists entries only: a catalog of 100,000 jobs with nine objects
each is taken up again with 100 list requests instead of 900.

Commit: an attempt uploads its objects under a name of its own, then writes the entry, create-only where the store
can, and reads it back. The stored entry is the winner, for every reader and every writer. Where the store cannot (or,
as Swift, lets writers of the same instant through), the later write replaces the earlier: each of them is whole,
readers see one of them, and the objects of the other are garbage.
"""

import hashlib
import logging
import mimetypes
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from service.care import Checked, Garbage, collect, find_garbage, is_garbage, remove, verify
from service.choose import BEST, Choice, choose, not_compared
from service.compare import Copied, Difference, copy, differences, held
from service.entry import (
    JOB_ID,
    MAX_BYTES,
    Entry,
    Failure,
    Object,
    Unreadable,
    check_object_name,
    digest_of,
    read_entry,
    read_failure,
    write_entry,
    write_failure,
)
from service.errors import AlreadyCommitted, Corrupted, NotFound, StorageError, Unavailable
from service.pull import Pulled, PullOptions, pull
from service.steps import Steps, parallel
from service.storage import LocalStore, Store, open_store
from service.trained import TrainedLoRA, TrainedLoRAs

if TYPE_CHECKING:
    from service.client import Selection
    from service.index import IndexSummary  # imports pyarrow

T = TypeVar("T", Entry, Failure)
COMMIT_S = 3600.0  # from an attempt's first upload to its entry; `gc` leaves alone what is younger than twice this
GARBAGE_S = 24 * 3600.0  # age at which garbage is collected unless told otherwise
UPLOADS = 4  # objects of one entry at a time
MAX_TRACEBACK = 100_000  # characters
READS = 16  # small records at a time
log = logging.getLogger("ziplora.catalog")


def warn(unreadable: Unreadable) -> None:
    log.warning("%s is left out: %s", unreadable.key, unreadable.reason)


class Catalog:
    """A catalog in a store (or at a URL or path). Safe for threads and for any number of processes."""

    def __init__(self, store: Store | str | Path) -> None:
        self.store = open_store(store) if isinstance(store, str | Path) else store

    # What is finished

    def committed(self) -> set[str]:
        """The ids of all committed jobs, by one listing."""
        return set(self._job_ids("entries/"))

    def entry(self, job_id: str) -> Entry:
        """NotFound when the job is not committed, Corrupted when its entry cannot be used."""
        return read_entry(self._record(entry_key(job_id)), job_id)

    def entries(self, unreadable: Callable[[Unreadable], None] = warn) -> Iterator[Entry]:
        """All entries in the order of their job ids; one that cannot be read is reported instead of yielded."""
        return self._records("entries/", read_entry, unreadable)

    def select(
        self,
        subject: str = "*",
        style: str = "*",
        method: str = "*",
        unreadable: Callable[[Unreadable], None] = warn,
    ) -> list[Entry]:
        """The entries whose ids match these patterns (`*`, `?`, `[abc]`; case counts)."""
        return [
            entry
            for entry in self.entries(unreadable)
            if fnmatchcase(entry.subject, subject)
            and fnmatchcase(entry.style, style)
            and fnmatchcase(entry.method, method)
        ]

    def digest(self) -> str:
        """The content of the whole catalog in one hash, whatever the store, times and attempts; Corrupted."""
        return digest_of(self.entries(_refuse))

    # Becoming finished

    def commit(
        self, job_id: str, job: Mapping[str, Any], files: Mapping[str, bytes | Path], report: Mapping[str, Any]
    ) -> Entry:
        """Publish a job's files (name → content) under its identity `job`. The job is committed when this returns.

        Raises AlreadyCommitted with the winning entry when another attempt was first (not a failure: the job is done);
        StoreFull, Unavailable, AccessDenied when it could not be stored, after which it may be tried again; Corrupted
        when the entry that is there cannot be used; ValueError for names that no file system takes.
        """
        if not JOB_ID.fullmatch(job_id):
            raise ValueError(f"{job_id!r} is no job id: 64 hex digits")
        for name in files:
            check_object_name(name)
        winner = self.existing(job_id)
        if winner:
            raise AlreadyCommitted(f"job {job_id[:12]} is committed already, by attempt {winner.attempt}", winner)
        attempt = uuid.uuid4().hex[:16]
        entry = Entry(job_id, job, {}, report, attempt, datetime.now(UTC))
        write_entry(entry)  # TypeError before anything is uploaded
        objects = self._upload(job_id, attempt, files)
        return self.publish(replace(entry, objects=objects), entry.created)

    def existing(self, job_id: str) -> Entry | None:
        """`entry`, or None when the job is not committed."""
        try:
            return self.entry(job_id)
        except NotFound:
            return None

    def _upload(self, job_id: str, attempt: str, files: Mapping[str, bytes | Path]) -> dict[str, Object]:
        described = [_describe(f"pairs/{job_id}/{attempt}", name, body) for name, body in sorted(files.items())]
        try:
            for _ in parallel(
                lambda item: self.store.put(item.key, files[item.name], content_type=item.content_type),
                described,
                UPLOADS,
            ):
                pass
        except BaseException:
            self._discard(described)
            raise
        return {item.name: item for item in described}

    def publish(self, entry: Entry, began: datetime) -> Entry:
        """Write the entry, whose objects are stored since `began` or later, unless there is one; the one that stands.

        Raises AlreadyCommitted as `commit`, and Unavailable when more than COMMIT_S have passed: its objects may be
        taken for garbage soon, so that they are given up and everything is to be stored anew.
        """
        body = write_entry(entry)
        for _ in range(3):
            refused = False
            taken_s = (datetime.now(UTC) - began).total_seconds()
            if taken_s > COMMIT_S:
                self._discard(entry.objects.values())
                raise Unavailable(
                    f"storing job {entry.job_id[:12]} in {self.store.url} took {taken_s:.0f} s,"
                    f" at most {COMMIT_S:.0f} s are allowed: try again, with fewer uploads at a time"
                )
            try:
                self.store.put(entry_key(entry.job_id), body, content_type="application/json", create_only=True)
            except AlreadyCommitted:  # also the answer to a repeated request whose first answer was lost
                refused = True
            winner = self.existing(entry.job_id)
            if winner is None:  # a conflict between two writers in which neither was stored, or somebody removed it
                continue
            if winner.attempt == entry.attempt:
                return entry
            if refused:  # nobody has ever seen ours
                self._discard(entry.objects.values())
            raise AlreadyCommitted(f"job {entry.job_id[:12]} was committed by attempt {winner.attempt}", winner)
        raise StorageError(
            f"{self.store.url}/{entry_key(entry.job_id)} does not stay: is something else removing entries?"
        )

    def _discard(self, objects: Iterable[Object]) -> None:
        """Remove objects that no entry names. Best effort: what stays is garbage, which never counts."""
        for item in objects:
            try:
                self.store.delete(item.key)
            except StorageError as error:
                log.info("%s stays as garbage: %s", item.key, error)
                return

    # What was given up

    def record_failure(
        self,
        job_id: str,
        job: Mapping[str, Any],
        reason: str,
        kind: str,
        traceback: str,
        attempts: int,
        inputs: Mapping[str, str] | None = None,
    ) -> Failure:
        """Write down why a job was given up; a later record of the same job replaces this one."""
        end = traceback[-MAX_TRACEBACK:]  # where the error is
        failure = Failure(job_id, job, kind, reason, end, attempts, inputs or {}, datetime.now(UTC))
        self.store.put(failure_key(job_id), write_failure(failure), content_type="application/json")
        return failure

    def failures(self, unreadable: Callable[[Unreadable], None] = warn) -> Iterator[Failure]:
        """The jobs given up and not committed since, in the order of their ids."""
        failures = list(self._records("failures/", read_failure, unreadable))
        done = self.committed() if failures else set()
        return (failure for failure in failures if failure.job_id not in done)

    def given_up(self) -> set[str]:
        """The ids of jobs with a record of failure, committed since or not, by one listing."""
        return set(self._job_ids("failures/"))

    def clear_failure(self, job_id: str) -> None:
        self.store.delete(failure_key(job_id))

    # What is derived, and what is taken out

    def build_index(self, *, rebuild: bool = False) -> "IndexSummary":
        """Bring the index up to date: only entries that it lacks are read, or all of them with `rebuild`."""
        from service.index import update_index

        return update_index(self, rebuild=rebuild)

    def verify(
        self, subject: str = "*", style: str = "*", method: str = "*", known: Mapping[str, str] | None = None
    ) -> Steps[Checked]:
        """One step per object, held against the sha256 and size in its entry, and per entry that cannot be read; LoRAs
        that runs trained too."""
        entries, loras, unreadable = self._held(subject, style, method)
        objects = [(entry.job_id, item) for entry in entries for item in entry.objects.values()]
        objects += [(lora.training_id, lora.object) for lora in loras]
        return verify(self.store, objects, unreadable, known)

    def garbage(self, older_than_s: float = GARBAGE_S, now: datetime | None = None) -> list[Garbage]:
        """Attempts that no entry names, uploads that were never finished and trainings that nobody went on with, older
        than this; nothing is removed.

        ValueError for an age at which a commit may still be under way. Any number of runs may be at work meanwhile.
        """
        if older_than_s < 2 * COMMIT_S:
            raise ValueError(
                f"garbage is at least {2 * COMMIT_S:.0f} s old, not {older_than_s:.0f}: younger attempts may be at work"
            )
        now = now or datetime.now(UTC)
        found = list(find_garbage(self.store, self.committed(), self.existing, older_than_s, now))
        return found + list(TrainedLoRAs(self.store).garbage(older_than_s, now))

    def collect(self, garbage: Sequence[Garbage]) -> Steps[tuple[Garbage, bool]]:
        """Remove what `garbage` found, one step each; False for what turned out to be in use."""
        trained = TrainedLoRAs(self.store)

        def is_still(item: Garbage) -> bool:
            return is_garbage(item, self.existing) if item.name.startswith("pairs/") else trained.is_garbage(item)

        return Steps(len(garbage), lambda: collect(self.store, garbage, is_still))

    def remove(self, entries: Sequence[Entry]) -> Steps[Entry]:
        """Take these entries back with their objects, one step each. The index is as it was: build it again."""
        return remove(self.store, entry_key, entries)

    def copy_to(self, dest: "Catalog", subject: str = "*", style: str = "*", method: str = "*") -> Steps[Copied]:
        """Copy entries with their objects, and the LoRAs that runs trained for them, one step each; what `dest` has is
        kept. See `compare.copy`."""
        entries, loras, unreadable = self._held(subject, style, method)
        return copy(self.store, dest.store, entries, loras, unreadable, dest.existing, dest.publish)

    def differences(self, other: "Catalog") -> list[Difference]:
        """What the two do not both hold with the same content. Corrupted when an entry cannot be read."""
        return differences(*(map(held, one._everything()) for one in (self, other)))

    def _everything(self) -> Iterator[Entry | TrainedLoRA]:
        yield from self.entries(_refuse)
        yield from TrainedLoRAs(self.store).all(_refuse)

    def _held(self, subject: str, style: str, method: str) -> tuple[list[Entry], list[TrainedLoRA], list[Unreadable]]:
        """What matches and the trained LoRAs that it was made of: all there are, in use or not, where all matches."""
        unreadable: list[Unreadable] = []
        entries = self.select(subject, style, method, unreadable.append)
        loras = list(TrainedLoRAs(self.store).all(unreadable.append))
        if (subject, style, method) != ("*", "*", "*"):
            used = {entry.job[role].get("lora") for entry in entries for role in ("subject", "style")}
            loras = [lora for lora in loras if lora.training_id in used]
        return entries, loras, unreadable

    def choose(
        self,
        subject: str = "*",
        style: str = "*",
        method: str = "*",
        *,
        top: int | None = None,
        by: str = "harmonic",
        unreadable: Callable[[Unreadable], None] = warn,
    ) -> Choice:
        """As `select`; the method `best` stands for the best scored merge of each pair, `top` keeps the k best of all.

        `by` is one of `choose.SCORES`.
        """
        best = method == BEST
        return choose(self.select(subject, style, "*" if best else method, unreadable), best=best, top=top, by=by)

    def pull(
        self,
        dest: Path,
        subject: str = "*",
        style: str = "*",
        method: str = "*",
        extras: Iterable[str] = (),
        *,
        layout: str = "flat",
        top: int | None = None,
        by: str = "harmonic",
        **options: Any,
    ) -> Steps[Pulled]:
        """One step per file: the merged LoRAs with their sidecars, under names that a person can read; see `pull.pull`.

        `extras` are patterns of further objects: `samples/*`, `mergers.safetensors`, `peft.safetensors`; the other
        options are those of `choose` and `PullOptions`.
        """
        unreadable: list[Unreadable] = []
        choice = self.choose(subject, style, method, top=top, by=by, unreadable=unreadable.append)
        wanted = PullOptions(layout=layout, extras=tuple(extras), **options)
        return pull(self.store, choice.entries, dest, wanted, unreadable=unreadable, skipped=not_compared(choice))

    def where(self, subject: str = "*", style: str = "*", method: str = "*", **chosen: Any) -> "Selection":
        """The merges of `choose`, each with its LoRA as a local file: see `client.Selection`."""
        from service.client import Selection

        return Selection(self.store, self.choose(subject, style, method, **chosen).entries)

    # How it is stored

    def _job_ids(self, prefix: str) -> Iterator[str]:
        for found in self.store.list(prefix):
            job_id = found.key.removeprefix(prefix).removesuffix(".json")
            if JOB_ID.fullmatch(job_id) and found.key == f"{prefix}{job_id}.json":
                yield job_id
            else:
                log.warning("%s/%s is not a record of a job: left out", self.store.url, found.key)

    def _records(
        self, prefix: str, read: Callable[[bytes, str], T], unreadable: Callable[[Unreadable], None]
    ) -> Iterator[T]:
        def record(job_id: str) -> T | Unreadable | None:
            key = f"{prefix}{job_id}.json"
            try:
                return read(self._record(key), job_id)
            except NotFound:  # removed since the listing
                return None
            except Corrupted as error:
                return Unreadable(key, str(error))

        for found in parallel(record, self._job_ids(prefix), READS):
            if isinstance(found, Unreadable):
                unreadable(found)
            elif found is not None:
                yield found

    def _record(self, key: str) -> bytes:
        return self.store.get_range(key, 0, MAX_BYTES + 1)


def entry_key(job_id: str) -> str:
    return f"entries/{job_id}.json"


def failure_key(job_id: str) -> str:
    return f"failures/{job_id}.json"


def _describe(directory: str, name: str, body: bytes | Path) -> Object:
    digest, size = hashlib.sha256(), 0
    for chunk in [body] if isinstance(body, bytes) else LocalStore(body.parent).stream(body.name):
        digest.update(chunk)
        size += len(chunk)
    content_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
    return Object(name, f"{directory}/{name}", digest.hexdigest(), size, content_type)


def _refuse(unreadable: Unreadable) -> None:
    raise Corrupted(f"{unreadable.key}: {unreadable.reason}")
