"""StyleDrop + DreamBooth as a method of a manifest, on a random masked-token base beside SDXL's: adapters that are
trained once for a whole grid, the entries of their pairs, and what the plan says and refuses."""

import dataclasses
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from service import events
from service.catalog import Catalog
from service.errors import BadInput, ManifestError
from service.export import export
from service.index_rows import row
from service.jobs import Job, TrainJob, from_json, identity, to_json
from service.manifest import read_manifest
from service.plan import Plan, plan
from service.plan_json import plan_json
from service.plan_text import summary_lines
from service.pool import InlinePool
from service.report import make_report, result_of
from service.run import run
from service.trained import TrainedLoRAs
from tests.commands import started, wait_until
from tests.grid import Grid
from tests.test_worker import settings
from tests.tiny import tiny_amused
from tests.tiny_scorers import tiny_clip, tiny_vit
from ziplora.adapter_files import read_adapter
from ziplora.lora import LoRA, delta
from ziplora.masked import MaskedBase, load_masked
from ziplora.merged import Instances, Pair, Pictures
from ziplora.methods import METHODS
from ziplora.score import load_clip
from ziplora.styledrop import IterativeTraining, sample_mixture
from ziplora.styledrop_knobs import AdapterSettings, FeedbackSettings, Mixture, StyleDropKnobs

MERGE = {"method": "styledrop", "base": "amused", "rank": 2, "steps": 4, "lr": 0.05, "text": 2.0, "sample_steps": 3}
SAMPLES = {"prompts": ["{subject} in {style}"], "seeds": [0, 5], "steps": 2, "size": 32, "style_strengths": [1.0, 0.0]}


@dataclass(frozen=True)
class Made:
    grid: Grid
    plan: Plan
    seen: Sequence[events.Event]

    @property
    def catalog(self) -> Catalog:
        return Catalog(self.plan.output)

    @property
    def base(self) -> MaskedBase:
        return made_base(self.grid)

    def job(self, pair: str) -> Job:
        return next(job for job in self.plan.jobs if (job.pair, job.method) == (pair, "styledrop"))

    def adapter(self, training_id: str) -> LoRA:
        lora = TrainedLoRAs(self.catalog.store).get(training_id)
        return read_adapter(Path(self.plan.output) / lora.key)[0]


def done(grid: Grid, planned: Plan, jobs: Sequence[Job] | None = None, checkpoint_s: float = 60.0) -> Made:
    own = dataclasses.replace(settings(grid), catalog=planned.output, checkpoint_s=checkpoint_s)
    pool, seen = InlinePool(own), list[events.Event]()
    left = planned.left if jobs is None else jobs
    run(left, pool, Catalog(planned.output), run_id="test", trainings=planned.trainings_left, observers=[seen.append])
    pool.close()
    return Made(grid, planned, seen)


def made_base(grid: Grid) -> MaskedBase:
    return load_masked(grid.root / "amused")


def with_base(grid: Grid) -> Grid:
    tiny_amused().save_pretrained(grid.root / "amused")
    return grid


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, grid_template: Grid) -> Made:
    """Two subjects × two styles, by the direct merge and by StyleDrop, scored."""
    root = tmp_path_factory.mktemp("styledrop") / "grid"
    shutil.copytree(grid_template.root, root)
    grid = with_base(Grid(root))
    tiny_clip(root / "scorers/clip"), tiny_vit(root / "scorers/vit")
    scores = {"clip": "scorers/clip", "dino": "scorers/vit"}
    planned = plan(read_manifest(grid.manifest(merge=["direct", MERGE], samples=SAMPLES, scores=scores)))
    planned.check()
    return done(grid, planned)


def committed(made: Made) -> dict[str, dict[str, str]]:
    return {
        entry.job_id: {name: item.sha256 for name, item in entry.objects.items()} for entry in made.catalog.entries()
    }


def adapter_files(made: Made) -> dict[str, str]:
    return {lora.training_id: lora.sha256 for lora in TrainedLoRAs(made.catalog.store).all(print)}


def pixels(content: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(BytesIO(content)))


