"""The commit protocol, the index, verify and pull, on a directory and a real S3 server; and catalogs made to harm."""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.catalog import Catalog
from service.entry import Entry, Unreadable, read_entry, write_entry
from service.errors import AlreadyCommitted, Corrupted, NotFound, Unavailable
from service.pull import Pulled, stems
from service.s3 import S3Store
from service.storage import LocalStore, Store
from tests.conftest import Swift


def identity(
    subject: str = "dog", style: str = "watercolour", method: str = "ziplora", seed: int = 0
) -> dict[str, Any]:
    return {
        "algorithm": 1,
        "base": {"digest": "b" * 64, "architecture": "sdxl"},
        "subject": {
            "id": subject,
            "lora": "1" * 64,
            "prompt": "a sks dog",
            "trigger": "sks dog",
            "images": [],
            "weight": 1,
        },
        "style": {"id": style, "lora": "2" * 64, "prompt": "szn style", "trigger": "szn", "images": [], "weight": 0.5},
        "method": method,
        "knobs": {"steps": 100, "lr": 0.01},
        "seed": seed,
        "samples": {"prompts": [{"name": "both", "template": "{subject} in {style}"}], "seeds": [0]},
        "outputs": [],
    }


def id_of(job: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()


def files_of(job: dict[str, Any]) -> dict[str, bytes | Path]:
    """What a worker leaves, its content given by the job."""
    name = id_of(job).encode()
    return {
        "merged.safetensors": name * 50,
        "merged.json": b'{"activation text": "sks dog"}',
        "merged.png": b"png of " + name,
        "mergers.safetensors": b"mergers of " + name,
        "samples/000.png": b"sample 0 of " + name,
        "samples/001.png": b"sample 1 of " + name,
    }


def fill(catalog: Catalog, *jobs: dict[str, Any]) -> list[Entry]:
    return [catalog.commit(id_of(job), job, files_of(job), {"seconds": 1.5}) for job in jobs]


@pytest.fixture
def catalog(store: Store) -> Catalog:
    return Catalog(store)


@pytest.fixture
def local(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "catalog")


class TestCommit:
    def test_an_entry_names_what_was_stored(self, catalog: Catalog, tmp_path: Path) -> None:
        job = identity()
        (tmp_path / "lora").write_bytes(b"from a file")
        files = {**files_of(job), "merged.safetensors": tmp_path / "lora"}
        entry = catalog.commit(id_of(job), job, files, {"loss": float("nan"), "seconds": [1.5, float("inf")]})
        read = catalog.entry(id_of(job))
        assert read == replace(entry, report={"loss": None, "seconds": [1.5, None]})
        assert (read.subject, read.style, read.method) == ("dog", "watercolour", "ziplora")
        assert catalog.store.get(read.objects["merged.safetensors"].key) == b"from a file"
        assert read.objects["merged.safetensors"].sha256 == hashlib.sha256(b"from a file").hexdigest()
        assert read.objects["merged.png"].content_type == "image/png"
        assert read.objects["merged.json"].content_type == "application/json"
        assert catalog.committed() == {id_of(job)}
        assert [check.problem for check in catalog.verify()] == [None] * 6

    def test_what_is_not_committed_does_not_exist(self, catalog: Catalog) -> None:
        job = identity()
        catalog._upload(id_of(job), "killed-attempt", files_of(job))  # and then the process is killed
        assert catalog.committed() == set()
        assert list(catalog.entries()) == []
        with pytest.raises(NotFound):
            catalog.entry(id_of(job))
        fill(catalog, job)
        assert catalog.committed() == {id_of(job)}

    def test_a_second_attempt_finds_the_first(self, catalog: Catalog) -> None:
        job = identity()
        (first,) = fill(catalog, job)
        before = [found.key for found in catalog.store.list()]
        with pytest.raises(AlreadyCommitted) as caught:
            catalog.commit(id_of(job), job, {"merged.safetensors": b"other"}, {})
        assert caught.value.entry == first
        assert [found.key for found in catalog.store.list()] == before

    @pytest.mark.parametrize("conditions", [True, False])
    def test_of_racing_attempts_every_reader_sees_one_whole(self, catalog: Catalog, conditions: bool) -> None:
        if isinstance(catalog.store, S3Store):
            catalog.store._creates_only = conditions  # as a probe finds
        job = identity()

        def attempt(i: int) -> Entry | AlreadyCommitted:
            try:
                return catalog.commit(id_of(job), job, {"merged.safetensors": bytes([i]) * 1000}, {"worker": i})
            except AlreadyCommitted as lost:
                return lost

        with ThreadPoolExecutor(6) as pool:
            results = list(pool.map(attempt, range(6)))
        winners = [result for result in results if isinstance(result, Entry)]
        stored = catalog.entry(id_of(job))
        assert stored in winners
        assert len(winners) == 1 or isinstance(catalog.store, S3Store)
        assert {lost.entry.job_id for lost in results if isinstance(lost, AlreadyCommitted)} <= {id_of(job)}
        assert [check.problem for check in catalog.verify()] == [None]
        if isinstance(catalog.store, LocalStore):  # the others have left nothing behind
            (key,) = (found.key for found in catalog.store.list("pairs/"))
            assert key == stored.objects["merged.safetensors"].key

    def test_an_answer_that_is_lost_is_no_failure(self, tmp_path: Path) -> None:
        """The entry is stored, the connection breaks, the request is repeated and answered 412."""

        class LosesAnswers(LocalStore):
            def put(self, key: str, body: bytes | Path, **options: Any) -> None:
                super().put(key, body, **options)
                if key.startswith("entries/"):
                    super().put(key, body, **options)

        catalog = Catalog(LosesAnswers(tmp_path))
        job = identity()
        entry = catalog.commit(id_of(job), job, files_of(job), {})
        assert catalog.entry(id_of(job)) == entry
        assert [check.problem for check in catalog.verify()] == [None] * 6

    def test_a_failed_upload_leaves_nothing(self, catalog: Catalog, tmp_path: Path) -> None:
        job = identity()

        class Removed(dict):  # the worker's file vanishes between its digest and its upload
            def __getitem__(self, name: str) -> Any:
                return tmp_path / "gone" if name == "merged.png" else super().__getitem__(name)

        with pytest.raises(NotFound, match="gone"):
            catalog.commit(id_of(job), job, Removed(files_of(job)), {})
        assert list(catalog.store.list()) == []

    def test_names_that_no_file_system_takes_are_refused(self, local: Catalog) -> None:
        job = identity()
        for name in (
            "../x",
            "/x",
            "a/b/c",
            "a\\b",
            "",
            ".hidden",
            "nul",
            "samples/con.png",
            "x.",
            "ü",
            "a b",
            "x" * 200,
        ):
            with pytest.raises(ValueError, match="object name"):
                local.commit(id_of(job), job, {name: b""}, {})
        with pytest.raises(ValueError, match="no job id"):
            local.commit("../../etc", job, {}, {})
        with pytest.raises(TypeError):
            local.commit(id_of(job), job, {"merged.png": b""}, {"what": object()})
        assert list(local.store.list()) == []

    def test_equal_content_has_equal_digests_wherever_it_lies(self, swift: Swift, tmp_path: Path) -> None:
        jobs = [identity(subject) for subject in ("dog", "cat", "fox")]
        here, there = Catalog(tmp_path / "here"), Catalog(swift.url)
        fill(here, *jobs)
        fill(there, *reversed(jobs))
        assert here.digest() == there.digest()
        fill(there, identity("hen"))
        assert here.digest() != there.digest()


class TestFailures:
    def test_a_job_given_up_is_listed_until_it_is_committed(self, catalog: Catalog) -> None:
        dog, cat = identity("dog"), identity("cat")
        for job in (dog, cat):
            catalog.record_failure(id_of(job), job, "NaN", "BadInput", "Traceback…", 3, {"subject": "/loras/dog"})
        catalog.record_failure(id_of(dog), dog, "again", "WorkerLost", "", 4)
        found = {failure.job["subject"]["id"]: failure for failure in catalog.failures()}
        assert (found["dog"].reason, found["dog"].attempts, found["dog"].kind) == ("again", 4, "WorkerLost")
        assert found["cat"].inputs == {"subject": "/loras/dog"}
        fill(catalog, dog)
        assert [failure.job for failure in catalog.failures()] == [cat]
        catalog.clear_failure(id_of(cat))
        assert list(catalog.failures()) == []

    def test_a_record_that_cannot_be_read_is_reported(self, local: Catalog) -> None:
        local.store.put(f"failures/{'0' * 64}.json", b"{}")
        reported: list[Unreadable] = []
        assert list(local.failures(reported.append)) == []
        assert "version" in reported[0].reason


def damaged(entry: Entry) -> Iterator[tuple[str, bytes]]:
    """What somebody might put in an entry's place, and the part of it that is named."""
    good = json.loads(write_entry(entry))

    def with_object(**fields: Any) -> bytes:
        return json.dumps({**good, "objects": [{**good["objects"][0], **fields}]}).encode()

    yield ".", b""
    yield ".", b"\xff\xfe"
    yield ".", b"[" * 100_000
    yield "fields belong", b"[]"
    yield "too old", json.dumps({**good, "version": 2}).encode()
    yield "another job", json.dumps({**good, "job_id": "0" * 64}).encode()
    yield "'objects' is missing", json.dumps({name: good[name] for name in good if name != "objects"}).encode()
    yield "text belongs", json.dumps({**good, "job": {**good["job"], "method": 7}}).encode()
    yield "larger than", b" " * (5 << 20)
    yield "same name", json.dumps({**good, "objects": [good["objects"][0]] * 2}).encode()
    yield "zone", json.dumps({**good, "created": "2026-01-01T00:00:00"}).encode()
    for name in (
        "../../evil",
        "/etc/passwd",
        "a\\..\\b",
        "C:\\x",
        "C:x",
        "nul.png",
        "a\x00b",
        "a\nb",
        "..",
        ".",
        "x/../../y",
        "~/x",
    ):
        yield "object name", with_object(name=name)
    prefix = f"pairs/{entry.job_id}"
    for key in (
        "../x",
        "/etc/passwd",
        f"{prefix}/../../x",
        f"{prefix}\\x",
        f"{prefix}/\x00",
        f"{prefix}//x",
        "file:///x",
    ):
        yield "key", with_object(key=key)
    yield "outside", with_object(key="index.json")
    yield "outside", with_object(key=f"pairs/{'0' * 64}/a/merged.safetensors")
    for size in (-1, 1.5, True, "9", None, 10**20, 1 << 60):
        yield "whole number", with_object(size=size)
    for sha256 in ("", "0" * 63, "Z" * 64, None, "A" * 64):
        yield ".", with_object(sha256=sha256)
    yield "content type", with_object(content_type="text/html\r\nX-Evil: 1")


class TestDamagedCatalogs:
    def test_nothing_of_a_damaged_entry_is_used(self, local: Catalog, tmp_path: Path) -> None:
        (good, target) = fill(local, identity("good"), identity("target"))
        key = f"entries/{target.job_id}.json"
        dest = tmp_path / "dest"
        for part, body in damaged(target):
            local.store.put(key, body)
            with pytest.raises(Corrupted, match=part):
                local.entry(target.job_id)
            reported: list[Unreadable] = []
            assert list(local.entries(reported.append)) == [good]
            assert [record.key for record in reported] == [key]
            assert local.committed() == {good.job_id, target.job_id}
            states = {pulled.state for pulled in local.pull(dest, extras=["*"])}
            assert states in ({"pulled", "failed"}, {"kept", "failed"})
            assert [check.problem is None for check in local.verify()].count(False) == 1
        assert {path.name for path in tmp_path.iterdir()} == {"catalog", "dest"}
        assert all(path.name.startswith("good__") for path in dest.iterdir())
        with pytest.raises(Corrupted):
            local.digest()
        with pytest.raises(Corrupted):
            fill(local, identity("target"))

    @settings(max_examples=50, deadline=None)
    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: (
                st.lists(inner)
                | st.dictionaries(
                    st.sampled_from(["version", "job", "objects", "job_id", "subject", "id"]) | st.text(), inner
                )
            ),
        )
    )
    def test_any_json_is_an_entry_or_corrupted(self, value: Any) -> None:
        with pytest.raises(Corrupted):
            read_entry(json.dumps(value).encode(), "0" * 64)

    def test_strange_keys_are_no_jobs(self, local: Catalog) -> None:
        (entry,) = fill(local, identity())
        for key in (
            "entries/readme.txt",
            "entries/x.json",
            f"entries/{entry.job_id}.json.bak",
            f"entries/a/{'0' * 64}.json",
        ):
            local.store.put(key, b"{}")
        assert local.committed() == {entry.job_id}
        assert list(local.entries()) == [entry]

    def test_a_flipped_bit_and_a_missing_object_are_found(self, catalog: Catalog) -> None:
        dog, cat = fill(catalog, identity("dog"), identity("cat"))
        flipped, missing = dog.objects["merged.safetensors"].key, cat.objects["samples/001.png"].key
        body = bytearray(catalog.store.get(flipped))
        body[777] ^= 1
        catalog.store.put(flipped, bytes(body))
        catalog.store.delete(missing)
        steps = catalog.verify()
        problems = {check.key: check.problem for check in steps if check.problem}
        assert len(steps) == 12
        assert set(problems) == {flipped, missing}
        assert "sha256" in (problems[flipped] or "")
        assert problems[missing] == "it is missing"
        assert len(catalog.verify(subject="dog")) == 6


