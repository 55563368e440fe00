"""LoRAs that a run trains: who waits for which, what the store keeps of them, and a run that is killed."""

import dataclasses
import json
import os
import re
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from service import events
from service.catalog import Catalog
from service.errors import Corrupted, NotFound
from service.jobs import Job, from_json, to_json
from service.manifest import read_manifest
from service.plan import Plan, plan
from service.pool import InlinePool
from service.run import run
from service.storage import Store
from service.trained import TrainedLoRAs
from service.trainings import Trainings
from tests.commands import started, wait_until, ziplora
from tests.grid import Grid
from tests.test_worker import settings
from ziplora import formats

DOG = {"prompt": "a photo of sks dog", "trigger": "sks dog", "images": "dog.png"}
CAT = {"lora": "cat.safetensors", "prompt": "a photo of sks cat", "trigger": "sks cat"}
INK = {"prompt": "a house in szn ink style", "trigger": "szn ink style", "images": "ink.png"}
OIL = {"lora": "oil.safetensors", "prompt": "a house in szn oil style", "trigger": "szn oil style"}


def manifest(grid: Grid, **fields: object) -> Path:
    """The dog and the ink have images only, the cat and the oil a LoRA."""
    content = {
        "base": "base",
        "subjects": {"dog": DOG, "cat": CAT},
        "styles": {"ink": INK, "oil": OIL},
        "training": {"rank": 2, "steps": 4, "lr": 1e-3},
        "merge": "direct",
        "samples": {"prompts": "{subject} in {style}", "steps": 2, "size": 32},
        "output": "catalog",
        **fields,
    }
    path = grid.root / "manifest.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def planned(grid: Grid, **fields: object) -> Plan:
    return plan(read_manifest(manifest(grid, **fields)))


@pytest.fixture
def made(grid: Grid) -> Plan:
    found = planned(grid)
    found.check()
    return found


def pairs(jobs: object) -> list[str]:
    return sorted(job.pair for job in jobs)  # type: ignore[attr-defined]


# Who waits for which


def test_a_pair_waits_for_what_it_needs_and_for_nothing_else(made: Plan) -> None:
    dog, ink = made.trainings_left
    assert (dog.pair, ink.pair) == ("subjects.dog", "styles.ink")
    board = Trainings(made.trainings_left, made.jobs)
    assert pairs(board.ready) == ["cat/oil"]
    assert board.left == 2
    assert board.take(workers=2, pairs=1) == dog
    assert board.take(workers=2, pairs=1) is None  # the other worker has a pair to do
    assert board.take(workers=2, pairs=0) == ink
    board.put_back(ink)
    assert board.take(workers=3, pairs=1) == ink
    assert pairs(board.done(dog.job_id)) == ["dog/oil"]
    assert pairs(board.done(ink.job_id)) == ["cat/ink", "dog/ink"]
    assert board.left == 0


def test_what_cannot_be_trained_takes_its_pairs_with_it(made: Plan) -> None:
    dog, ink = made.trainings_left
    board = Trainings(made.trainings_left, made.jobs)
    assert pairs(board.given_up(ink.job_id)) == ["cat/ink", "dog/ink"]
    assert pairs(board.done(dog.job_id)) == ["dog/oil"]


def test_with_one_worker_the_pairs_that_wait_for_nothing_come_first(made: Plan) -> None:
    board = Trainings(made.trainings_left, made.jobs)
    assert board.take(workers=1, pairs=1) is None
    assert board.take(workers=1, pairs=0) is not None


# Identity