def test_each_concept_is_trained_once_for_all_of_its_pairs(made: Made) -> None:
    assert Counter(type(event).__name__ for event in made.seen)["TrainingDone"] == 4
    names = {lora.called for lora in TrainedLoRAs(made.catalog.store).all(print)}
    assert names == {"subjects.dog-amused", "subjects.cat-amused", "styles.ink-amused", "styles.oil-amused"}
    assert Counter(entry.method for entry in made.catalog.entries()) == {"direct": 4, "styledrop": 4}
    assert len({training for job in made.plan.jobs for training in job.trainings}) == 4
    assert not list(made.catalog.failures())


def test_a_second_run_has_nothing_to_do(made: Made) -> None:
    again = plan(read_manifest(made.grid.root / "manifest.yaml"))
    assert (again.left, again.trainings_left) == ((), ())
    assert "trained   4 LoRAs, by an earlier run" in summary_lines(again)


def test_what_a_pair_leaves(made: Made) -> None:
    job = made.job("dog/ink")
    entry = made.catalog.entry(job.job_id)
    assert entry.objects.keys() == {"recipe.json", "merged.png", *(f"samples/00{i}.png" for i in range(4))}
    recipe = json.loads(made.catalog.store.get(entry.objects["recipe.json"].key))
    files = adapter_files(made)
    assert recipe["adapters"] == {role: files[training] for role, training in recipe["trainings"].items()}
    assert recipe["trainings"] == {"subject": job.subject.lora_sha256, "style": job.style.lora_sha256}
    assert recipe["base"] == {"digest": job.base.digest, "architecture": "amused"}
    assert recipe["weights"] == {"subject": 0.5, "style": 0.5, "contrast": 0.0, "text": 2.0}
    assert [one["seed"] for one in recipe["pictures"]] == [0, 5, 0, 5]
    assert str(made.grid.root) not in json.dumps(recipe)
    assert entry.report["subject"] == {
        "calibrated_on": None, "merged_modules": 36, "carried_modules": 0, "lora_sha256": recipe["adapters"]["subject"]
    }  # fmt: skip
    scores = entry.report["scores"]
    assert scores["missing"] == {}
    assert all(isinstance(scores[f"{name}_alignment"], float) for name in ("style", "subject", "text"))


def test_its_pictures_are_those_of_both_adapters_and_at_strength_0_of_the_subjects_alone(made: Made) -> None:
    job, base = made.job("cat/oil"), made.base
    subject, style = made.adapter(job.subject.lora_sha256), made.adapter(job.style.lora_sha256)
    entry = made.catalog.entry(job.job_id)

    def stored(number: int) -> np.ndarray[Any, Any]:
        return pixels(made.catalog.store.get(entry.objects[f"samples/00{number}.png"].key))

    def drawn(style: LoRA | None, weights: Mixture) -> list[np.ndarray[Any, Any]]:
        prompts = ["sks cat in szn oil style"] * 2
        return [np.asarray(one) for one in sample_mixture(base, subject, style, prompts, [0, 5], weights, steps=3)]

    both, alone = drawn(style, Mixture(text=2.0)), drawn(None, Mixture(subject=0.5, style=0.0, text=2.0))
    assert all((stored(i) == both[i]).all() for i in (0, 1))
    assert all((stored(2 + i) == alone[i]).all() for i in (0, 1))
    assert both[0].shape == (16, 16, 3)
    assert any((a != b).any() for a, b in zip(both, alone, strict=True))


def test_the_row_of_the_table_does_the_same_from_pictures(made: Made) -> None:
    """As a library is used: METHODS' function trains both adapters where the pair has pictures alone."""
    job = made.job("dog/oil")

    def instances(id: str, prompt: str, trigger: str) -> Instances:
        image = Image.open(made.grid.root / f"{id}.png").convert("RGB")
        return Instances((image,), (prompt,), prompt, trigger)

    subject = instances("dog", "a photo of sks dog", "sks dog")
    style = instances("oil", "a house in szn oil style", "szn oil style")
    pair = Pair(LoRA({}), LoRA({}), pictures=Pictures(subject, style, 0))
    knobs = StyleDropKnobs(rank=2, steps=4, lr=0.05, text=2.0)
    (merged,) = METHODS["styledrop"].load()(made.base, [pair], knobs)  # type: ignore[arg-type]
    assert merged.mixture == Mixture(text=2.0)
    for found, training in ((merged.subject, job.subject), (merged.style, job.style)):
        stored = made.adapter(training.lora_sha256)
        assert found.layers.keys() == stored.layers.keys()
        for path, layer in stored.layers.items():
            torch.testing.assert_close(delta(found.layers[path]), delta(layer))
    with pytest.raises(ValueError, match="there is no single LoRA"):
        merged.lora()
    with pytest.raises(ValueError, match="two adapters with logits of their own"):
        merged.applied()
    with pytest.raises(ValueError, match="was given none, nor adapters"):
        METHODS["styledrop"].load()(made.base, [Pair(LoRA({}), LoRA({}))], knobs)  # type: ignore[arg-type]


