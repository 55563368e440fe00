"""The commit protocol, on a directory and a real S3 server; and catalogs made to harm."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.catalog import Catalog
from service.entry import Entry, Unreadable, read_entry, write_entry
from service.errors import AlreadyCommitted, Corrupted, NotFound
from service.s3 import S3Store
from service.storage import LocalStore
from tests.catalogs import files_of, fill, id_of, identity
from tests.conftest import Swift


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
