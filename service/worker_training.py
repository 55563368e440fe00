"""What a worker does to train: the LoRAs of a manifest's pictures, adapters for a masked-token base, and pairs whose
method trains.

A training says where it is every few seconds, and leaves a checkpoint in the catalog's store every so often: uploaded
behind the next steps, one at a time, so that a slow store makes them rarer and not the training slower. Whoever takes
it up again goes on from there, and on the same kind of machine ends with the same bytes.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from io import BytesIO
from typing import Any, TypeVar

import torch
from PIL import Image

from service.device import Device, timed
from service.errors import BadInput, NotFound, StorageError
from service.jobs import TRAINING_ALGORITHM, Concept, Job, Scorers, TrainJob, canonical_json, identity
from service.masked_bases import MaskedBases
from service.messages import Began, JobResult, Learned, Message
from service.scoring import Judges
from service.trained import TrainedLoRA, TrainedLoRAs
from service.translation import failed, translated
from service.worker_inputs import Prepared
from ziplora import formats
from ziplora.adapter_files import write_adapter
from ziplora.base import Base
from ziplora.joint import joint_training, jointly_merged
from ziplora.merged import Instances, Merged, Pictures
from ziplora.styledrop import AdapterTraining, IterativeTraining
from ziplora.styledrop_knobs import AdapterSettings, FeedbackSettings
from ziplora.train import Training, TrainSettings, finite_steps

T = TypeVar("T")
AnyTraining = Training | AdapterTraining | IterativeTraining
Waiting = Callable[[Callable[[], T]], Generator[Message, None, T]]
SAY_S = 2.0  # between two words of a training


@dataclass(frozen=True, slots=True)
class Trainer:
    """A worker's means. `masked`: bases of adapters; `judges` pick for their second rounds; `images` reads the pictures
    of a concept or training; `waiting` calls the store, with signs of life while it does not answer."""

    base: Base
    masked: MaskedBases
    judges: Judges
    device: Device
    loras: TrainedLoRAs
    checkpoint_s: float
    images: Callable[[Concept | TrainJob], list[Image.Image]]

    def train(self, job: TrainJob, waiting: "Waiting[Any]") -> Iterator[Message]:
        """A LoRA from its pictures to the catalog. Every failure that belongs to it comes back as a value."""
        yield Began((job.job_id,))
        stages: dict[str, float] = {}
        self.device.memory()  # peaks count from here
        try:
            with translated(job):
                if (yield from waiting(lambda: self._existing(job))) is not None:
                    yield JobResult(job.job_id, "already")
                    return
                with timed(stages, "fetch"):
                    images = yield from waiting(lambda: self.images(job))
                    if job.is_adapter:
                        yield from waiting(lambda: self.masked.get(job.base))
                        yield from waiting(lambda: self.judges.load(Scorers(clip=job.clip)))
                with timed(stages, "train"), self._training(job, images) as training:
                    losses = yield from self._steps(job.job_id, training, waiting)
                    content = self._written(job, training)
                report = self._report(training, losses, stages)
                with timed(stages, "commit"):
                    made = yield from waiting(lambda: self._commit(job, content, report))
        except Exception as error:
            yield failed(job, error, stages)
        else:
            peak = self.device.peak_bytes()
            yield JobResult(job.job_id, "committed", stages=stages, n_bytes=made.size, peak_bytes=peak)

    def _training(self, job: TrainJob, images: Sequence[Image.Image]) -> AnyTraining:
        if job.is_adapter:
            return self._adapter_training(job, images)
        return Training(self.base, images, TrainSettings(**job.settings), captions=job.captions)

    def _adapter_training(self, job: TrainJob, images: Sequence[Image.Image]) -> AdapterTraining | IterativeTraining:
        base, settings = self.masked.get(job.base), dict(job.settings)
        feedback = settings.pop("feedback", None)
        if feedback is None:
            return AdapterTraining(base, images, job.captions, AdapterSettings(**settings))
        judge, _ = self.judges.load(Scorers(clip=job.clip))
        assert judge is not None, "a plan with feedback has a CLIP"
        named = {name: value for name, value in feedback.items() if name != "clip"}
        wanted = FeedbackSettings(**{**named, "prompts": tuple(named["prompts"])})
        return IterativeTraining(base, images, job.captions, AdapterSettings(**settings), wanted, judge)

    def pictures(self, job: Job) -> Pictures:
        """What the training of a pair is given. BadInput where a picture cannot be read, or there are none."""
        return Pictures(
            instances(job.subject, self.images(job.subject)), instances(job.style, self.images(job.style)), job.seed
        )

    def joint(self, one: Prepared, waiting: "Waiting[Any]") -> Generator[Message, None, Merged | Exception]:
        """A pair's own training: `ziplora.joint`, with checkpoints. What it raises is its value, as of other merges."""
        assert one.pictures is not None
        self.device.memory()  # peaks count from here
        try:
            with timed(one.stages, "merge"), joint_training(self.base, one.pictures, one.knobs) as training:
                return jointly_merged(training, (yield from self._steps(one.job.job_id, training, waiting)))
        except Exception as error:
            return error
        finally:
            one.peak_bytes = self.device.peak_bytes()

    def forget(self, job_id: str) -> None:
        """What was left to go on from is of no use any more."""
        with suppress(StorageError):
            self.loras.drop_checkpoint(job_id)

    def _steps(
        self, job_id: str, training: AnyTraining, waiting: "Waiting[Any]"
    ) -> Generator[Message, None, list[float]]:
        """All steps that are left; the losses of those."""
        self._resume(training, (yield from waiting(lambda: self.loras.checkpoint(job_id))))
        yield Learned(job_id, training.step, len(training))
        losses: list[float] = []
        said = saved = time.monotonic()
        unsaid = 0
        with ThreadPoolExecutor(1, "checkpoint") as thread:
            upload: Future[None] | None = None
            for step in finite_steps(training):
                losses.append(step.loss)
                now = time.monotonic()
                if now - saved >= self.checkpoint_s and (upload is None or upload.done()):
                    saved = now
                    upload = thread.submit(self._save, job_id, _state_bytes(training))
                if now - said >= SAY_S or step.step == len(training):
                    said, recent, unsaid = now, losses[unsaid:], len(losses)
                    yield Learned(job_id, step.step, len(training), sum(recent) / len(recent))
        return losses

    def _resume(self, training: AnyTraining, content: bytes | None) -> None:
        """Go on from a checkpoint; from the start where it is another device's or dtype's, or no checkpoint at all."""
        if content is None:
            return
        with suppress(Exception):  # whatever a file that is none makes torch's reader raise
            training.restore(torch.load(BytesIO(content), map_location="cpu", weights_only=True))

    def _save(self, job_id: str, content: bytes) -> None:
        with suppress(StorageError):  # the next one may be taken
            self.loras.put_checkpoint(job_id, content)

    def _existing(self, job: TrainJob) -> TrainedLoRA | None:
        try:
            return self.loras.get(job.job_id)
        except NotFound:
            return None

    def _commit(self, job: TrainJob, content: bytes, report: dict[str, Any]) -> TrainedLoRA:
        made = self.loras.commit(job.job_id, job.name, job.role, identity(job), content, report)
        self.forget(job.job_id)
        return made

    def _written(self, job: TrainJob, training: AnyTraining) -> bytes:
        """The LoRA in kohya layout; fp16, as published LoRAs are. An adapter as adapter_files.py writes it."""
        own = {
            "ziplora.training": job.job_id,
            "ziplora.base": job.base.digest,
            "ziplora.version": version("ziplora"),
            "ziplora.train.algorithm": str(TRAINING_ALGORITHM),
            "ziplora.train.settings": canonical_json(dict(job.settings)),
        }
        metadata = {**training.metadata(), **own}
        if not isinstance(training, Training):
            return write_adapter(training.adapter(), metadata)
        assert job.base.architecture != "amused"
        return formats.write_kohya(
            training.lora(),
            metadata=metadata,
            architecture=job.base.architecture,
            title=job.id,
            trigger=job.settings["trigger"],
        )

    def _report(self, training: AnyTraining, losses: Sequence[float], stages: dict[str, float]) -> dict[str, Any]:
        recent = losses[-50:]
        return {
            "steps": training.step,
            "steps_here": len(losses),  # fewer where an earlier attempt had begun
            "loss": sum(recent) / len(recent) if recent else None,
            "stages": dict(stages),
            "device": self.device.model,
            "dtype": str(training.base.dtype).removeprefix("torch."),
        }


@dataclass(frozen=True, slots=True)
class TrainedFiles:
    """Where the LoRAs that runs trained lie, looked up once each."""

    loras: TrainedLoRAs
    known: dict[str, TrainedLoRA] = field(default_factory=dict)

    def with_file(self, concept: Concept) -> Concept:
        """The concept with its LoRA's file, also where a run trained it. NotFound, Corrupted."""
        if not concept.trained:
            return concept
        if concept.lora_sha256 not in self.known:
            self.known[concept.lora_sha256] = self.loras.get(concept.lora_sha256)
        lora = self.known[concept.lora_sha256]
        return replace(concept, lora=self.loras.location(lora), lora_sha256=lora.sha256, trained=False)


def instances(concept: Concept, images: Sequence[Image.Image]) -> Instances:
    """What joint training is given of a concept. BadInput without pictures."""
    if not images:
        raise BadInput(f"{concept.role} {concept.id} has no pictures, and joint training learns from those of both")
    captions = concept.captions or (concept.prompt,) * len(images)
    return Instances(tuple(images), captions, concept.prompt, concept.trigger)


def _state_bytes(training: AnyTraining) -> bytes:
    file = BytesIO()
    torch.save(training.state(), file)
    return file.getvalue()
