"""LoRAs that runs trained, in the catalog's store: by what they were trained on, so that no run trains one again.
Adapters of a masked-token base are among them: LoRAs for another base, in another layout.

    loras/<training>.json                          what was trained and how it went: its presence is the commit
    loras/<training>/<attempt>/lora.safetensors    the LoRA, which the above names with its sha256
    checkpoints/<job>.pt                           where an unfinished training stands

The protocol is that of the catalog's entries: the file under a name of its own first, the record create-only, and the
record that is read back wins. Checkpoints lie in the store, not on the machine's disk, because a training that loses
its worker is tried again on another one, and an interrupted run may go on anywhere.
"""

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from service.care import Garbage
from service.entry import ATTEMPT, JOB_ID, MAX_BYTES, SHA256, Object, Unreadable
from service.errors import AlreadyCommitted, Corrupted, NotFound, StorageError
from service.steps import parallel
from service.storage import Store

PREFIX = "loras/"
CHECKPOINTS = "checkpoints/"
NAME = "lora.safetensors"
RECORD = re.compile(rf"{PREFIX}({JOB_ID.pattern})\.json")
KEY = re.compile(rf"{PREFIX}({JOB_ID.pattern})/{ATTEMPT.pattern}/{re.escape(NAME)}")
READS = 16  # records at a time


@dataclass(frozen=True, slots=True)
class TrainedLoRA:
    """`training`: the identity of the TrainJob whose id is `training_id`. `name`: what the manifest called it."""

    training_id: str
    name: str
    role: str
    key: str
    sha256: str
    size: int  # bytes
    training: Mapping[str, Any]
    report: Mapping[str, Any]
    created: datetime  # aware, UTC

    @property
    def object(self) -> Object:
        """Its file, as an entry would name it."""
        return Object(NAME, self.key, self.sha256, self.size, "application/octet-stream")

    @property
    def called(self) -> str:
        """As a manifest names it: subjects.dog."""
        return f"{self.role}s.{self.name}"


class TrainedLoRAs:
    """Safe for threads and for any number of processes."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def ids(self) -> set[str]:
        """Of all trainings that are done, by one listing."""
        return {match[1] for found in self.store.list(PREFIX) if (match := RECORD.fullmatch(found.key))}

    def get(self, training_id: str) -> TrainedLoRA:
        """NotFound when it is not trained yet, Corrupted when its record cannot be used."""
        return _read(self.store.get_range(_record_key(training_id), 0, MAX_BYTES + 1), training_id)

    def all(self, unreadable: Callable[[Unreadable], None]) -> Iterator[TrainedLoRA]:
        """In the order of their ids; a record that cannot be read is reported instead of yielded."""

        def record(training_id: str) -> TrainedLoRA | Unreadable | None:
            try:
                return self.get(training_id)
            except NotFound:  # removed since the listing
                return None
            except Corrupted as error:
                return Unreadable(_record_key(training_id), str(error))

        for found in parallel(record, sorted(self.ids()), READS):
            if isinstance(found, Unreadable):
                unreadable(found)
            elif found is not None:
                yield found

    def location(self, lora: TrainedLoRA) -> str:
        return f"{self.store.url}/{lora.key}"

    def commit(
        self,
        training_id: str,
        name: str,
        role: str,
        training: Mapping[str, Any],
        content: bytes,
        report: Mapping[str, Any],
    ) -> TrainedLoRA:
        """Publish a trained LoRA; the one that stands, which another attempt may have published before."""
        key = f"{PREFIX}{training_id}/{uuid.uuid4().hex[:16]}/{NAME}"
        made = TrainedLoRA(
            training_id, name, role, key, hashlib.sha256(content).hexdigest(), len(content), training, report,
            datetime.now(UTC),
        )  # fmt: skip
        _written(made)  # TypeError before anything is uploaded
        self.store.put(key, content)
        return self.publish(made)

    def publish(self, made: TrainedLoRA) -> TrainedLoRA:
        """Write the record of a LoRA whose file is stored, unless there is one; the one that stands."""
        body = _written(made)
        with suppress(AlreadyCommitted):
            self.store.put(_record_key(made.training_id), body, content_type="application/json", create_only=True)
        standing = self.get(made.training_id)
        if standing.key != made.key:
            with suppress(StorageError):  # what stays is garbage that no record names
                self.store.delete(made.key)
        return standing

    def garbage(self, older_than_s: float, now: datetime) -> Iterator[Garbage]:
        """Files that no record names, and checkpoints that nobody went on from, older than this at `now`."""
        limit = now - timedelta(seconds=older_than_s)
        for found in self.store.list(PREFIX):
            match = KEY.fullmatch(found.key)
            if match and found.modified < limit and not self._is_named(match[1], found.key):
                yield Garbage(found.key.rpartition("/")[0], (found,), None, "no record names it")
        for found in self.store.list(CHECKPOINTS):
            if found.modified < limit:
                yield Garbage(found.key, (found,), None, "a checkpoint that nobody went on from")

    def is_garbage(self, garbage: Garbage) -> bool:
        """Whether what `garbage` found still is: no record names the file, nobody has gone on from the checkpoint."""
        (item,) = garbage.objects
        match = KEY.fullmatch(item.key)
        if match:
            return not self._is_named(match[1], item.key)
        try:
            return self.store.head(item.key).modified == item.modified
        except StorageError:  # gone, or no answer: then nothing is known
            return False

    def _is_named(self, training_id: str, key: str) -> bool:
        try:
            return self.get(training_id).key == key
        except NotFound:
            return False
        except StorageError:  # unreadable, or no answer: then nothing is known
            return True

    # Trainings under way, and jobs whose method trains

    def checkpoint(self, job_id: str) -> bytes | None:
        try:
            return self.store.get(_checkpoint_key(job_id))
        except NotFound:
            return None

    def put_checkpoint(self, job_id: str, content: bytes) -> None:
        self.store.put(_checkpoint_key(job_id), content)

    def drop_checkpoint(self, job_id: str) -> None:
        self.store.delete(_checkpoint_key(job_id))


def _record_key(training_id: str) -> str:
    return f"{PREFIX}{training_id}.json"


def _checkpoint_key(job_id: str) -> str:
    return f"{CHECKPOINTS}{job_id}.pt"


def _written(lora: TrainedLoRA) -> bytes:
    fields = {name: getattr(lora, name) for name in lora.__dataclass_fields__} | {"created": lora.created.isoformat()}
    return json.dumps(fields, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


def _read(body: bytes, training_id: str) -> TrainedLoRA:
    """Corrupted, with the reason, for anything that is not exactly such a record."""
    try:
        fields = json.loads(body)
        match = KEY.fullmatch(fields["key"])
        if fields["training_id"] != training_id or match is None or match[1] != training_id:
            raise ValueError("it is stored under another training's name")
        if not SHA256.fullmatch(fields["sha256"]) or type(fields["size"]) is not int or fields["size"] < 0:
            raise ValueError("it does not say what its file is")
        names = ("name", "role")
        if not all(isinstance(fields[name], str) for name in names) or not isinstance(fields["training"], dict):
            raise ValueError("it does not say what was trained")
        return TrainedLoRA(
            **{**{name: fields[name] for name in TrainedLoRA.__dataclass_fields__},
               "created": datetime.fromisoformat(fields["created"])}
        )  # fmt: skip
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Corrupted(f"the record of training {training_id[:12]} cannot be used: {error}") from error