def states(pulled: Iterator[Pulled] | Any) -> dict[str, str]:
    return {f"{item.path.name}": item.state for item in pulled}


class TestPull:
    def test_merged_files_come_with_their_sidecars(self, catalog: Catalog, tmp_path: Path) -> None:
        fill(catalog, *(identity(subject, style) for subject in ("dog", "cat") for style in ("oil", "ink")))
        steps = catalog.pull(tmp_path / "out", subject="d*", style="o?l")
        assert len(steps) == 3
        job = identity("dog", "oil")
        stem = f"dog__oil__ziplora-{id_of(job)[:8]}"
        assert states(steps) == {f"{stem}{suffix}": "pulled" for suffix in (".safetensors", ".json", ".png")}
        for suffix in (".safetensors", ".json", ".png"):
            assert (tmp_path / "out" / f"{stem}{suffix}").read_bytes() == files_of(job)[f"merged{suffix}"]
        assert set(states(catalog.pull(tmp_path / "out", subject="d*", style="oil")).values()) == {"kept"}
        assert len(catalog.pull(tmp_path / "out", subject="D*")) == 0
        assert len(catalog.pull(tmp_path / "out", method="direct")) == 0

    def test_extras_lie_in_a_directory_beside(self, local: Catalog, tmp_path: Path) -> None:
        fill(local, identity())
        list(local.pull(tmp_path / "out", extras=["samples/*", "mergers.safetensors"]))
        (directory,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
        assert sorted(str(path.relative_to(directory)) for path in directory.rglob("*.*")) == [
            "mergers.safetensors",
            "samples/000.png",
            "samples/001.png",
        ]

    def test_a_cut_is_resumed(self, tmp_path: Path) -> None:
        read = []

        class Cut(LocalStore):
            def stream(self, key: str, start: int = 0) -> Iterator[bytes]:
                read.append((key.rpartition("/")[2], start))
                yield super().get_range(key, start, start + 1000)
                raise Unavailable("the store went away")

        job = identity()
        Catalog(tmp_path / "catalog").commit(id_of(job), job, {"merged.safetensors": os.urandom(2500)}, {})
        catalog, out = Catalog(Cut(tmp_path / "catalog")), tmp_path / "out"
        for _ in range(2):
            (pulled,) = catalog.pull(out)
            assert (pulled.state, pulled.problem) == ("failed", "the store went away")
            assert not pulled.path.exists()
        (pulled,) = Catalog(tmp_path / "catalog").pull(out)
        assert pulled.state == "resumed"
        assert read == [("merged.safetensors", 0), ("merged.safetensors", 1000)]
        assert pulled.path.stat().st_size == 2500
        assert [path.suffix for path in out.iterdir()] == [".safetensors"]

    def test_a_part_of_something_else_is_dropped(self, catalog: Catalog, tmp_path: Path) -> None:
        fill(catalog, identity())
        (pulled, *_) = sorted(catalog.pull(tmp_path), key=lambda item: item.name, reverse=True)
        right = pulled.path.read_bytes()
        part = pulled.path.with_name(f"{pulled.path.name}.part")
        for wrong, state in (
            (b"x" * 100, "pulled"),
            (b"x" * (len(right) + 9), "pulled"),
            (right, "resumed"),
            (right[:99], "resumed"),
        ):
            pulled.path.unlink()
            part.write_bytes(wrong)
            assert states(catalog.pull(tmp_path))[pulled.path.name] == state
            assert pulled.path.read_bytes() == right
            assert not part.exists()

    def test_a_file_that_was_changed_is_fetched_again(self, local: Catalog, tmp_path: Path) -> None:
        fill(local, identity())
        (tmp_path / "out").mkdir()
        for item in local.pull(tmp_path / "out"):
            item.path.write_bytes(item.path.read_bytes()[:-1] + b"?")
        assert set(states(local.pull(tmp_path / "out")).values()) == {"pulled"}

    def test_a_corrupted_object_is_refused_by_name(self, catalog: Catalog, tmp_path: Path) -> None:
        (entry,) = fill(catalog, identity())
        item = entry.objects["merged.safetensors"]
        body = catalog.store.get(item.key)
        for wrong in (body[:-1] + b"?", body[:-1], body + b"?", b""):
            catalog.store.put(item.key, wrong)
            by_name = {pulled.name: pulled for pulled in catalog.pull(tmp_path / "out")}
            failed = by_name.pop("merged.safetensors")
            assert failed.state == "failed"
            assert "merged.safetensors is not what its entry says" in (failed.problem or "")
            assert {pulled.state for pulled in by_name.values()} <= {"pulled", "kept"}
            assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".png"}

    def test_a_claim_of_more_than_fits_writes_nothing(self, local: Catalog, tmp_path: Path) -> None:
        (entry,) = fill(local, identity())
        objects = {
            n: replace(o, size=o.size if n != "merged.safetensors" else 1 << 40) for n, o in entry.objects.items()
        }
        local.store.put(f"entries/{entry.job_id}.json", write_entry(replace(entry, objects=objects)))
        failed = [item for item in local.pull(tmp_path / "out") if item.state == "failed"]
        assert [item.name for item in failed] == ["merged.safetensors"]
        assert "are free" in (failed[0].problem or "")
        assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) < 1000

    def test_links_in_the_destination_are_not_followed(self, local: Catalog, tmp_path: Path) -> None:
        fill(local, identity())
        (tmp_path / "secret").write_bytes(b"secret")
        (path,) = (item.path for item in local.pull(tmp_path / "out") if item.name == "merged.png")
        path.unlink()
        path.with_name(f"{path.name}.part").symlink_to(tmp_path / "secret")
        assert states(local.pull(tmp_path / "out"))[path.name] == "failed"
        path.with_name(f"{path.name}.part").unlink()
        path.symlink_to(tmp_path / "secret")
        assert states(local.pull(tmp_path / "out"))[path.name] == "pulled"
        assert (tmp_path / "secret").read_bytes() == b"secret"
        assert not path.is_symlink()

    def test_who_stops_early_can_go_on(self, local: Catalog, tmp_path: Path) -> None:
        fill(local, *(identity(f"s{i}") for i in range(30)))
        steps = iter(local.pull(tmp_path / "out"))
        next(steps)
        steps.close()  # type: ignore[attr-defined]
        assert 0 < len([path for path in (tmp_path / "out").iterdir() if path.suffix != ".part"]) < 90
        assert {item.state for item in local.pull(tmp_path / "out")} <= {"kept", "resumed", "pulled"}
        assert len(list((tmp_path / "out").iterdir())) == 90

    def test_killed_again_and_again_it_ends_complete(self, swift: Swift, tmp_path: Path) -> None:
        catalog, out = Catalog(swift.url), tmp_path / "out"
        jobs = [identity(f"s{i}") for i in range(4)]
        for job in jobs:
            catalog.commit(id_of(job), job, {"merged.safetensors": os.urandom(8 << 20)}, {})
        script = f"""
            import pathlib
            from service.catalog import Catalog
            for item in Catalog({swift.url!r}).pull(pathlib.Path({str(out)!r})):
                print(item.state, item.problem, flush=True)
        """
        command = [sys.executable, "-c", textwrap.dedent(script)]
        for n_bytes in (1 << 20, 12 << 20, 20 << 20):
            process = subprocess.Popen(command)
            while process.poll() is None and sum(path.stat().st_size for path in listed(out)) < n_bytes:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert {item.state for item in catalog.pull(out)} <= {"kept", "resumed", "pulled"}
        assert {item.state for item in catalog.pull(out)} == {"kept"}
        assert [path.suffix for path in listed(out)] == [".safetensors"] * 4


