"""Runs as jobs of a Ray cluster: submit, look, follow, stop, over its Jobs API. Owns ray's JobSubmissionClient.

A submission's id comes from the manifest's digest and the catalog, and a number: `ziplora-<16 hex digits>-1`. Ray takes
each id once, so two that submit the same at the same time cannot both start it. What failed or was stopped is submitted
again under the next number, and goes on from what is committed; see `submit`.
"""

import asyncio
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from service.errors import AccessDenied, BadInput, NotFound, ServiceError
from service.parcel import run_name

MAX_PARCEL_BYTES = 95 * 2**20  # the job server takes 100 MiB in one request
STOP_WAIT_S = 60  # from SIGTERM to SIGKILL; Ray's own 3 s are too few to end workers and leave a record
CHATTY = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging")
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
ID = re.compile(r"ziplora-[0-9a-f]{16}-[1-9][0-9]{0,5}")


class NoJobServer(ServiceError):
    exit_code = 2


@dataclass(frozen=True, slots=True)
class Submission:
    """One attempt at a run on a cluster. `state`: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""

    id: str
    state: str
    message: str
    exit_code: int | None
    started: datetime | None  # aware, UTC
    ended: datetime | None
    catalog: str
    manifest: str  # as its sender named it
    manifest_digest: str

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED

    @property
    def number(self) -> int:
        return int(self.id.rpartition("-")[2])


class JobServer:
    """The Jobs API of a cluster at `http://head:8265`. NoJobServer when nothing of the kind answers there, AccessDenied
    when it does not take the token; every method may raise both."""

    def __init__(self, address: str, token: str | None = None) -> None:
        if not re.fullmatch(r"https?://[^/\s]+/?", address):
            raise BadInput(f"{address} is no address of a Ray job server; expected http://head:8265")
        self.address = address.rstrip("/")
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with self._errors(), _without(os.environ, "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
            # those would silently replace the address
            self._client = JobSubmissionClient(self.address, headers=headers)

    def submissions(self, name: str) -> list[Submission]:
        """All of this name, in the order of their numbers."""
        with self._errors():
            jobs = self._client.list_jobs()
        found = [_submission(job) for job in jobs if ID.fullmatch(job.submission_id or "")]
        return sorted((one for one in found if one.id.rpartition("-")[0] == name), key=lambda one: one.number)

    def submission(self, id: str) -> Submission:
        """NotFound."""
        with self._errors(id):
            return _submission(self._client.get_job_info(id))

    def submit(
        self,
        command: str,
        *,
        manifest: str,
        manifest_digest: str,
        catalog: str,
        directory: Path | None = None,
        again: bool = False,
    ) -> tuple[Submission, bool]:
        """(the submission that does this, whether it is new).

        One that waits or runs is left to it. One that succeeded is not repeated unless `again`. One that failed or was
        stopped is followed by a new one: a run goes on from what is committed. The driver runs on the head and takes
        neither CPU nor GPU of its own; `directory` is sent to all machines and becomes its working directory.
        """
        name = run_name(manifest_digest, catalog)
        while True:
            earlier = self.submissions(name)
            last = earlier[-1] if earlier else None
            if last and (not last.has_ended or (last.state == "SUCCEEDED" and not again)):
                return last, False
            id = f"{name}-{last.number + 1 if last else 1}"
            if self._start(
                id, command, directory, {"manifest": manifest, "digest": manifest_digest, "catalog": catalog}
            ):
                return self.submission(id), True

    def logs(self, id: str) -> str:
        """All that it has written so far; NotFound."""
        with self._errors(id):
            return self._client.get_job_logs(id)

    def follow(self, id: str) -> Iterator[str]:
        """What it has written and writes, piece by piece, until it ends; NotFound."""
        self.submission(id)
        with self._errors(id), asyncio.Runner() as runner:
            pieces: AsyncIterator[str] = self._client.tail_job_logs(id).__aiter__()
            while (piece := runner.run(_next(pieces))) is not None:
                yield piece

    def stop(self, id: str, timeout_s: float = STOP_WAIT_S + 30.0) -> Submission:
        """As SIGTERM to the run, and wait until it has ended; one that ended before is left as it is. NotFound."""
        with self._errors(id):
            if not _submission(self._client.get_job_info(id)).has_ended:
                self._client.stop_job(id)
        end = time.monotonic() + timeout_s
        while not (now := self.submission(id)).has_ended and time.monotonic() < end:
            time.sleep(0.5)
        return now

    def _start(self, id: str, command: str, directory: Path | None, metadata: Mapping[str, str]) -> bool:
        """False when the id was taken in the meantime."""
        environment: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}}
        if directory is not None:
            environment["working_dir"] = str(directory)
        try:
            with self._errors():
                self._client.submit_job(
                    entrypoint=command, submission_id=id, runtime_env=environment, metadata=dict(metadata)
                )
        except ServiceError as error:
            if f"{id} already exists" in str(error):
                return False
            raise
        return True

    @contextmanager
    def _errors(self, id: str = "") -> Iterator[None]:
        """Ray's errors and those of the connection in our words, here only."""
        try:
            yield
        except AuthenticationError as error:
            had = "does not take this token" if "invalid" in str(error).lower() else "demands a token"
            raise AccessDenied(
                f"{self.address} {had}: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file, to the cluster's"
            ) from error
        except OSError as error:  # requests' errors are such, too
            raise NoJobServer(
                f"no Ray job server answers at {self.address} ({_last_line(error)}): is it the dashboard's address,"
                " such as http://head:8265, and can this machine reach it?"
            ) from error
        except RuntimeError as error:
            if "status code 404" in str(error) and id:
                raise NotFound(
                    f"{self.address} knows no submission {id}: `ziplora status` lists those of a manifest"
                ) from error
            raise ServiceError(f"{self.address} refused: {_last_line(error)}") from error


async def _next(pieces: AsyncIterator[str]) -> str | None:
    return await anext(pieces, None)


def _submission(job: JobDetails) -> Submission:
    metadata = job.metadata or {}
    return Submission(
        id=job.submission_id,
        state=job.status.value,
        message=job.message or "",
        exit_code=job.driver_exit_code,
        started=_time(job.start_time),
        ended=_time(job.end_time),
        catalog=metadata.get("catalog", ""),
        manifest=metadata.get("manifest", ""),
        manifest_digest=metadata.get("digest", ""),
    )


def _time(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None


def _last_line(error: BaseException) -> str:
    """Ray answers with its server's traceback: the reason is its end."""
    lines = [line.strip(" .") for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if line), type(error).__name__)[:500]


@contextmanager
def _without(environment: Any, *names: str) -> Iterator[None]:
    kept = {name: environment.pop(name) for name in names if name in environment}
    try:
        yield
    finally:
        environment.update(kept)