def test_the_same_bytes_in_whatever_order(made: Made) -> None:
    other = plan(dataclasses.replace(read_manifest(made.grid.root / "manifest.yaml"), output=f"{made.grid.root}/other"))
    own = [job for job in reversed(other.jobs) if job.method == "styledrop"]
    other = dataclasses.replace(other, trainings=other.trainings[::-1])
    again = done(made.grid, other, own)
    assert adapter_files(again) == adapter_files(made)
    assert committed(again) == {job.job_id: committed(made)[job.job_id] for job in own}


def test_of_its_pairs_no_file_can_be_had_and_it_says_why(made: Made, tmp_path: Path) -> None:
    reason = "styledrop combines the logits of two adapters at every step of sampling, so there is no merged LoRA"
    pulled = list(made.catalog.pull(tmp_path, method="styledrop"))
    assert {one.state for one in pulled} == {"skipped"}
    assert all(str(one.problem).startswith(reason) for one in pulled)
    entry = made.catalog.entry(made.job("dog/ink").job_id)
    with pytest.raises(BadInput, match=f"dog/ink, nothing to export: {reason}"):
        export(made.catalog.store, entry, 0.6)
    assert not [checked for checked in made.catalog.verify() if checked.problem]
    assert (row(entry)["lora_key"], row(entry)["architecture"]) == (None, "amused")


def test_the_report_holds_it_against_the_merges(made: Made) -> None:
    entries = list(made.catalog.entries())
    report = make_report([result_of(row(entry)) for entry in entries])
    assert (report.against, report.architectures, report.common) == ("direct", ("sdxl",), 4)
    (styledrop,) = (one for one in report.rows if one.method == "styledrop")

    def mean(method: str) -> float:
        return float(
            np.mean([entry.report["scores"]["style_alignment"] for entry in entries if entry.method == method])
        )

    assert styledrop.minus["style"].mean == pytest.approx(mean("styledrop") - mean("direct"))
    (note,) = report.notes
    assert note.startswith("styledrop samples on a base of its own, at that base's size; its seconds are without its ")


# Identity and plan


def planned(grid: Grid, merge: Any = MERGE, **fields: Any) -> Plan:
    return plan(read_manifest(grid.manifest(merge=merge, samples=SAMPLES, **fields)))


def test_a_job_is_its_own_base_wherever_it_lies_and_not_the_manifests(made: Made, grid: Grid) -> None:
    job = next(job for job in planned(with_base(grid)).jobs if job.pair == "dog/ink")
    assert from_json(to_json(job)) == job
    assert identity(job)["base"]["architecture"] == "amused"
    assert job.knobs["base"] == job.base.digest
    assert (job.samples.width, job.samples.steps, job.samples.guidance) == (16, 3, 3.0)
    ids = {training: one.settings["seed"] for one in planned(grid).trainings for training in [one.job_id]}
    assert {*job.trainings} <= ids.keys()

    def of(merge: dict[str, Any]) -> tuple[str, set[str]]:
        found = planned(grid, merge)
        return next(one.job_id for one in found.jobs if one.pair == "dog/ink"), {one.job_id for one in found.trainings}

    (grid.root / "amused").rename(grid.root / "moved")
    assert of({**MERGE, "base": "moved"}) == (job.job_id, set(ids))
    weighed = of({**MERGE, "base": "moved", "style_weight": 0.7})
    assert weighed[0] != job.job_id
    assert weighed[1] == set(ids)  # other weights train nothing
    for change in ({"rank": 3}, {"seed": 1}):
        other = of({**MERGE, "base": "moved", **change})
        assert other[0] != job.job_id
        assert not other[1] & set(ids)
    tiny_amused(seed=1).save_pretrained(grid.root / "amused")
    assert not of(MERGE)[1] & set(ids)
    training = planned(grid).trainings[0]
    assert isinstance(training, TrainJob)
    assert from_json(to_json(training)) == training


