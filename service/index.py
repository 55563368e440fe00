"""The index: one row per entry, as Parquet for pandas, duckdb and polars. Derived, and brought up to date in place.

    index/all.parquet, from 4,000 entries on index/0.parquet … f.parquet, from 64,000 on index/00.parquet … ff.parquet
    index.json        how many entries, the catalog's digest, what was given up or cannot be read, and the shards

A shard holds the entries whose job ids begin with its name, so an entry has one place, `index/*.parquet` reads each
entry once, and two runs that index at the same time cannot both add it. A shard is replaced as a whole. Of two writers
that replace it in the same instant the later one wins; each goes on until it has *read* every shard to hold exactly
what a listing made after its last write shows, so the last to leave leaves nothing out. No locks, no conditional
writes. Only while shards are split (twice in a catalog's life) may a reader meet an entry twice.

An update lists the entries once, reads only those that no shard has, and opens only the shards in which something
changed: index.json remembers of each shard which ids it holds at which etag, and that stays true whoever writes later.
"""

import hashlib
import json
import logging
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from service.entry import (
    Entry,
    Object,
    Unreadable,
    digest_line,
    digest_of_groups,
    digest_of_lines,
)
from service.errors import Corrupted, NotFound, Unavailable
from service.index_rows import EMPTY, MEDIA_TYPE, joined, kept, read_parquet, table_of, write_parquet
from service.steps import parallel
from service.storage import ObjectInfo, Store

if TYPE_CHECKING:
    import pyarrow as pa

    from service.catalog import Catalog

VERSION = 3
SUMMARY = "index.json"
SHARD = re.compile(r"index/(all|[0-9a-f]{1,2})\.parquet")
SHARD_ROWS = 4000  # more on average, and shards are split in sixteen
MAX_DEPTH = 2
SHARDS_AT_ONCE = 8
READS = 4  # entries at a time, for each of them
ROUNDS = 20  # against writers that never rest
log = logging.getLogger("ziplora.index")


@dataclass(frozen=True, slots=True)
class Shard:
    """What a shard holds at this etag. `groups`: by the first two digits of job ids, the digest of the content (part of
    the catalog's) and of the attempts (changes whenever any row does)."""

    rows: int
    ids: str  # digest
    etag: str | None
    groups: Mapping[str, tuple[str, str]]


@dataclass(frozen=True, slots=True)
class IndexSummary:
    """What is indexed; `digest` is the catalog's, over the entries that could be read. `read`: entries read for it."""

    entries: int
    failures: int
    unreadable: tuple[Unreadable, ...]
    digest: str
    read: int = 0
    written: int = 0  # shards
    shards: Mapping[str, Shard] = field(default_factory=dict)
    given_up: tuple[Mapping[str, Any], ...] = ()


def update_index(catalog: "Catalog", *, rebuild: bool = False) -> IndexSummary:
    """Bring the index up to what is committed; `rebuild` reads every entry again. Unavailable when others keep
    changing it; what was given up and what cannot be read is in the summary."""
    return _Update(catalog, rebuild).run()


def read_summary(store: Store) -> dict[str, Any]:
    """index.json, or nothing where there is none that this version wrote."""
    try:
        summary = json.loads(store.get(SUMMARY))
    except (NotFound, ValueError):
        return {}
    return summary if isinstance(summary, dict) and summary.get("version") == VERSION else {}


def read_rows(store: Store, shard: str, columns: list[str] | None = None) -> "pa.Table":
    """A shard's rows in the order of job ids; NotFound, Corrupted."""
    return read_parquet(store.get(shard_key(shard)), f"{store.url}/{shard_key(shard)}", columns)


def shard_key(shard: str) -> str:
    return f"index/{shard}.parquet"


def shard_of(job_id: str, depth: int) -> str:
    return job_id[:depth] or "all"


def depth_for(entries: int) -> int:
    """How many digits the shards of so many entries are named by."""
    depth = 0
    while depth < MAX_DEPTH and entries > SHARD_ROWS * 16**depth:
        depth += 1
    return depth


def _depth(shard: str) -> int:
    return 0 if shard == "all" else len(shard)


