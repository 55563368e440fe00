"""Inputs by range and digest, and the node's cache of them under several processes."""

import hashlib
import multiprocessing
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from service.errors import Corrupted, NotFound, StorageError
from service.inputs import DigestCache, LocalCache, digests, open_input
from service.storage import open_store
from tests.conftest import Swift


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where this test's inputs lie: a directory or a bucket."""
    return str(tmp_path / "in") if request.param == "local" else request.getfixturevalue("swift").url


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def test_an_input_is_read_by_range_as_a_whole_and_by_digest(place: str, tmp_path: Path) -> None:
    body = os.urandom(700_000)  # longer than what is read ahead
    open_store(place).put("dog (v1).safetensors", body)
    dog = open_input(f"{place}/dog (v1).safetensors")
    assert dog.size == len(body)
    for start, stop in [(0, 8), (8, 5000), (600_000, 600_100), (524_280, 524_300), (699_990, 800_000)]:
        assert dog.read(start, stop) == body[start:stop]
    dog.download(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == body
    assert dog.sha256() == open_input(f"{place}/dog (v1).safetensors").sha256() == sha256(body)


def test_a_digest_is_remembered_until_the_file_changes(place: str, tmp_path: Path) -> None:
    open_store(place).put("a", b"first")
    if place.startswith("/"):
        os.utime(f"{place}/a", (1e9, 1e9))  # long settled
    cache = DigestCache(tmp_path / "digests")
    assert open_input(f"{place}/a", cache).sha256() == sha256(b"first")
    assert cache.get(open_input(f"{place}/a")) == sha256(b"first")
    open_store(place).put("a", b"other")
    assert open_input(f"{place}/a", cache).sha256() == sha256(b"other")


def test_half_written_digests_of_killed_processes_go_with_the_next_one(tmp_path: Path) -> None:
    cache = DigestCache(tmp_path / "digests")
    file = tmp_path / "a.bin"
    file.write_bytes(b"a")
    os.utime(file, (1, 1))
    opened = open_input(file, cache)
    digest = opened.sha256()
    (kept,) = (path for path in cache.directory.rglob("*") if path.is_file())
    old, young = (kept.with_name(f".{name}.part") for name in ("old", "young"))
    for part in (old, young):
        part.touch()
    os.utime(old, (1, 1))
    cache.put(opened, digest)
    assert sorted(kept.parent.iterdir()) == sorted([kept, young])


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    cache = DigestCache(tmp_path / "digests")
    open_input(tmp_path / "a", cache).sha256()
    assert cache.get(open_input(tmp_path / "a")) is None


def test_what_is_no_file_is_named(place: str, tmp_path: Path) -> None:
    open_store(place).put("directory/x", b"")
    for location in (f"{place}/nope.safetensors", f"{place}/directory"):
        with pytest.raises(NotFound, match=location.rpartition("/")[2]):
            open_input(location)


def test_digests_of_many_with_their_errors(place: str) -> None:
    store = open_store(place)
    for i in range(10):
        store.put(f"{i}", b"%d" % i)
    steps = digests([f"{place}/{i}" for i in range(11)])
    found = list(steps)
    assert len(steps) == 11
    assert [digest for _, digest in found[:10]] == [sha256(b"%d" % i) for i in range(10)]
    assert found[10][0] == f"{place}/10"
    assert isinstance(found[10][1], NotFound)


class TestLocalCache:
    def test_it_fetches_once_and_checks(self, swift: Swift, tmp_path: Path) -> None:
        store = open_store(swift.url)
        store.put("dog.safetensors", b"lora")
        cache = LocalCache(tmp_path / "node", 1000)
        path = cache.fetch(f"{swift.url}/dog.safetensors", sha256(b"lora"))
        assert (path.read_bytes(), path.suffix) == (b"lora", ".safetensors")
        store.delete("dog.safetensors")
        assert cache.fetch(f"{swift.url}/dog.safetensors", sha256(b"lora")) == path
        with pytest.raises(NotFound):
            cache.fetch(f"{swift.url}/dog.safetensors", sha256(b"other"))

    def test_other_content_than_planned_is_refused(self, place: str, tmp_path: Path) -> None:
        open_store(place).put("dog", b"changed")
        cache = LocalCache(tmp_path / "node", 1000)
        with pytest.raises(Corrupted, match=r"dog has sha256 .* plan again"):
            cache.fetch(f"{place}/dog", sha256(b"lora"))
        assert not [path for path in tmp_path.glob("node/objects/*") if path.is_file()]

    def test_local_files_are_used_where_they_lie(self, tmp_path: Path) -> None:
        (tmp_path / "dog").write_bytes(b"lora")
        (tmp_path / "link").symlink_to("dog")
        cache = LocalCache(tmp_path / "node", 1000)
        assert cache.fetch(str(tmp_path / "link"), sha256(b"lora")) == tmp_path / "dog"

    def test_the_longest_unused_goes_and_what_is_held_stays(self, swift: Swift, tmp_path: Path) -> None:
        store = open_store(swift.url)
        bodies = {name: name.encode() * 100 for name in "abcd"}
        for name, body in bodies.items():
            store.put(name, body)
        cache = LocalCache(tmp_path / "node", 250)

        def fetch(name: str) -> Path:
            path = cache.fetch(f"{swift.url}/{name}", sha256(bodies[name]))
            assert path.read_bytes() == bodies[name]
            return path

        a, b = fetch("a"), fetch("b")
        os.utime(a, (1, 1))
        os.utime(b, (2, 2))
        with cache.hold(f"{swift.url}/b", sha256(bodies["b"])) as held:
            os.utime(held, (0, 0))  # the oldest now
            c = fetch("c")
            assert [path.exists() for path in (a, b, c)] == [False, True, True]
        os.utime(b, (0, 0))
        d = fetch("d")
        assert [path.exists() for path in (b, c, d)] == [False, True, True]
        assert fetch("a") == a

    def test_processes_share_it(self, swift: Swift, tmp_path: Path) -> None:
        """Six processes ask for the same four objects, in a cache that holds two; one more was killed while writing."""
        store = open_store(swift.url)
        bodies = [os.urandom(1 << 20) for _ in range(4)]
        for i, body in enumerate(bodies):
            store.put(f"{i}", body)
        script = f"""
            import pathlib, service.inputs, os, signal
            service.inputs._check = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # before the rename
            cache = service.inputs.LocalCache(pathlib.Path({str(tmp_path / "node")!r}), 0)
            cache.fetch("{swift.url}/0", "{sha256(bodies[0])}")
        """
        killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)])
        assert killed.returncode == -9
        assert len(list((tmp_path / "node" / "objects").iterdir())) == 1
        wanted = [(f"{swift.url}/{i}", sha256(body)) for i, body in enumerate(bodies)]
        with multiprocessing.get_context("spawn").Pool(3) as pool:
            results = pool.starmap(fetch_all, [(tmp_path / "node", wanted)] * 6)
        assert results == [4 << 20] * 6
        assert sum(path.stat().st_size for path in (tmp_path / "node" / "objects").iterdir()) <= 3 << 20
        assert not list((tmp_path / "node" / "objects").glob("*.part"))


def fetch_all(directory: Path, wanted: list[tuple[str, str]]) -> int:
    cache, n_bytes = LocalCache(directory, 2 << 20), 0
    for location, digest in wanted:
        with cache.hold(location, digest) as path:
            body = path.read_bytes()
            assert sha256(body) == digest
            n_bytes += len(body)
    return n_bytes


def test_unsafe_locations_are_refused() -> None:
    for location in ("s3://b/a/../x", "s3://b/a//x", "s3://b", "gs://b/x", ""):
        with pytest.raises(StorageError):
            open_input(location)