def test_the_plan_says_what_it_takes(made: Made) -> None:
    found = plan(dataclasses.replace(read_manifest(made.grid.root / "manifest.yaml"), output="/nowhere/yet"))
    text = "\n".join(summary_lines(found))
    assert f"{made.grid.root}/amused (amused, 16 px, sha256 {found.own_bases[0].digest[:12]}), for styledrop" in text
    assert "trains    subjects.dog-amused on 1 image: rank 2, 4 steps of 1, lr 0.05" in text
    assert "samples of styledrop: 16×16, 3 steps, guidance 3.0: its own base's size, and its own settings" in text
    assert found.duration.train_s > 0
    assert [one["id"] for one in plan_json(found)["trainings"]] == ["dog", "cat", "ink", "oil"]
    alone = dataclasses.replace(read_manifest(made.grid.root / "manifest.yaml"), output="/nowhere/yet")
    alone = dataclasses.replace(alone, merges=alone.merges[1:])
    assert plan(alone).n_bytes.merged == 0
    longer = planned(made.grid, {**MERGE, "steps": 40}, output="elsewhere").duration.train_s
    assert longer == pytest.approx(10 * found.duration.train_s)
    assert found.need is not None
    by_method = {job.method: found.need(job) for job in found.jobs}
    assert by_method["styledrop"] > found.own_bases[0].n_bytes


def test_refusals(grid: Grid) -> None:
    with_base(grid)
    root = grid.root

    def problems(merge: Any, **fields: Any) -> list[str]:
        return list(planned(grid, merge, **fields).problems)

    (sdxl,) = problems(["direct", {**MERGE, "base": "base"}])
    assert sdxl.endswith(
        f"merge[1].base: incompatible base: base {root}/base is a StableDiffusionXLPipeline; expected AmusedPipeline, a"
        " masked-token model such as amused/amused-256"
    )
    (none,) = problems({**MERGE, "base": "nowhere"})
    assert f"merge.base: base {root}/nowhere does not exist; expected a diffusers directory" in none
    (hub,) = problems("styledrop")
    assert (
        "merge.base: base amused/amused-256 is no directory and not in the local hub cache; fetch it once with" in hub
    )
    (turned,) = problems("direct", base="amused")
    assert "; as the base of styledrop it is named in merge: {method: styledrop, base: …}" in turned
    (root / "amused/vqvae/diffusion_pytorch_model.safetensors").unlink()
    (part,) = problems(MERGE)
    assert part.endswith("vqvae/ has no weights; expected diffusion_pytorch_model.safetensors or its shards")


def test_a_changed_base_is_refused_by_the_worker(grid: Grid) -> None:
    found = planned(with_base(grid), subjects=1, styles=1)
    tiny_amused(seed=1).save_pretrained(grid.root / "amused")
    failed = [event for event in done(grid, found).seen if isinstance(event, events.JobGivenUp)]
    assert len(failed) == 1
    assert "on this machine has digest" in failed[0].reason


# The second round


SECOND = {**MERGE, "feedback": 2, "contents": ["a cat", "a house"], "style_share": 0.25}


def scorers(grid: Grid) -> dict[str, str]:
    tiny_clip(grid.root / "scorers/clip")
    return {"clip": "scorers/clip"}