def test_a_training_is_its_base_pictures_captions_and_settings(grid: Grid, made: Plan) -> None:
    dog, ink = made.trainings
    assert from_json(to_json(dog)) == dog
    job = next(job for job in made.jobs if job.pair == "dog/ink")
    assert job.trainings == (dog.job_id, ink.job_id) == job.loras
    assert isinstance(from_json(to_json(job)), Job)
    assert from_json(to_json(job)) == job

    def changed(**fields: object) -> list[str]:
        return [training.job_id for training in planned(grid, **fields).trainings]

    same = [dog.job_id, ink.job_id]
    assert changed() == same
    assert changed(samples={"prompts": []}, merge="ties", output="other") == same
    assert not set(changed(training={"rank": 2, "steps": 5, "lr": 1e-3})) & set(same)
    (grid.root / "dog.txt").write_text("sks dog on a beach")
    assert [a == b for a, b in zip(changed(), same, strict=True)] == [False, True]
    (grid.root / "dog.txt").unlink()
    (grid.root / "dog.png").write_bytes((grid.root / "owl.png").read_bytes())
    assert [a == b for a, b in zip(changed(), same, strict=True)] == [False, True]


def test_the_same_pictures_under_two_names_are_trained_once(grid: Grid) -> None:
    again = {"hound": DOG, "big": {**DOG, "weight": 1.5}, "slow": {**DOG, "training": {"steps": 9}}}
    found = planned(grid, subjects={"dog": DOG, **again}, styles={"oil": OIL})
    found.check()
    assert [(one.id, one.settings["steps"]) for one in found.trainings] == [("dog", 4), ("slow", 9)]
    assert len({job.job_id for job in found.jobs}) == 4


# What the store keeps


def test_the_first_that_is_published_stands(store: Store, made: Plan) -> None:
    loras, dog = TrainedLoRAs(store), made.trainings[0]
    with pytest.raises(NotFound):
        loras.get(dog.job_id)
    first = loras.commit(dog.job_id, "dog", "subject", {"training": 1}, b"first", {})
    second = loras.commit(dog.job_id, "dog", "subject", {"training": 1}, b"second", {})
    assert second == first == loras.get(dog.job_id)
    assert loras.ids() == {dog.job_id}
    assert [store.get(lora.key) for lora in loras.all(print)] == [b"first"]
    assert len(list(store.list("loras/"))) == 2
    assert loras.checkpoint(dog.job_id) is None
    loras.put_checkpoint(dog.job_id, b"half")
    assert loras.checkpoint(dog.job_id) == b"half"
    loras.drop_checkpoint(dog.job_id)
    assert loras.checkpoint(dog.job_id) is None


def test_a_file_that_no_record_names_and_an_old_checkpoint_are_garbage(local: Catalog, made: Plan) -> None:
    loras, dog = TrainedLoRAs(local.store), made.trainings[0]
    standing = loras.commit(dog.job_id, "dog", "subject", {}, b"x", {})
    local.store.put(f"loras/{dog.job_id}/killed/lora.safetensors", b"half")
    loras.put_checkpoint(dog.job_id, b"state")
    assert local.garbage() == []
    later = datetime.now(UTC) + timedelta(days=2)
    found = local.garbage(now=later)
    assert sorted(item.name for item in found) == [f"checkpoints/{dog.job_id}.pt", f"loras/{dog.job_id}/killed"]
    assert all(gone for _, gone in local.collect(found))
    assert local.garbage(now=later) == []
    assert local.store.get(standing.key) == b"x"


@pytest.mark.parametrize("change", [{"key": "pairs/x/lora.safetensors"}, {"sha256": "x"}, {"size": -1}, {"name": 3}])
def test_a_record_that_is_none_is_refused(local: Catalog, made: Plan, change: dict[str, object]) -> None:
    loras, dog = TrainedLoRAs(local.store), made.trainings[0]
    lora = loras.commit(dog.job_id, "dog", "subject", {}, b"x", {})
    record = json.loads(local.store.get(f"loras/{lora.training_id}.json"))
    local.store.put(f"loras/{lora.training_id}.json", json.dumps(record | change).encode())
    with pytest.raises(Corrupted, match="cannot be used"):
        loras.get(dog.job_id)


# Runs


