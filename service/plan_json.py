"""A plan as a program reads it."""

from dataclasses import asdict
from typing import Any

from service.base_files import BaseFiles
from service.lora_checks import CheckedLoRA, trigger_of
from service.plan import Plan


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values; jobs by pair, method, seed and id, without their settings."""
    return {
        "manifest": {"name": plan.manifest, "sha256": plan.manifest_digest},
        "output": plan.output,
        "base": _base_json(plan.base) if plan.base else None,
        "own_bases": [_base_json(base) for base in plan.own_bases],
        "scorers": asdict(plan.scorers),
        "loras": [_lora_json(lora) for lora in plan.loras],
        "counts": {"jobs": len(plan.jobs), "committed": len(plan.committed), "left": len(plan.left)},
        "trainings": [
            {
                "training_id": training.job_id,
                "role": training.role,
                "id": training.id,
                "base": training.base.digest,
                "images": len(training.images),
                "settings": dict(training.settings),
                "trained": training.job_id in plan.trained,
            }
            for training in plan.trainings
        ],
        "images_per_job": max((job.samples.n_images for job in plan.jobs), default=0),
        "bytes": {**asdict(plan.n_bytes), "total": plan.n_bytes.total},
        "seconds": {**asdict(plan.duration), "total_s": plan.duration.total_s},
        "defaulted": list(plan.defaulted),
        "problems": list(plan.problems),
        "jobs": [
            {
                "job_id": job.job_id,
                "subject": job.subject.id,
                "style": job.style.id,
                "method": job.method,
                "seed": job.seed,
                "committed": job.job_id in plan.committed,
            }
            for job in plan.jobs
        ],
    }


def _base_json(base: BaseFiles) -> dict[str, Any]:
    return {
        "location": base.location,
        "revision": base.revision,
        "architecture": base.architecture,
        "variant": base.variant,
        "digest": base.digest,
        "default_size": base.default_size,
        "scheduler": base.scheduler,
        "prediction_type": base.prediction_type,
        "bytes": base.n_bytes,
    }


def _lora_json(lora: CheckedLoRA) -> dict[str, Any]:
    trigger, source = trigger_of(lora)
    return {
        "id": lora.spec.id,
        "role": lora.spec.role,
        "location": lora.spec.lora,
        "sha256": lora.sha256,
        "bytes": lora.n_bytes,
        "layout": lora.layout,
        "ranks": list(lora.ranks),
        "modules": len(lora.modules),
        "carried": lora.carried,
        "trigger": trigger,
        "trigger_source": source,
        "images": [asdict(image) for image in lora.images],
        "weight": lora.spec.weight,
        "notes": list(lora.notes),
        "problems": list(lora.problems),
    }
