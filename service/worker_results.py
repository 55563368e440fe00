"""From a merge to what is published of it: its files, pictures of what they do, scores of those, and the report."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from PIL import Image

from service.device import Device, timed
from service.jobs import ALGORITHM, Job, Role
from service.masked_bases import MaskedBases
from service.merged_files import png, sample_list, sampled_with, written
from service.messages import JobResult
from service.scoring import Judges, alignments_of, scored
from service.uploads import Made
from service.worker_inputs import Inputs, Prepared
from service.worker_training import TrainedFiles
from ziplora.base import Base
from ziplora.masked import MaskedBase
from ziplora.merged import Merged
from ziplora.sample import Request, sample_requests
from ziplora.styledrop import sample_mixture


@dataclass(frozen=True, slots=True)
class Results:
    """A worker's means."""

    base: Base
    masked: MaskedBases
    device: Device
    inputs: Inputs
    trained: TrainedFiles
    judges: Judges

    def made(self, one: Prepared, merged: Merged) -> Made:
        """All that the entry of a merge will name. Raises what writing, sampling and scoring raise."""
        job, stages = one.job, one.stages
        with timed(stages, "write"):
            files = written(job, merged, self._circumstances(one, merged), self._adapters(one, merged))
        with timed(stages, "sample"):
            pictures = self._samples(job, files, merged)
            files |= pictures
            if pictures:
                files["merged.png"] = next(iter(pictures.values()))
        report = self._report(one, merged)
        if job.scorers:
            with timed(stages, "score"):
                references: dict[Role, list[Image.Image]] = {
                    concept.role: self.inputs.images(concept) for concept in (job.subject, job.style)
                }
                report["scores"] = scored(job, report["samples"], files, references, self.judges)
        peak = max(one.peak_bytes, self.device.peak_bytes())
        result = JobResult(job.job_id, "committed", stages=stages, peak_bytes=peak, alignments=alignments_of(report))
        return Made(job, files, report, result)

    def _base(self, job: Job, merged: Merged) -> Base | MaskedBase:
        """What the merge is applied to."""
        return self.base if merged.mixture is None else self.masked.get(job.base)

    def _circumstances(self, one: Prepared, merged: Merged) -> dict[str, str]:
        """What the job does not say and the file's header shall."""
        sources = {calibration.source for calibration in one.calibrations if calibration is not None}
        return {
            "ziplora.version": version("ziplora"),
            "ziplora.algorithm": str(ALGORITHM),
            "ziplora.dtype": str(self._base(one.job, merged).dtype).removeprefix("torch."),
            "ziplora.calibrated_on": ", ".join(sorted(sources)) or "nothing",
        }

    def _adapters(self, one: Prepared, merged: Merged) -> dict[Role, str]:
        """sha256 of the files of both, where the result are pictures of adapters: a recipe names them."""
        if merged.mixture is None:
            return {}
        return {
            concept.role: self.trained.with_file(concept).lora_sha256 for concept in (one.job.subject, one.job.style)
        }

    def _samples(self, job: Job, written_files: Mapping[str, bytes], merged: Merged) -> dict[str, bytes]:
        """Pictures of what is published, by object name."""
        settings, files = job.samples, {}
        if settings.n_images == 0:
            return {}
        samples = sample_list(job)
        images = (
            self._mixture_samples(job, merged) if merged.mixture else self._lora_samples(job, written_files, merged)
        )
        for sample, image in zip(samples, images, strict=True):
            text = {key: sample[key] for key in ("prompt", "seed", "style_strength")} | {"job": job.job_id}
            files[sample["object"]] = png(image, text)
        return dict(sorted(files.items()))

    def _lora_samples(self, job: Job, written_files: Mapping[str, bytes], merged: Merged) -> Iterable[Image.Image]:
        settings = job.samples
        loras = sampled_with(written_files, merged, settings.style_strengths)
        return sample_requests(
            self.base,
            [Request(loras[one["style_strength"]], one["prompt"], one["seed"]) for one in sample_list(job)],
            steps=settings.steps,
            guidance=settings.guidance,
            width=settings.width,
            height=settings.height,
            negative=settings.negative,
            scheduler=settings.scheduler,
        )

    def _mixture_samples(self, job: Job, merged: Merged) -> Iterator[Image.Image]:
        assert merged.mixture is not None
        base = self.masked.get(job.base)
        for one in sample_list(job):
            weights = merged.mixture.styled(one["style_strength"])
            yield from sample_mixture(
                base, merged.subject, merged.style, [one["prompt"]], [one["seed"]], weights, steps=job.samples.steps
            )

    def _report(self, one: Prepared, merged: Merged) -> dict[str, Any]:
        report: dict[str, Any] = {
            "merge": dict(merged.report),
            "device": self.device.model,
            "dtype": str(self._base(one.job, merged).dtype).removeprefix("torch."),
            "compiled": self.base.backend if merged.mixture is None else None,
            "merged_beside": one.neighbours,  # other pairs in the same forward pass: they change the last bits
        }
        sides = zip((one.job.subject, one.job.style), one.calibrations, (one.subject, one.style), strict=True)
        for concept, calibration, lora in sides:
            # every layer of an adapter is one that it was trained on: nothing is carried beside what is combined
            carried = [path for path in lora.layers if path not in self.base.slots.targets and not merged.mixture]
            report[concept.role] = {
                "calibrated_on": calibration.source if calibration else None,
                "merged_modules": len(lora.layers) - len(carried),
                "carried_modules": len(carried),
            }
            if concept.trained:
                report[concept.role]["lora_sha256"] = self.trained.with_file(concept).lora_sha256
        report["samples"] = sample_list(one.job)
        report["peak_bytes"] = max(one.peak_bytes, self.device.peak_bytes())
        return report