def test_what_cannot_be_trained_is_given_up_with_its_reason_and_the_rest_is_done(grid: Grid, made: Plan) -> None:
    (grid.root / "ink.png").write_text("not a picture")  # after the plan has seen it
    pool, seen = InlinePool(settings(grid)), list[events.Event]()
    catalog = Catalog(grid.root / "catalog")
    progress = run(made.jobs, pool, catalog, run_id="test", trainings=made.trainings_left, observers=[seen.append])
    pool.close()
    assert pairs(progress.committed) == ["cat/oil", "dog/oil"]
    assert pairs(job for job, _ in progress.given_up) == ["cat/ink", "dog/ink"]
    assert {reason for _, reason in progress.given_up} == {progress.given_up[0][1]}
    assert "its style ink could not be trained: styles.ink: " in progress.given_up[0][1]
    assert {failure.kind for failure in catalog.failures()} == {"BadInput"}
    (failed,) = (event for event in seen if isinstance(event, events.TrainingFailed))
    assert (failed.training.id, failed.retry) == ("ink", False)

    entry = next(entry for entry in catalog.entries() if entry.subject == "dog")
    lora = TrainedLoRAs(catalog.store).get(made.trainings[0].job_id)
    assert entry.job["subject"]["lora"] == lora.training_id
    assert entry.report["subject"]["lora_sha256"] == lora.sha256
    file = formats.read_lora(catalog.store.get(lora.key))
    assert (file.trigger, file.metadata["ziplora.train.rank"]) == ("sks dog", "2")


def test_killed_in_mid_training_a_run_goes_on_from_the_checkpoint(grid: Grid) -> None:
    path = manifest(grid, styles={"oil": OIL}, training={"rank": 2, "steps": 30, "lr": 1e-3})
    command = ["run", path, "--checkpoint-every", 0, "--no-gallery", "--inline"]
    checkpoints = grid.root / "catalog/checkpoints"
    killed = started(*command)
    wait_until(lambda: bool(list(checkpoints.glob("*.pt"))), timeout_s=480)
    os.killpg(killed.pid, signal.SIGKILL)
    assert "training subjects.dog begins: 30 steps" in killed.communicate()[0]
    assert not (grid.root / "catalog/loras").exists()

    resumed = ziplora(*command)
    assert resumed.returncode == 0, resumed.stderr
    goes_on = re.search(r"training subjects\.dog goes on after step (\d+) of 30", resumed.stdout)
    assert goes_on, resumed.stdout
    assert 1 <= int(goes_on[1]) < 30
    assert "subjects.dog trained in " in resumed.stdout

    catalog = Catalog(grid.root / "catalog")
    assert sorted(entry.subject for entry in catalog.entries()) == ["cat", "dog"]
    assert not list(catalog.failures())
    assert not list(checkpoints.glob("*.pt"))
    (lora,) = TrainedLoRAs(catalog.store).all(print)
    assert lora.report["steps"] == 30
    assert lora.report["steps_here"] == 30 - int(goes_on[1])
    listed = ziplora("loras", grid.root / "catalog", grid.root / "copies")
    assert listed.returncode == 0, listed.stderr
    assert "subjects.dog" in listed.stdout
    assert "1 copied, 0 were there" in listed.stdout
    assert formats.read_lora(grid.root / "copies/dog.safetensors").trigger == "sks dog"
    again = ziplora(*command)
    assert again.returncode == 0, again.stderr
    assert "trained   1 LoRA, by an earlier run" in again.stdout
    assert "nothing to do: all 2 jobs are committed" in again.stdout

    # what it ended with is what it would have come to without a break
    whole = dataclasses.replace(settings(grid), catalog=str(grid.root / "whole"))
    pool = InlinePool(whole)
    found = plan(dataclasses.replace(read_manifest(path), output=whole.catalog))
    run(found.left[:1], pool, Catalog(whole.catalog), run_id="test", trainings=found.trainings_left)
    pool.close()
    (other,) = TrainedLoRAs(Catalog(whole.catalog).store).all(print)
    assert other.sha256 == lora.sha256