def listed(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.exists() else []


def named(subject: str, style: str = "ink", job_id: str = "a" * 64) -> Entry:
    job = identity(subject, style)
    return Entry(job_id, job, {}, {}, "attempt", datetime.now(UTC))


def test_file_names_are_readable_and_safe() -> None:
    assert stems([named("dog", "water colour (v1.5)")]) == ["dog__water_colour__v1_5___ziplora-aaaaaaaa"]
    assert stems([named("Hündchen-犬")]) == ["Hündchen-犬__ink__ziplora-aaaaaaaa"]
    for evil in (
        "../../etc",
        "/root",
        "C:\\x",
        "con",
        "nul.txt",
        "a\x00b\n",
        "",
        ".",
        "~",
        "$(rm)",
        "-rf",
        "x" * 500,
        "\u202e",
        "é" * 90,
    ):
        (stem,) = stems([named(evil, evil)])
        assert re.fullmatch(r"[\w-]+__[\w-]+__ziplora-a{8}", stem)
        assert len(stem.encode()) < 200
        assert not stem.startswith("-")


def test_file_names_differ_for_different_jobs() -> None:
    entries = [named("dog", job_id="a" * 63 + c) for c in "01"] + [named("Dog", job_id="a" * 63 + "2"), named("cat")]
    found = stems(entries)
    assert len({stem.casefold() for stem in found}) == 4
    assert found[0] == f"dog__ink__ziplora-{'a' * 63}0"
    assert found[3] == "cat__ink__ziplora-aaaaaaaa"


class TestIndex:
    def test_one_row_per_entry(self, catalog: Catalog) -> None:
        entries = fill(catalog, identity("dog", seed=2), identity("cat"), identity("dog", seed=10))
        failed = identity("fox")
        catalog.record_failure(id_of(failed), failed, "NaN in to_q", "BadInput", "", 1)
        catalog.store.put(f"entries/{'0' * 64}.json", b"{")
        summary = catalog.build_index()
        assert (summary.entries, summary.failures, len(summary.unreadable)) == (3, 1, 1)
        rows = pq.read_table(io.BytesIO(catalog.store.get("index.parquet"))).to_pylist()
        assert [(row["subject"], row["seed"]) for row in rows] == [("cat", 0), ("dog", 2), ("dog", 10)]
        (row,) = (row for row in rows if row["job_id"] == entries[0].job_id)
        assert json.loads(row["job"]) == identity("dog", seed=2)
        assert json.loads(row["knobs"]) == {"steps": 100, "lr": 0.01}
        assert (row["architecture"], row["base_sha256"], row["style_sha256"]) == ("sdxl", "b" * 64, "2" * 64)
        assert (row["subject_weight"], row["style_weight"]) == (1.0, 0.5)
        assert row["sample_prompts"] == ["{subject} in {style}"]
        assert row["lora_key"] == entries[0].objects["merged.safetensors"].key
        assert row["n_bytes"] == entries[0].n_bytes
        assert row["created"] == entries[0].created
        assert [item["name"] for item in row["objects"]] == sorted(entries[0].objects)
        assert len(row["sample_keys"]) == 2
        page = json.loads(catalog.store.get("index.json"))
        assert [entry["subject"] for entry in page["entries"]] == ["cat", "dog", "dog"]
        assert page["failures"][0] == {
            "job_id": id_of(failed),
            "subject": "fox",
            "style": "watercolour",
            "method": "ziplora",
            "kind": "BadInput",
            "reason": "NaN in to_q",
        }
        assert page["unreadable"][0]["key"] == f"entries/{'0' * 64}.json"

    def test_equal_entries_give_equal_bytes(self, local: Catalog, tmp_path: Path) -> None:
        fill(local, *(identity(subject) for subject in "bca"))
        local.build_index()
        index = [local.store.get(name) for name in ("index.parquet", "index.json")]
        shutil.copytree(tmp_path / "catalog", tmp_path / "copy")
        Catalog(tmp_path / "copy").build_index()
        assert [LocalStore(tmp_path / "copy").get(name) for name in ("index.parquet", "index.json")] == index

    def test_an_empty_catalog_has_an_index(self, local: Catalog) -> None:
        local.build_index()
        assert pq.read_table(io.BytesIO(local.store.get("index.parquet"))).num_rows == 0

    def test_jobs_that_say_less_have_nulls(self, local: Catalog) -> None:
        job = {
            "subject": {"id": "a", "weight": "heavy"},
            "style": {"id": "b"},
            "method": "m",
            "samples": {"prompts": [1]},
        }
        local.commit(id_of(job), job, {"x.bin": b""}, {})
        local.build_index()
        (row,) = pq.read_table(io.BytesIO(local.store.get("index.parquet"))).to_pylist()
        assert (row["seed"], row["lora_key"], row["subject_weight"], row["sample_prompts"]) == (None, None, None, [])
