"""The index: complete and without doubles, whoever else writes; few requests; read by the tools that people have."""

import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from service import index
from service.catalog import Catalog
from service.index import update_index
from service.storage import LocalStore, ObjectInfo
from tests.conftest import Swift
from tests.test_catalog import fill, id_of, identity


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "SHARD_ROWS", 4)


def rows_of(catalog: Catalog) -> list[dict[str, Any]]:
    return [
        row
        for found in catalog.store.list("index/")
        for row in pq.read_table(io.BytesIO(catalog.store.get(found.key))).to_pylist()
    ]


def ids_of(catalog: Catalog) -> list[str]:
    return sorted(row["job_id"] for row in rows_of(catalog))


def jobs(n: int, first: int = 0) -> list[dict[str, Any]]:
    return [identity(f"s{i:03}") for i in range(first, first + n)]


class Counting(LocalStore):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.calls: Counter[str] = Counter()

    def put(self, key: str, body: bytes | Path, **options: Any) -> None:
        self.calls[f"put {key.split('/')[0]}"] += 1
        super().put(key, body, **options)

    def get(self, key: str) -> bytes:
        self.calls[f"get {key.split('/')[0]}"] += 1
        return super().get(key)

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        self.calls[f"get {key.split('/')[0]}"] += 1
        return super().get_range(key, start, stop)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self.calls[f"list {prefix}"] += 1
        return super().list(prefix)


def test_one_row_per_entry(catalog: Catalog) -> None:
    entries = fill(catalog, identity("dog", seed=2), identity("cat"), identity("dog", seed=10))
    failed = identity("fox")
    catalog.record_failure(id_of(failed), failed, "NaN in to_q", "BadInput", "", 1)
    catalog.store.put(f"entries/{'0' * 64}.json", b"{")
    summary = catalog.build_index()
    assert (summary.entries, summary.failures, len(summary.unreadable)) == (3, 1, 1)
    rows = rows_of(catalog)
    assert sorted((row["subject"], row["seed"]) for row in rows) == [("cat", 0), ("dog", 2), ("dog", 10)]
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
    assert page["entries"] == 3
    assert {name: page["failures"][0][name] for name in ("job_id", "subject", "kind", "reason")} == {
        "job_id": id_of(failed),
        "subject": "fox",
        "kind": "BadInput",
        "reason": "NaN in to_q",
    }
    assert page["unreadable"][0]["key"] == f"entries/{'0' * 64}.json"


def test_its_digest_is_the_catalogs(local: Catalog, small_shards: None) -> None:
    for n in (1, 3, 30):
        fill(local, *jobs(n, 100 * n))
        assert update_index(local).digest == local.digest()
    assert update_index(local, rebuild=True).digest == local.digest()


def test_equal_entries_give_equal_bytes(local: Catalog, tmp_path: Path) -> None:
    fill(local, *(identity(subject) for subject in "bca"))
    local.build_index()
    shutil.copytree(tmp_path / "catalog", tmp_path / "copy")
    Catalog(tmp_path / "copy").build_index(rebuild=True)
    assert LocalStore(tmp_path / "copy").get("index/all.parquet") == local.store.get("index/all.parquet")


def test_an_empty_catalog_has_an_index(local: Catalog) -> None:
    local.build_index()
    assert pq.read_table(io.BytesIO(local.store.get("index/all.parquet"))).num_rows == 0


def test_jobs_that_say_less_have_nulls(local: Catalog) -> None:
    job = {"subject": {"id": "a", "weight": "heavy"}, "style": {"id": "b"}, "method": "m", "samples": {"prompts": [1]}}
    local.commit(id_of(job), job, {"x.bin": b""}, {"stages": {"merge": "long"}, "peak_bytes": 2**70})
    local.build_index()
    (row,) = rows_of(local)
    assert (row["seed"], row["lora_key"], row["subject_weight"], row["sample_prompts"]) == (None, None, None, [])
    assert (row["seconds"], row["peak_bytes"]) == (None, None)


def test_only_what_is_new_is_read(tmp_path: Path, small_shards: None) -> None:
    store = Counting(tmp_path)
    catalog = Catalog(store)
    fill(catalog, *jobs(80))
    assert update_index(catalog).read == 80
    assert len(list(store.list("index/"))) > 40  # shards of two digits

    store.calls.clear()
    nothing = update_index(catalog)
    assert (nothing.read, nothing.written) == (0, 0)
    assert store.calls == {"list entries/": 1, "list index/": 2, "get index.json": 1, "list failures/": 1}

    fill(catalog, identity("another"))
    store.calls.clear()
    one = update_index(catalog)
    assert (one.read, one.written, one.entries) == (1, 1, 81)
    assert store.calls["get entries"] == 1
    assert store.calls["put index"] == 1
    assert store.calls["get index"] <= 2  # before and after its change
    assert store.calls["list entries/"] == 2  # and once more to see that nothing came in between


