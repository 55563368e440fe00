"""One worker and a tile: what it says, pairs side by side, what it does behind its own back."""

import dataclasses

import torch
from safetensors.torch import load_file, save_file

from service.jobs import Job
from service.messages import Began, JobResult, Message, Tile, TileDone
from service.worker import Worker
from tests.grid import Grid
from tests.test_worker import jobs_of, settings
from ziplora import formats
from ziplora.lora import delta, digest

QUICK = {"samples": {"prompts": []}}


def results(messages: list[Message]) -> dict[str, JobResult]:
    return {message.job_id: message for message in messages if isinstance(message, JobResult)}


def all_of(worker: Worker, jobs: tuple[Job, ...]) -> list[Message]:
    return [*worker.work(Tile(jobs)), *worker.work(Tile(()))]


def test_it_says_what_it_merges_and_when_it_is_free(grid: Grid) -> None:
    jobs = jobs_of(grid.manifest(**QUICK))
    worker = Worker(settings(grid))
    messages = list(worker.work(Tile(jobs[:3], jobs[3:])))
    assert [message.job_ids for message in messages if isinstance(message, Began)] == [
        (job.job_id,) for job in jobs[:3]
    ]
    done = messages[-1]
    assert isinstance(done, TileDone)
    assert done.held >= {job.subject.lora_sha256 for job in jobs[:3]}
    assert done.misses["lora"] == 4
    assert done.hits["lora"] >= 2
    assert 0 < done.busy_s <= done.seconds
    rest = list(worker.work(Tile(())))
    assert isinstance(rest[-1], TileDone)
    found = results([*messages, *rest])
    assert {(result.status, result.reason) for result in found.values()} == {("committed", None)}
    assert set(found) == {job.job_id for job in jobs[:3]} == worker.catalog.committed()


def test_pairs_side_by_side_are_merged_as_if_alone(grid: Grid) -> None:
    jobs = jobs_of(grid.manifest(merge=[{"method": "ziplora", "steps": 3}, {"method": "direct"}], **QUICK))
    assert len(jobs) == 8
    catalogs = []
    for k, overlap in ((1, True), (4, True), (1, False)):
        catalog = str(grid.root / f"catalog{len(catalogs)}")
        worker = Worker(dataclasses.replace(settings(grid), catalog=catalog, side_by_side=k, overlap=overlap))
        messages = all_of(worker, jobs)
        assert {result.status for result in results(messages).values()} == {"committed"}
        assert {len(message.job_ids) for message in messages if isinstance(message, Began)} == {k}
        catalogs.append(worker.catalog)
    assert catalogs[0].digest() == catalogs.pop().digest()  # what overlaps changes no byte
    for job in jobs:
        entries = [catalog.entry(job.job_id) for catalog in catalogs]
        assert [entry.report["merged_beside"] for entry in entries] == [0, 3]
        if job.method == "ziplora":
            alone, beside = (
                formats.read_mergers(catalog.store.get(entry.objects["mergers.safetensors"].key))
                for catalog, entry in zip(catalogs, entries, strict=True)
            )
            for path, values in alone.subject.items():
                torch.testing.assert_close(beside.subject[path], values, rtol=0, atol=1e-5)


def test_the_merges_seed_decides_what_dare_drops(grid: Grid) -> None:
    jobs = jobs_of(grid.manifest(subjects=1, styles=1, merge={"method": "dare", "seeds": [0, 1]}, **QUICK))
    assert [job.seed for job in jobs] == [0, 1]
    found = []
    for name, k in (("alone", 1), ("together", 2)):
        worker = Worker(dataclasses.replace(settings(grid), catalog=str(grid.root / name), side_by_side=k))
        all_of(worker, jobs)
        entries = [worker.catalog.entry(job.job_id) for job in jobs]
        assert [entry.report["merged_beside"] for entry in entries] == [k - 1] * 2
        found.append(
            [formats.read_lora(worker.catalog.store.get(e.objects["merged.safetensors"].key)).lora for e in entries]
        )
    (one, other), again = found
    assert [digest(lora) for lora in again] == [digest(one), digest(other)]
    assert not any(torch.equal(delta(one.layers[path]), delta(other.layers[path])) for path in one.layers)


def test_the_one_that_fails_is_found_among_its_neighbours(grid: Grid) -> None:
    jobs = list(jobs_of(grid.manifest(**QUICK)))
    jobs[1] = dataclasses.replace(jobs[1], subject=dataclasses.replace(jobs[1].subject, weight=1e30))
    worker = Worker(dataclasses.replace(settings(grid), side_by_side=4))
    found = results(all_of(worker, tuple(jobs)))
    assert [found[job.job_id].status for job in jobs] == ["committed", "failed", "committed", "committed"]
    assert found[jobs[1].job_id].kind == "BadInput"


def test_a_lora_that_no_partner_can_use_is_named(grid: Grid) -> None:
    path = grid.root / "dog.safetensors"
    tensors = load_file(path)
    tensors[next(name for name, tensor in tensors.items() if tensor.ndim == 2)][0, 0] = float("nan")
    save_file(tensors, path)
    jobs = {job.pair: job for job in jobs_of(grid.manifest(**QUICK))}
    found = results(all_of(Worker(settings(grid)), tuple(jobs.values())))
    for pair, job in jobs.items():
        result = found[job.job_id]
        if pair.startswith("dog"):
            assert (result.kind, result.broken_lora) == ("BadInput", job.subject.lora_sha256)
        else:
            assert (result.status, result.broken_lora) == ("committed", None)


def test_too_little_memory_is_the_jobs_failure_and_the_next_one_is_done(grid: Grid) -> None:
    batch = 20_000_000  # the draws of which take 60 GB
    too_large = jobs_of(grid.manifest(merge={"method": "ziplora", "steps": 3, "batch": batch}, **QUICK))
    jobs = jobs_of(grid.manifest(merge={"method": "direct"}, **QUICK))
    worker = Worker(settings(grid))
    found = results(all_of(worker, (too_large[0], jobs[0])))
    assert found[too_large[0].job_id].kind == "OutOfMemory", found[too_large[0].job_id]
    assert found[jobs[0].job_id].status == "committed"


def test_calibrations_are_kept_on_the_nodes_disk(grid: Grid) -> None:
    jobs = jobs_of(grid.manifest(subjects=1, styles=1, **QUICK))
    digests, misses = [], []
    for name in ("first", "second"):
        worker = Worker(dataclasses.replace(settings(grid), catalog=str(grid.root / name)))
        done = [message for message in all_of(worker, jobs) if isinstance(message, TileDone)]
        misses.append(sum(one.misses["calibration_file"] for one in done))
        digests.append(worker.catalog.digest())
        cut = min((grid.root / "cache/calibrations/values").iterdir())
        cut.write_bytes(cut.read_bytes()[:100])  # as after a power cut
    assert misses == [2, 1]
    assert digests[0] == digests[1]