def test_a_style_is_trained_in_two_rounds_where_the_manifest_asks_for_feedback(grid: Grid) -> None:
    found = planned(with_base(grid), SECOND, subjects=1, styles=1, scores=scorers(grid))
    found.check()
    by_role = {training.role: training for training in found.trainings}
    assert "feedback" not in by_role["subject"].settings
    assert by_role["style"].settings["feedback"] == {
        "prompts": ["a cat in szn ink style", "a house in szn ink style"],
        "keep": 2, "per_prompt": 4, "style_share": 0.25, "sample_steps": 3, "contrast": 0.0, "text": 2.0,
        "clip": found.scorers.clip.digest,
    }  # fmt: skip
    assert from_json(to_json(by_role["style"])) == by_role["style"]
    text = "\n".join(summary_lines(found))
    assert "4 steps of 1, lr 0.05, and again with the best 2 of 8 pictures of its own" in text
    made = done(grid, found)
    assert [entry.method for entry in made.catalog.entries()] == ["styledrop"]
    ends = {event.step for event in made.seen if isinstance(event, events.TrainingAt) and event.step == event.steps}
    assert ends == {4, 8}
    lora = TrainedLoRAs(made.catalog.store).get(by_role["style"].job_id)
    told = json.loads(read_adapter(Path(found.output) / lora.key)[1]["ziplora.adapter.feedback"])
    assert len(told) == 2
    assert {one["prompt"] for one in told} <= {"a cat in szn ink style", "a house in szn ink style"}
    once = planned(grid, MERGE, subjects=1, styles=1, scores=scorers(grid), output="once")
    assert {t.role: t.job_id for t in once.trainings}["subject"] == by_role["subject"].job_id
    assert found.duration.train_s > 1.5 * once.duration.train_s


def test_stopped_in_the_second_round_a_run_goes_on_in_it(grid: Grid) -> None:
    merge = {**SECOND, "steps": 10}
    whole = done(grid, planned(with_base(grid), merge, subjects=1, styles=1, scores=scorers(grid), output="whole"))
    found = planned(grid, merge, subjects=1, styles=1, scores=scorers(grid))
    style = next(training for training in found.trainings if training.role == "style")
    prompts = tuple(style.settings["feedback"]["prompts"])
    wanted = FeedbackSettings(prompts, keep=2, style_share=0.25, sample_steps=3, text=2.0)
    images = [Image.open(image.location).convert("RGB") for image in style.images]
    adapter, judge = AdapterSettings(rank=2, steps=10, lr=0.05), load_clip(grid.root / "scorers/clip")
    file = BytesIO()
    with IterativeTraining(made_base(grid), images, style.captions, adapter, wanted, judge) as begun:
        steps = iter(begun)
        while begun.step < 13:
            next(steps)
        torch.save(begun.state(), file)
    TrainedLoRAs(Catalog(found.output).store).put_checkpoint(style.job_id, file.getvalue())
    again = done(grid, found)
    assert 13 in [event.step for event in again.seen if isinstance(event, events.TrainingAt)]
    assert adapter_files(again) == adapter_files(whole)
    assert committed(again) == committed(whole)


def test_feedback_without_a_judge_is_refused_and_so_is_too_much_of_it(grid: Grid) -> None:
    (none,) = planned(with_base(grid), SECOND).problems
    assert none.endswith("merge.feedback: a CLIP picks the pictures: name it under scores")
    with pytest.raises(ManifestError, match="9 pictures to keep of 8 that are made"):
        planned(grid, {**SECOND, "feedback": 9})


# Killed


def test_killed_in_mid_training_a_run_goes_on_from_the_checkpoint(grid: Grid) -> None:
    found = planned(with_base(grid), {**MERGE, "steps": 40}, subjects=1, styles=1)
    checkpoints = grid.root / "catalog/checkpoints"
    command = ("run", grid.root / "manifest.yaml", "--checkpoint-every", 0, "--no-gallery", "--inline")
    killed = started(*command)
    wait_until(lambda: bool(list(checkpoints.glob("*.pt"))), timeout_s=480)
    os.killpg(killed.pid, signal.SIGKILL)
    assert "training subjects.dog-amused begins: 40 steps" in killed.communicate()[0]
    again = done(grid, plan(read_manifest(grid.root / "manifest.yaml")))
    at = [event for event in again.seen if isinstance(event, events.TrainingAt)]
    assert 1 <= at[0].step < 40
    assert not list(checkpoints.glob("*"))
    whole = done(grid, dataclasses.replace(found, output=f"{grid.root}/whole"))
    assert adapter_files(again) == adapter_files(whole)
    assert committed(again) == committed(whole)