class _Update:
    def __init__(self, catalog: "Catalog", rebuild: bool) -> None:
        self.catalog, self.store = catalog, catalog.store
        self.before = read_summary(self.store)
        self.known: dict[str, Shard] = {} if rebuild else _shards(self.before)
        self.rebuild = rebuild
        self.fresh: set[str] = set()  # shards that a rebuild has made
        self.depth: int | None = None  # of a rebuild
        self.unreadable: dict[str, Unreadable] = {}  # by job id
        self.read = self.written = 0

    def run(self) -> IndexSummary:
        for _ in range(ROUNDS):
            shards = self._round()
            if shards is None:
                continue
            summary = self._summarise(shards)
            now = self._stored()
            if all(shard in now and now[shard].etag == known.etag for shard, known in shards.items()):
                return summary
        raise Unavailable(
            f"the index of {self.store.url} is changed by others all the time: run `ziplora index` once they are done"
        )

    def _round(self) -> dict[str, Shard] | None:
        """Every shard compared with one listing of the entries; None when something had to be written."""
        ids = sorted(self.catalog.committed())
        stored = self._stored()
        depth = self._choose_depth(len(ids), stored)
        wanted: dict[str, set[str]] = {} if depth else {"all": set()}
        for job_id in ids:
            wanted.setdefault(shard_of(job_id, depth), set()).add(job_id)
        due = [shard for shard in wanted if not self._is_current(shard, wanted[shard], stored)]
        before = self.written
        for shard, seen in zip(
            due, parallel(lambda shard: self._settle(shard, wanted[shard], stored), due, SHARDS_AT_ONCE), strict=True
        ):
            if seen is None:
                self.known.pop(shard, None)
            else:
                self.known[shard] = seen
        for shard in stored.keys() - wanted.keys():  # of another depth, or nothing of it is left
            self.store.delete(shard_key(shard))
            self.written += 1
        settled = self.written == before and all(shard in self.known for shard in wanted)
        return {shard: self.known[shard] for shard in wanted} if settled else None

    def _choose_depth(self, entries: int, stored: Collection[str]) -> int:
        """Shards are split, never joined: of two writers that disagree the finer one prevails. A rebuild may join."""
        if self.rebuild and self.depth is None:
            self.depth = depth_for(entries)
        if self.depth is not None:
            return max(self.depth, depth_for(entries))
        return max([depth_for(entries), *map(_depth, stored)])

    def _is_current(self, shard: str, ids: Collection[str], stored: Mapping[str, ObjectInfo]) -> bool:
        known = self.known.get(shard)
        return (
            known is not None
            and shard in stored
            and stored[shard].etag == known.etag is not None
            and known.ids == _digest(ids)
        )

    def _settle(self, shard: str, ids: set[str], stored: Mapping[str, ObjectInfo]) -> Shard | None:
        """Make the shard hold these entries. What it holds if it did already, None after a write."""
        table = EMPTY if self.rebuild and shard not in self.fresh else self._rows(shard, stored)
        have = set(table["job_id"].to_pylist())
        new = list(self._entries(sorted(ids - have)))
        if shard in stored and not new and have <= ids and (not self.rebuild or shard in self.fresh):
            if self.store.head(shard_key(shard)).etag != stored[shard].etag:
                return None  # replaced while it was read
            return described(table, stored[shard].etag)
        table = joined([kept(table, ids), table_of(new)])
        self.store.put(shard_key(shard), write_parquet(table), content_type=MEDIA_TYPE)
        self.fresh.add(shard)
        self.written += 1
        return None

    def _rows(self, shard: str, stored: Mapping[str, ObjectInfo]) -> "pa.Table":
        """What is known of a shard's entries: from itself, or from the coarser shard that it is split from."""
        for name in (shard, shard[:-1] or "all", "all"):
            if name in stored:
                try:
                    return read_rows(self.store, name)
                except NotFound:
                    continue
                except Corrupted as error:
                    log.warning("%s", error)
                    return EMPTY
        return EMPTY

    def _entries(self, job_ids: Iterable[str]) -> Iterable[Entry]:
        def read(job_id: str) -> Entry | Unreadable | None:
            try:
                return self.catalog.entry(job_id)
            except NotFound:  # removed since the listing
                return None
            except Corrupted as error:
                return Unreadable(f"entries/{job_id}.json", str(error))

        for job_id, found in zip(job_ids, parallel(read, job_ids, READS), strict=True):
            if isinstance(found, Unreadable):
                self.unreadable[job_id] = found
            elif found is not None:
                self.unreadable.pop(job_id, None)
                self.read += 1
                yield found

    def _stored(self) -> dict[str, ObjectInfo]:
        return {
            match[1]: found for found in self.store.list("index/") if (match := SHARD.fullmatch(found.key)) is not None
        }

    def _summarise(self, shards: Mapping[str, Shard]) -> IndexSummary:
        unreadable = list(self.unreadable.values())
        given_up = [
            {
                "job_id": failure.job_id,
                "subject": failure.job["subject"]["id"],
                "style": failure.job["style"]["id"],
                "method": failure.job["method"],
                "kind": failure.kind,
                "reason": failure.reason,
                "attempts": failure.attempts,
            }
            for failure in self.catalog.failures(unreadable.append)
        ]
        rows = sum(shard.rows for shard in shards.values())
        digest = digest_of_groups({name: group[0] for shard in shards.values() for name, group in shard.groups.items()})
        page = {
            "version": VERSION,
            "entries": rows,
            "digest": digest,
            "failures": given_up,
            "unreadable": [asdict(record) for record in unreadable],
            "shards": {name: asdict(shard) for name, shard in sorted(shards.items())},
        }
        body = json.dumps(page, ensure_ascii=False)
        if json.loads(body) != self.before:
            self.store.put(SUMMARY, body.encode(), content_type="application/json")
        self.before = json.loads(body)
        return IndexSummary(
            rows, len(given_up), tuple(unreadable), digest, self.read, self.written, dict(shards), tuple(given_up)
        )


def described(table: "pa.Table", etag: str | None) -> Shard:
    lines: dict[str, list[str]] = {}
    attempts: dict[str, list[str]] = {}
    for job_id, attempt, objects in zip(
        *(table[name].to_pylist() for name in ("job_id", "attempt", "objects")), strict=True
    ):
        lines.setdefault(job_id[:2], []).append(digest_line(job_id, [Object(**item) for item in objects]))
        attempts.setdefault(job_id[:2], []).append(f"{job_id} {attempt}")
    groups = {name: (digest_of_lines(lines[name]), digest_of_lines(attempts[name])) for name in sorted(lines)}
    return Shard(table.num_rows, _digest(table["job_id"].to_pylist()), etag, groups)


def _digest(ids: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:32]


def _shards(summary: Mapping[str, Any]) -> dict[str, Shard]:
    """As index.json tells; nothing of it is believed that has another form."""
    found: dict[str, Shard] = {}
    try:
        for name, fields in summary.get("shards", {}).items():
            groups = {str(group): (str(a), str(b)) for group, (a, b) in fields["groups"].items()}
            found[name] = Shard(int(fields["rows"]), str(fields["ids"]), fields["etag"], groups)
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}
    return found
