"""What a worker keeps: in memory and on its node's disk, under threads and processes."""

import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from service.caches import Cache, memory_share
from service.node_cache import NodeCache


class TestCache:
    def test_it_keeps_what_was_used_last(self) -> None:
        made: list[str] = []

        def make(name: str) -> str:
            made.append(name)
            return name

        cache = Cache[str](limit_bytes=3, size=len)
        for name in ("a", "bb", "a", "c", "bb", "long one", "c"):
            assert cache.get(name, lambda name=name: make(name)) == name
        assert made == ["a", "bb", "c", "bb", "long one"]
        assert (cache.hits, cache.misses) == (2, 5)
        assert (cache.room, Cache[str](10, len).room) == (2, 2)

    def test_what_is_too_large_to_stay_pushes_nothing_out(self) -> None:
        cache = Cache[str](limit_bytes=3, size=len)
        for name in ("a", "b", "long one"):
            cache.get(name, lambda name=name: name)
        assert cache.held() == ["a", "b"]

    def test_each_value_is_made_once_however_many_want_it(self) -> None:
        cache, made = Cache[str](limit_bytes=100, size=len), []

        def make() -> str:
            made.append(1)
            time.sleep(0.1)
            return "value"

        found: list[str] = []
        threads = [threading.Thread(target=lambda: found.append(cache.get("key", make))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == ["value"] * 8
        assert len(made) == 1

    def test_a_failure_is_told_to_all_who_wait_and_not_kept(self) -> None:
        cache = Cache[str](limit_bytes=100, size=len)
        with pytest.raises(ZeroDivisionError):
            cache.get("key", lambda: str(1 / 0))
        assert "key" not in cache
        assert cache.get("key", lambda: "value") == "value"


def test_workers_of_one_machine_share_its_memory() -> None:
    assert memory_share(4) == pytest.approx(memory_share(1) / 4, abs=1)
    assert 0 < memory_share(1) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class TestNodeCache:
    def test_what_was_made_is_there_in_the_next_run(self, tmp_path: Path) -> None:
        first, second = NodeCache(tmp_path, 100), NodeCache(tmp_path, 100)
        assert first.get("a", lambda: b"made") == b"made"
        assert second.get("a", lambda: b"made again") == b"made"
        assert (first.misses, second.hits) == (1, 1)
        second.forget("a")
        assert first.get("a", lambda: b"other") == b"other"

    def test_the_longest_unused_goes(self, tmp_path: Path) -> None:
        cache = NodeCache(tmp_path, 25)
        for name, used in (("a", 1), ("b", 2)):
            cache.get(name, lambda: b"0123456789")
            os.utime(tmp_path / "values" / name, (used, used))
        cache.get("a", lambda: b"")  # used now
        cache.get("c", lambda: b"0123456789")
        assert sorted(path.name for path in (tmp_path / "values").iterdir()) == ["a", "c"]

    def test_a_disk_that_cannot_be_written_keeps_nothing_and_harms_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "values").write_text("not a directory")
        cache = NodeCache(tmp_path, 100)
        assert cache.get("a", lambda: b"made") == b"made"
        assert cache.get("a", lambda: b"made again") == b"made again"

    def test_one_process_makes_what_several_want(self, tmp_path: Path) -> None:
        with multiprocessing.get_context("fork").Pool(4) as pool:
            found = pool.map(make_slowly, [tmp_path] * 4)
        assert len(set(found)) == 1


def make_slowly(directory: Path) -> bytes:
    def make() -> bytes:
        time.sleep(0.2)
        return os.urandom(8)

    return NodeCache(directory, 100).get("a", make)
