"""What can go wrong, as a tree; `str(error)` is one sentence that says what, which, limit and what to do next.

ServiceError                     exit code 1
├─ RunStopped                    most jobs failed for one reason: the run was ended before all had
├─ ManifestError                 the user's file: path, field, what was expected; exit code 2
├─ StorageError
│  ├─ NotFound                   no such object, bucket or directory
│  ├─ AlreadyCommitted           another attempt won: not a failure; `.entry` is the winner where it is known
│  ├─ Unavailable                the store did not answer, or asked to slow down: worth another try later
│  ├─ AccessDenied               wrong credentials, or no right to do this
│  ├─ StoreFull                  no space or quota left: another try fails too
│  └─ Corrupted                  the bytes are not those that the entry promises, or a name is not safe to write
└─ JobError
   ├─ BadInput                   a LoRA or image that cannot be used: never retried
   ├─ OutOfMemory                of the GPU or the host: smaller batch first, then elsewhere
   ├─ WorkerLost                 the process or its node vanished
   └─ DeadlineExceeded           a call took longer than its limit
"""

from typing import Any


class ServiceError(Exception):
    """The root of this tree; all of it survives pickling, since workers send these to the coordinator."""

    exit_code = 1


class RunStopped(ServiceError):
    pass


class ManifestError(ServiceError):
    exit_code = 2


class StorageError(ServiceError):
    exit_code = 2  # where it ends a command: the user's location, credentials, disk or server


class NotFound(StorageError):
    pass


class AlreadyCommitted(StorageError):
    def __init__(self, message: str, entry: Any = None) -> None:
        super().__init__(message)
        self.entry = entry  # catalog.Entry, or None when the store only reports that the key is taken


class Unavailable(StorageError):
    pass


class AccessDenied(StorageError):
    pass


class StoreFull(StorageError):
    pass


class Corrupted(StorageError):
    pass


class JobError(ServiceError):
    pass


class BadInput(JobError):
    exit_code = 2  # where it ends a command: a base that no worker can load


class OutOfMemory(JobError):
    pass


class WorkerLost(JobError):
    pass


class DeadlineExceeded(JobError):
    pass
