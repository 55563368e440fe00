"""A scenario of bench/faults.py in which the worker that dies is training: a pair whose method is joint, then a LoRA of
pictures alone. Either goes on from its checkpoint on the actor that Ray starts again, and the run ends complete."""

import dataclasses
import os
import signal
from pathlib import Path

import yaml

from service import events
from service.catalog import Catalog
from service.manifest import read_manifest
from service.plan import plan
from service.pool import InlinePool
from service.run import run
from service.trained import TrainedLoRAs
from tests.bench.stage import LORAS, PATIENCE_S, ROOT, Scene, check, failures
from tests.commands import wait_until

STEPS = 200  # of either training: some twenty seconds
TRAINING = {"rank": 4, "steps": STEPS, "lr": 4e-4}


def manifest(root: Path) -> Path:
    """A subject of which there are only pictures, merged directly with a style; and both trained together."""
    mushroom, retro = LORAS / "subjects/mushroom", LORAS / "styles/retro"
    style = {"lora": str(retro / "retro.safetensors"), "prompt": "a cat in szn style", "trigger": "szn style"}
    content = {
        "base": str(ROOT / "ziplora/pocket/weights/base"),
        "subjects": {"mushroom": {"images": str(mushroom / "*.png"), "prompt": "a photo of a sks", "trigger": "sks"}},
        "styles": {"retro": {**style, "images": str(retro / "*.png")}},
        "training": TRAINING,
        "merge": [{"method": "joint", **TRAINING}, "direct"],
        "samples": {"prompts": []},
        "output": str(root / "catalog"),
    }
    path = root / "manifest.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def training_killed(scene: Scene) -> dict[str, object]:
    """The one worker's process is killed in the middle of either training, as soon as there is a checkpoint."""
    scene.settings = dataclasses.replace(scene.settings, checkpoint_s=1.0)
    (joint,) = (job for job in scene.jobs if job.method == "joint")
    (lora,) = scene.trainings
    pids: list[int] = []

    def act() -> None:
        for job_id in (joint.job_id, lora.job_id):
            wait_until(lambda: TrainedLoRAs(scene.catalog.store).checkpoint(job_id) is not None, PATIENCE_S)  # noqa: B023
            assert scene.pool is not None
            (process,) = scene.pool.processes.values()
            pids.append(process.pid)
            os.kill(process.pid, signal.SIGKILL)

    scene.during(act, workers=1)
    lost = scene.of(events.WorkerGone)
    assert [(event.worker, event.returns) for event in lost] == [(lost[0].worker, True)] * 2
    assert len(set(pids)) == 2
    check(scene)
    assert [event.job.method for event in failures(scene)] == ["joint"]
    assert [event.retry for event in scene.of(events.TrainingFailed)] == [True]
    went_on = [_went_on(scene, *one) for one in enumerate((joint.job_id, lora.job_id))]
    assert all(0 < step < STEPS for step in went_on), went_on
    (made,) = TrainedLoRAs(scene.catalog.store).all(print)
    assert (made.report["steps"], made.report["steps_here"]) == (STEPS, STEPS - went_on[1])
    assert not list(scene.catalog.store.list("checkpoints/"))
    assert _without_a_break(scene) == made.sha256
    return {
        "steps of each training": STEPS,
        "went on after step": went_on,
        "bytes as without a break": True,
        "attempts that failed": len(failures(scene)) + len(scene.of(events.TrainingFailed)),
    }


def _went_on(scene: Scene, loss: int, job_id: str) -> int:
    """After which step a training began once more, after the worker was lost so many times before."""
    lost = [number for number, event in enumerate(scene.seen) if isinstance(event, events.WorkerGone)]
    after = scene.seen[lost[loss] :]
    return next(event.step for event in after if isinstance(event, events.TrainingAt) and event.job.job_id == job_id)


def _without_a_break(scene: Scene) -> str:
    """The sha256 of the LoRA that the same training ends with in this process."""
    settings = dataclasses.replace(scene.settings, catalog=str(scene.root / "whole"))
    found = plan(dataclasses.replace(read_manifest(scene.root / "manifest.yaml"), output=settings.catalog))
    pool = InlinePool(settings)
    run([job for job in found.jobs if job.trainings], pool, Catalog(settings.catalog), run_id="whole",
        trainings=found.trainings_left)  # fmt: skip
    pool.close()
    (made,) = TrainedLoRAs(Catalog(settings.catalog).store).all(print)
    return made.sha256
