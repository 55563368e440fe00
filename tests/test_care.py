"""Verify, garbage and taking back: on a directory and a real S3 server, and while a batch commits."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import boto3
import pytest

from service.care import VerifyRecord
from service.catalog import Catalog
from service.entry import Entry
from service.errors import AlreadyCommitted, StorageError, Unavailable
from service.storage import LocalStore
from service.trained import TrainedLoRAs
from tests.catalogs import SUBJECT_LORA, UNUSED_LORA, files_of, fill, id_of, identity, trained
from tests.conftest import Swift

A_DAY = timedelta(days=1)


def flip_a_bit(catalog: Catalog, key: str) -> None:
    body = bytearray(catalog.store.get(key))
    body[len(body) // 2] ^= 1
    catalog.store.put(key, bytes(body))


def keys(catalog: Catalog) -> set[str]:
    return {found.key for found in catalog.store.list("pairs/")}


def named_keys(catalog: Catalog) -> set[str]:
    return {item.key for entry in catalog.entries() for item in entry.objects.values()}


class TestVerify:
    def test_a_flipped_bit_and_a_missing_object_are_found(self, catalog: Catalog) -> None:
        dog, cat = fill(catalog, identity("dog"), identity("cat"))
        flipped, missing = dog.objects["merged.safetensors"].key, cat.objects["samples/001.png"].key
        flip_a_bit(catalog, flipped)
        catalog.store.delete(missing)
        steps = catalog.verify()
        problems = {check.key: check.problem for check in steps if check.problem}
        assert len(steps) == 12
        assert set(problems) == {flipped, missing}
        assert "sha256" in (problems[flipped] or "")
        assert problems[missing] == "it is missing"
        assert len(catalog.verify(subject="dog")) == 6

    def test_one_flipped_bit_among_a_thousand_objects(self, local: Catalog) -> None:
        job = identity()
        entry = local.commit(id_of(job), job, {f"samples/{i}.bin": os.urandom(64) for i in range(1000)}, {})
        key = entry.objects["samples/617.bin"].key
        flip_a_bit(local, key)
        assert [check.key for check in local.verify() if check.problem] == [key]

    def test_a_flipped_bit_of_a_trained_lora_is_found(self, catalog: Catalog) -> None:
        fill(catalog, identity("dog"))
        used, unused = trained(catalog), trained(catalog, UNUSED_LORA, "ink", "style")
        assert {check.key for check in catalog.verify()} > {used.key, unused.key}
        assert not [check for check in catalog.verify() if check.problem]
        flip_a_bit(catalog, unused.key)
        (bad,) = (check for check in catalog.verify() if check.problem)
        assert (bad.key, bad.job_id) == (unused.key, UNUSED_LORA)
        assert "sha256" in str(bad.problem)
        assert {check.key for check in catalog.verify(subject="d*") if check.key.startswith("loras/")} == {used.key}
        assert not catalog.verify(subject="cat")
        catalog.store.put(f"loras/{UNUSED_LORA}.json", b"{damaged")
        catalog.store.delete(used.key)
        assert {check.key: check.problem and check.problem[:10] for check in catalog.verify() if check.problem} == {
            f"loras/{UNUSED_LORA}.json": "the record", used.key: "it is miss"
        }  # fmt: skip

    def test_what_was_sound_is_not_read_again(self, local: Catalog, tmp_path: Path) -> None:
        dog, cat = fill(local, identity("dog"), identity("cat"))
        bad, path = dog.objects["merged.png"].key, tmp_path / "record"
        flip_a_bit(local, bad)
        record = VerifyRecord(path, local.store.url)
        for number, check in enumerate(local.verify()):
            record.add(check)
            if number == 7:
                break  # as a kill does, which may also cut a line
        record.close()
        path.write_text(path.read_text()[:-20])
        record = VerifyRecord(path, local.store.url)
        assert 6 <= len(record.sound) <= 7
        steps = local.verify(known=record.sound)
        assert len(steps) == 12 - len(record.sound)
        for check in steps:
            record.add(check)
        record.close()
        record = VerifyRecord(path, local.store.url)
        assert record.sound.keys() == named_keys(local) - {bad}
        assert [check.key for check in local.verify(known=record.sound)] == [bad]
        with pytest.raises(StorageError, match="is no record of verifying elsewhere"):
            VerifyRecord(path, "elsewhere")
        # other content under a key that was sound is not known
        assert len(local.verify(known={**record.sound, cat.objects["merged.png"].key: "0" * 64})) == 2


def abandon(catalog: Catalog, job: dict, attempt: str) -> set[str]:
    """What a worker that was killed leaves."""
    return {item.key for item in catalog._upload(id_of(job), attempt, files_of(job)).values()}


class TestGarbage:
    def test_only_what_no_entry_names_goes_and_only_when_it_is_old(self, catalog: Catalog) -> None:
        (dog,) = fill(catalog, identity("dog"))
        lost = abandon(catalog, identity("dog"), "lost") | abandon(catalog, identity("cat"), "killed")
        catalog.store.put("pairs/readme.txt", b"of another kind")
        catalog.store.put("elsewhere/x", b"")
        assert catalog.garbage() == []
        later = datetime.now(UTC) + A_DAY + timedelta(minutes=1)
        found = catalog.garbage(now=later)
        assert {item.key for garbage in found for item in garbage.objects} == lost
        assert {(garbage.reason, len(garbage.objects)) for garbage in found} == {("no entry names it", 6)}
        assert keys(catalog) == lost | {item.key for item in dog.objects.values()} | {"pairs/readme.txt"}
        assert [gone for _, gone in catalog.collect(found)] == [True, True]
        assert keys(catalog) == {item.key for item in dog.objects.values()} | {"pairs/readme.txt"}
        assert [check.problem for check in catalog.verify()] == [None] * 6
        assert catalog.store.get("elsewhere/x") == b""
        assert catalog.garbage(now=later) == []

    def test_an_attempt_with_one_young_object_is_at_work(self, local: Catalog, tmp_path: Path) -> None:
        old = abandon(local, identity(), "working")
        for key in sorted(old)[1:]:
            os.utime(tmp_path / "catalog" / key, (0, 0))
        assert local.garbage() == []

    def test_what_is_committed_between_search_and_removal_stays(self, local: Catalog) -> None:
        job = identity()
        item = local._upload(id_of(job), "slow", files_of(job))
        found = local.garbage(now=datetime.now(UTC) + 2 * A_DAY)
        assert len(found) == 1
        local.publish(Entry(id_of(job), job, item, {}, "slow", datetime.now(UTC)), datetime.now(UTC))
        assert [gone for _, gone in local.collect(found)] == [False]
        assert [check.problem for check in local.verify()] == [None] * 6

    def test_a_lora_that_is_named_and_a_training_that_goes_on_stay(self, catalog: Catalog) -> None:
        loras = TrainedLoRAs(catalog.store)
        standing = trained(catalog)
        late, lost = (f"loras/{id}/killed/lora.safetensors" for id in (UNUSED_LORA, SUBJECT_LORA))
        for key in (late, lost):
            catalog.store.put(key, b"as long as")
        for job_id in ("4" * 64, "5" * 64):
            loras.put_checkpoint(job_id, b"half")
        time.sleep(1.1)  # S3 tells whole seconds
        found = catalog.garbage(now=datetime.now(UTC) + 2 * A_DAY)
        assert len(found) == 4
        loras.publish(replace(standing, training_id=UNUSED_LORA, key=late))  # somebody slow
        loras.put_checkpoint("5" * 64, b"more")
        assert {item.name: gone for item, gone in catalog.collect(found)} == {
            late.rpartition("/")[0]: False,
            lost.rpartition("/")[0]: True,
            f"checkpoints/{'4' * 64}.pt": True,
            f"checkpoints/{'5' * 64}.pt": False,
        }
        assert {lora.key for lora in loras.all(print)} == {late, standing.key}
        assert catalog.store.get(standing.key)
        assert catalog.store.get(late)
        assert loras.checkpoint("5" * 64) == b"more"
        assert loras.checkpoint("4" * 64) is None

    def test_nothing_of_a_job_whose_entry_cannot_be_read_is_touched(self, local: Catalog) -> None:
        job = identity()
        fill(local, job)
        abandon(local, job, "lost")
        local.store.put(f"entries/{id_of(job)}.json", b"{damaged")
        assert local.garbage(now=datetime.now(UTC) + 2 * A_DAY) == []

    def test_unfinished_uploads_are_found_and_ended(self, swift: Swift) -> None:
        client = boto3.client("s3")
        catalog = Catalog(f"{swift.url}/prefix")
        for key in ("prefix/pairs/x/a/merged.safetensors", "other/y"):
            upload = client.create_multipart_upload(Bucket=swift.bucket, Key=key)
            client.upload_part(
                Bucket=swift.bucket, Key=key, PartNumber=1, UploadId=upload["UploadId"], Body=b"x" * (5 << 20)
            )
        assert catalog.garbage() == []
        (found,) = catalog.garbage(now=datetime.now(UTC) + 2 * A_DAY)
        assert (found.name, found.size) == ("pairs/x/a/merged.safetensors", 0)
        assert [gone for _, gone in catalog.collect([found, found])] == [True, True]  # ended meanwhile: nothing happens
        left = client.list_multipart_uploads(Bucket=swift.bucket)["Uploads"]
        assert [upload["Key"] for upload in left] == ["other/y"]

    def test_unfinished_files_of_a_directory_too(self, local: Catalog, tmp_path: Path) -> None:
        fill(local, identity())
        part = tmp_path / "catalog/.tmp/0123"
        part.write_bytes(b"half")
        (found,) = local.garbage(now=datetime.now(UTC) + 2 * A_DAY)
        assert [gone for _, gone in local.collect([found])] == [True]
        assert not part.exists()

    def test_an_age_at_which_a_commit_may_be_under_way_is_refused(self, local: Catalog) -> None:
        with pytest.raises(ValueError, match="garbage is at least 7200 s old, not 60"):
            local.garbage(older_than_s=60)

    def test_who_takes_too_long_does_not_commit(self, local: Catalog) -> None:
        """What makes the age safe: no entry is written for objects that may be taken for garbage."""
        job = identity()
        item = local._upload(id_of(job), "slow", files_of(job))
        entry = Entry(id_of(job), job, item, {}, "slow", datetime.now(UTC))
        with pytest.raises(Unavailable, match="at most 3600 s are allowed: try again"):
            local.publish(entry, datetime.now(UTC) - timedelta(seconds=3601))
        assert local.committed() == set()
        assert keys(local) == set()

    def test_under_a_batch_nothing_is_lost(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Six writers commit twenty jobs, most in several attempts at once, through a store that stalls in some first
        attempts until they are old enough to be garbage; garbage of the youngest age allowed is collected all along."""
        monkeypatch.setattr("service.catalog.COMMIT_S", 1.5)
        jobs = [identity(f"s{number}") for number in range(20)]
        to_stall = {id_of(job) for job in jobs[:6]}

        class Stalls(LocalStore):
            def put(self, key: str, body: bytes | Path, **options: object) -> None:
                if key.endswith("000.png") and key.split("/")[1] in to_stall:
                    to_stall.discard(key.split("/")[1])
                    time.sleep(3.6)
                super().put(key, body, **options)  # type: ignore[arg-type]

        catalog = Catalog(Stalls(tmp_path / "catalog"))
        abandoned = set().union(*(abandon(Catalog(tmp_path / "catalog"), job, "killed") for job in jobs[:10]))
        for key in abandoned:
            os.utime(tmp_path / "catalog" / key, (0, 0))
        late, removed, done = [], [], threading.Event()

        def work(job: dict) -> None:
            while id_of(job) not in catalog.committed():
                try:
                    fill(catalog, job)
                except Unavailable as error:
                    late.append(error)
                except AlreadyCommitted:
                    return

        def sweep() -> None:
            while not done.is_set():
                found = catalog.garbage(older_than_s=3.0)
                removed.extend(item for item, gone in catalog.collect(found) if gone)
                time.sleep(0.05)

        sweeper = threading.Thread(target=sweep)
        sweeper.start()
        try:
            with ThreadPoolExecutor(6) as pool:
                list(pool.map(work, [*jobs, *jobs[6:], *jobs[6:]]))
        finally:
            done.set()
            sweeper.join()
        assert catalog.committed() == {id_of(job) for job in jobs}
        assert [check.problem for check in catalog.verify()] == [None] * 120
        assert len(late) == 6, "the stalled attempts did not come too late, so this has shown little"
        collected = {item.key for garbage in removed for item in garbage.objects}
        assert collected > abandoned, "no attempt at work was taken for garbage, so this has shown little"


class TestTakingBack:
    def test_an_entry_goes_with_its_objects_and_can_be_made_again(self, catalog: Catalog) -> None:
        dog, cat = fill(catalog, identity("dog"), identity("cat"))
        assert [entry.job_id for entry in catalog.remove([dog])] == [dog.job_id]
        assert catalog.committed() == {cat.job_id}
        assert keys(catalog) == {item.key for item in cat.objects.values()}
        assert [entry.job_id for entry in catalog.remove([dog])] == [dog.job_id]  # again: nothing happens
        fill(catalog, identity("dog"))
        assert [check.problem for check in catalog.verify()] == [None] * 12

    def test_a_kill_in_between_leaves_garbage_and_no_half_entry(self, local: Catalog) -> None:
        (dog,) = fill(local, identity("dog"))
        local.store.delete(f"entries/{dog.job_id}.json")
        assert list(local.entries()) == []
        assert len(local.garbage(now=datetime.now(UTC) + 2 * A_DAY)) == 1