def test_what_was_removed_leaves_the_index(local: Catalog, small_shards: None) -> None:
    entries = fill(local, *jobs(10))
    local.build_index()
    for entry in entries[:7]:
        local.store.delete(f"entries/{entry.job_id}.json")
    summary = local.build_index()
    assert (summary.entries, summary.read) == (3, 0)
    assert ids_of(local) == sorted(entry.job_id for entry in entries[7:])


def test_shards_are_split_as_it_grows_and_nothing_is_read_twice(local: Catalog, small_shards: None) -> None:
    names = []
    for n, first in ((3, 0), (9, 10), (70, 100)):
        fill(local, *jobs(n, first))
        assert update_index(local).read == n
        assert ids_of(local) == sorted(local.committed())
        names.append({len(found.key.split("/")[1].split(".")[0]) for found in local.store.list("index/")})
    assert names == [{len("all")}, {1}, {2}]


def test_a_rebuild_reads_everything_and_may_join_shards(local: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(local, *jobs(20))
    monkeypatch.setattr(index, "SHARD_ROWS", 1)
    local.build_index()
    assert len(list(local.store.list("index/"))) > 10
    monkeypatch.setattr(index, "SHARD_ROWS", 100)
    assert update_index(local, rebuild=True).read == 20
    assert [found.key for found in local.store.list("index/")] == ["index/all.parquet"]
    assert ids_of(local) == sorted(local.committed())


@pytest.mark.parametrize("damage", [b"", b"not parquet", b"PAR1" + bytes(100) + b"PAR1"])
def test_a_damaged_shard_is_made_again(local: Catalog, damage: bytes) -> None:
    fill(local, *jobs(3))
    local.build_index()
    local.store.put("index/all.parquet", damage)
    local.store.put("index.json", b'{"version": 3, "shards": {"all": [1, 2]}}')
    assert update_index(local).read == 3
    assert ids_of(local) == sorted(local.committed())


def test_an_update_that_is_overtaken_loses_nothing(tmp_path: Path) -> None:
    """Another run writes the shard between our reading and our writing, which then replaces it."""

    class Overtaken(LocalStore):
        others = 3

        def put(self, key: str, body: bytes | Path, **options: Any) -> None:
            if key.startswith("index/") and self.others:
                self.others -= 1
                other = Catalog(tmp_path)
                fill(other, identity(f"other-{self.others}"))
                update_index(other)
            super().put(key, body, **options)

    catalog = Catalog(Overtaken(tmp_path))
    fill(catalog, *jobs(3))
    summary = update_index(catalog)
    assert summary.entries == 6
    assert ids_of(catalog) == sorted(catalog.committed())


def test_many_runs_at_once_leave_every_entry_once(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """While shards are split, too: of one digit as soon as somebody sees more than two entries."""
    monkeypatch.setattr(index, "SHARD_ROWS", 2)
    monkeypatch.setattr(index, "MAX_DEPTH", 1)

    def run(i: int) -> None:
        own = Catalog(catalog.store)
        for part in range(2):
            fill(own, identity(f"run-{i}-{part}"))
            update_index(own)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, range(3)))
    assert ids_of(catalog) == sorted(catalog.committed())
    assert len(ids_of(catalog)) == 6
    assert index.read_summary(catalog.store)["entries"] == 6
    assert update_index(catalog).written == 0


def test_pandas_and_duckdb_read_it(local: Catalog, small_shards: None, tmp_path: Path) -> None:
    fill(local, *jobs(20), identity("dog", method="direct"))
    local.build_index()
    frame = pd.read_parquet(tmp_path / "catalog/index")
    assert sorted(frame.job_id) == sorted(local.committed())
    assert set(frame.method) == {"ziplora", "direct"}
    query = f"select method, count(*) from '{tmp_path}/catalog/index/*.parquet' group by 1 order by 1"
    assert duckdb.sql(query).fetchall() == [("direct", 1), ("ziplora", 20)]


def test_pandas_and_duckdb_read_it_from_s3(swift: Swift) -> None:
    catalog = Catalog(f"{swift.url}/catalog")
    fill(catalog, *jobs(5))
    catalog.build_index()
    store = pyarrow.fs.S3FileSystem(
        endpoint_override=swift.endpoint.removeprefix("http://"),
        scheme="http",
        access_key=swift.environment["AWS_ACCESS_KEY_ID"],
        secret_key=swift.environment["AWS_SECRET_ACCESS_KEY"],
        region=swift.environment["AWS_DEFAULT_REGION"],
    )
    frame = pd.read_parquet(f"{swift.bucket}/catalog/index", filesystem=store)
    assert sorted(frame.job_id) == sorted(catalog.committed())
    rows = pyarrow.dataset.dataset(f"{swift.bucket}/catalog/index", filesystem=store)  # duckdb finds it by its name
    assert rows.count_rows() == 5
    assert duckdb.sql("select count(*), min(subject) from rows").fetchall() == [(5, "s000")]
