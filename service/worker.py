"""One worker: a resident base model, and tiles of jobs from their LoRA files to committed entries.

Runs the same in this process and as a Ray actor. What a job yields depends on the job alone, not on what the worker
did before: every random number comes from the job's own seeds, and the slots hold nothing over from the last pair.
Where several pairs share a forward pass (on a GPU, see side_by_side.py) that holds up to rounding.

What a merge is made from is read in worker_inputs.py, what is published of it is made in worker_results.py, trainings
are done in worker_training.py.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter

from service.base_files import read_base
from service.best import Contest
from service.catalog import Catalog
from service.device import Device, timed
from service.errors import BadInput, ManifestError, NotFound
from service.jobs import Concept, Job, TrainJob, canonical_json
from service.masked_bases import MaskedBases
from service.messages import Began, JobResult, Message, Stalled, Tile, TileDone, WorkerSettings
from service.method_facts import trains
from service.scoring import Judges
from service.side_by_side import SideBySide
from service.storage import open_store
from service.trained import TrainedLoRAs
from service.translation import failed, is_out_of_memory, translated
from service.uploads import Made, PatientStore, Uploads
from service.worker_inputs import Inputs, Prepared
from service.worker_results import Results
from service.worker_training import TrainedFiles, Trainer
from ziplora.base import Base, load_base
from ziplora.lora import LoRA
from ziplora.merged import Merged, Pair, Words
from ziplora.methods import METHODS

T = TypeVar("T")
STALL_S = 5.0  # between two signs of life while waiting for something outside
FETCHES = 2  # LoRAs read at a time


class Worker:
    """Holds the base between jobs. Raises BadInput from the constructor when the base cannot be loaded."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        torch.set_num_threads(settings.threads)
        self.device = Device(settings.device, settings.gpu_share)
        started = time.monotonic()
        self.base: Base = self._load_base()
        self.load_s = time.monotonic() - started
        self.catalog = Catalog(open_store(settings.catalog))
        self.judges = Judges(self.device.name)
        self.masked = MaskedBases(self.device, settings.dtype)
        self.inputs = Inputs(settings, self.base, self.base_digest, self.device)
        self.side_by_side = SideBySide(settings.side_by_side, self.device.is_gpu)
        self.store = PatientStore(settings.store_patience_s)
        self.uploads = Uploads(self.catalog, self.store, *([] if settings.overlap else [0]))
        self.trained = TrainedFiles(TrainedLoRAs(self.catalog.store))
        self.trainer = Trainer(
            self.base,
            self.masked,
            self.judges,
            self.device,
            self.trained.loras,
            settings.checkpoint_s,
            self.inputs.images,
        )
        self.results = Results(self.base, self.masked, self.device, self.inputs, self.trained, self.judges)
        self._fetches = ThreadPoolExecutor(FETCHES, "fetch")
        self._calls = ThreadPoolExecutor(1, "call")  # what is needed now does not queue behind what is fetched ahead

    def _load_base(self) -> Base:
        settings = self.settings
        try:
            files = read_base(settings.base, settings.base_revision)
            if settings.base_digest not in (None, files.digest):
                raise BadInput(
                    f"base {settings.base} on this machine has digest {files.digest[:12]}, the run was planned with"
                    f" {str(settings.base_digest)[:12]}: put the same files on every machine"
                )
            self.base_digest = files.digest
            dtype = self.device.dtype(settings.dtype)
            base = load_base(files.directory, device=self.device.name, dtype=dtype, variant=files.variant)
            base.backend = settings.compile
            return base
        except (ManifestError, OSError, ValueError) as error:
            raise BadInput(f"base {settings.base} does not load: {error}") from error

    def close(self) -> None:
        """Take back what has not begun; uploads under way end or leave garbage."""
        self.store.close()
        self.uploads.close()
        for threads in (self._fetches, self._calls):
            threads.shutdown(wait=False, cancel_futures=True)

    # A tile

    def run(self, job: Job) -> JobResult:
        """One job from end to end. Every failure that belongs to it comes back as a value."""
        messages = [*self.work(Tile((job,))), *self.work(Tile(()))]
        return next(message for message in messages if isinstance(message, JobResult))

    def work(self, tile: Tile) -> Iterator[Message]:
        """Do the tile's jobs and say what happens. The last word is TileDone; what is still uploading then is reported
        with the next tile, or with an empty one, which waits for it."""
        started, waited = time.monotonic(), _Waited()
        for training in (job for job in tile.jobs if isinstance(job, TrainJob)):
            yield from self.trainer.train(training, partial(self._waiting, waited=waited))
        # jobs that may share a forward pass stand together; the order is otherwise the tile's
        left = deque(sorted((job for job in tile.jobs if isinstance(job, Job)), key=merges_like))
        while left:
            jobs = self._next(left)
            yield Began(tuple(job.job_id for job in jobs))
            if self.settings.overlap:
                self._fetch_ahead([*islice(left, 2 * len(jobs)), *tile.ahead])
            yield from self._do(jobs, waited)
            yield from self.uploads.finished()
        if not tile.jobs:
            while self.uploads.pending:
                yield from self._wait_for_upload(waited)
        seconds = time.monotonic() - started
        yield self._done(seconds, max(0.0, seconds - waited.seconds))

    def _next(self, left: deque[Job]) -> list[Job]:
        jobs = [left.popleft()]
        while (
            left
            and not trains(jobs[0].method)
            and len(jobs) < self.side_by_side.size
            and merges_like(left[0]) == merges_like(jobs[0])
        ):
            jobs.append(left.popleft())
        return jobs

    def _do(self, jobs: Sequence[Job], waited: "_Waited") -> Iterator[Message]:
        """Merge and sample `jobs`, which may share a forward pass. Results of those that end here; the rest uploads."""
        contests = {job.job_id: Contest(job) for job in jobs}
        while contests:  # once, but for `best`, which has several candidates
            ready: list[Prepared] = []
            for job in [contest.take() for contest in contests.values()]:
                stages: dict[str, float] = {}
                try:
                    with translated(job):
                        if (yield from self._waiting(partial(self._is_committed, job), waited)):
                            del contests[job.job_id]
                            yield JobResult(job.job_id, "already")
                        else:
                            ready.append((yield from self._prepared(job, stages, waited)))
                except Exception as error:
                    came = failed(job, error, stages, getattr(error, "sha256", None))
                    yield from self._settle(contests, job, came, waited)
            trained: list[tuple[Prepared, Merged | Exception]] = []
            for one in (one for one in ready if one.pictures is not None):
                trained.append((one, (yield from self.trainer.joint(one, partial(self._waiting, waited=waited)))))
            for one, merged in chain(trained, self._merge([one for one in ready if one.pictures is None])):
                try:
                    with translated(one.job):
                        if isinstance(merged, Exception):
                            raise merged
                        made = self.results.made(one, merged)
                except Exception as error:  # a defect of ours, or of a library: the job fails, the worker lives
                    yield from self._settle(contests, one.job, failed(one.job, error, one.stages), waited)
                else:
                    if one.pictures is not None:
                        self.trainer.forget(one.job.job_id)
                    yield from self._settle(contests, one.job, made, waited)

    def _settle(
        self, contests: dict[str, Contest], job: Job, came: Made | JobResult, waited: "_Waited"
    ) -> Iterator[Message]:
        """What came of a candidate; if with it the job is over, it uploads or has failed."""
        outcome = contests[job.job_id].add(job, came)
        if outcome is None:
            return
        del contests[job.job_id]
        if isinstance(outcome, JobResult):
            yield outcome
            return
        self.uploads.start(outcome)
        while self.uploads.pending > self.uploads.ahead:
            yield from self._wait_for_upload(waited)

    def _is_committed(self, job: Job) -> bool:
        """Before any work: another run on the same catalog may have been here since this one was planned."""
        try:
            self.catalog.entry(job.job_id)
        except NotFound:
            return False
        return True

    def _waiting(self, function: Callable[[], T], waited: "_Waited") -> Generator[Message, None, T]:
        """The function's value, from a thread; signs of life while the store is away. To be used with `yield from`."""
        with waited:
            future: Future[T] = self._calls.submit(self.store.call, function)
            while True:
                try:
                    return future.result(STALL_S)
                except TimeoutError:
                    if future.done():
                        raise
                yield Stalled(self.store.trouble or "reading")

    def _wait_for_upload(self, waited: "_Waited") -> Iterator[Message]:
        with waited:
            results = self.uploads.finished(STALL_S)
        yield from results or (Stalled(self.store.trouble or "uploading"),)

    def _fetch_ahead(self, jobs: Iterable[Job]) -> None:
        """Have the LoRAs of these jobs in memory before they are asked for. What goes wrong is seen when they are."""
        wanted = {
            concept.lora_sha256: concept
            for job in jobs
            for concept in (job.subject, job.style)
            if concept.lora_sha256 and not concept.trained
        }
        # half of the cache at most, or they would push out what is in use
        for concept in islice(wanted.values(), max(1, self.inputs.loras.room // 2)):
            if concept.lora_sha256 not in self.inputs.loras:
                self._fetches.submit(self.inputs.lora, concept)

    def _done(self, seconds: float, busy_s: float) -> TileDone:
        used, held = self.inputs.used(), frozenset(str(key) for key in self.inputs.loras.held())
        return TileDone(held, seconds, busy_s, used.hits, used.misses, used.n_bytes, self.side_by_side.size)

    # A job

    def _prepared(self, job: Job, stages: dict[str, float], waited: "_Waited") -> Generator[Message, None, Prepared]:
        method = METHODS[job.method]
        knobs: Any = TypeAdapter(method.knobs).validate_python(dict(job.knobs))
        if job.scorers:
            with timed(stages, "score"):  # a judge that does not load shall not cost a merge
                self.judges.load(job.scorers)
        if method.masked:
            with timed(stages, "fetch"):
                adapters = yield from self._waiting(lambda: self._adapters(job), waited)
            return Prepared(job, knobs, *adapters, (None, None), stages)
        if method.trains:
            with timed(stages, "fetch"):
                pictures = yield from self._waiting(lambda: self.trainer.pictures(job), waited)
            return Prepared(job, knobs, LoRA({}), LoRA({}), (None, None), stages, pictures=pictures)
        with timed(stages, "fetch"):
            of_subject = yield from self._waiting(lambda: self.trained.with_file(job.subject), waited)
            of_style = yield from self._waiting(lambda: self.trained.with_file(job.style), waited)
            subject = yield from self._waiting(lambda: self.inputs.lora(of_subject), waited)
            style = yield from self._waiting(lambda: self.inputs.lora(of_style), waited)
        observe = method.calibration(knobs, job.seed)
        with timed(stages, "calibrate"):
            calibrations = (
                self.inputs.calibration(of_subject, subject, observe) if observe else None,
                self.inputs.calibration(of_style, style, observe) if observe else None,
            )
        return Prepared(job, knobs, subject, style, calibrations, stages)

    def _adapters(self, job: Job) -> tuple[LoRA, LoRA]:
        """The subject's and the style's, and the base that they belong to in memory."""
        self.masked.get(job.base)
        subject, style = (self.inputs.adapter(self.trained.with_file(one)) for one in (job.subject, job.style))
        return subject, style

    def _merge(self, ready: Sequence[Prepared]) -> Iterator[tuple[Prepared, Merged | Exception]]:
        """Merge side by side; with fewer at a time where memory does not suffice, and one by one to find out whose
        error it is."""
        if not ready:
            return
        method, knobs = METHODS[ready[0].job.method], ready[0].knobs
        pairs = [
            Pair(
                one.subject,
                one.style,
                *one.calibrations,
                method.combined_prompt(knobs, one.job.subject.trigger, one.job.style.trigger),
                (_words(one.job.subject), _words(one.job.style)),
                seed=one.job.seed,
            )
            for one in ready
        ]
        stages: dict[str, float] = {}
        free, before = self.device.memory()
        merged: list[Merged] = []
        failure: Exception | None = None
        try:
            with timed(stages, "merge"):
                base: Any = self.masked.get(ready[0].job.base) if method.masked else self.base
                merged = method.load()(base, pairs, knobs)
        except Exception as error:
            failure = error
        for one in ready:
            one.stages["merge"] = one.stages.get("merge", 0.0) + stages["merge"] / len(ready)
            one.peak_bytes, one.neighbours = self.device.peak_bytes(), len(ready) - 1
        if failure is None:
            self.side_by_side.fitted(len(ready), self.device.peak_bytes() - before if self.device.is_gpu else 0, free)
            yield from zip(ready, merged, strict=True)
        elif len(ready) == 1:
            yield ready[0], failure
        else:
            failure = failure.with_traceback(None) if is_out_of_memory(failure) else failure
            half = len(ready) // 2 if is_out_of_memory(failure) else 1
            if is_out_of_memory(failure):
                self.side_by_side.too_many(len(ready))
                self.device.give_back()
            for first in range(0, len(ready), half):
                yield from self._merge(ready[first : first + half])


class _Waited:
    """Seconds spent waiting for something outside."""

    def __init__(self) -> None:
        self.seconds = self._since = 0.0

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        self.seconds += time.monotonic() - self._since


def _words(concept: Concept) -> Words:
    return Words(concept.prompt, concept.trigger)


def merges_like(job: Job) -> tuple[str, str]:
    """Equal for jobs that can share a forward pass."""
    return job.method, canonical_json(dict(job.knobs))
