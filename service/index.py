"""The index: one row per entry, for people and programs that query catalogs. Derived; owns pyarrow.

index.parquet is for pandas, duckdb and polars, its rows in the order of job ids; index.json, for web pages, holds the
little that a page shows, by subject, style, method and seed, with the jobs given up and the records that could not be
read. Equal entries give equal bytes.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from service.entry import (
    ALIGNMENTS,
    VERSION,
    Entry,
    Failure,
    Unreadable,
    alignments,
    digest_line,
    digest_of_lines,
)
from service.storage import Store

BATCH_ROWS = 2000  # turned into columns at a time: a row as Python values takes ten times the memory
ORDER = ("subject", "style", "method", "seed", "job_id")
OBJECT = pa.struct(
    [
        ("name", pa.string()),
        ("key", pa.string()),
        ("sha256", pa.string()),
        ("size", pa.int64()),
        ("content_type", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [
        ("job_id", pa.string()),
        ("subject", pa.string()),
        ("style", pa.string()),
        ("method", pa.string()),
        ("seed", pa.int64()),
        ("knobs", pa.string()),  # JSON
        ("architecture", pa.string()),
        ("base_sha256", pa.string()),
        ("subject_sha256", pa.string()),
        ("style_sha256", pa.string()),
        ("subject_prompt", pa.string()),
        ("style_prompt", pa.string()),
        ("subject_trigger", pa.string()),
        ("style_trigger", pa.string()),
        ("subject_weight", pa.float64()),
        ("style_weight", pa.float64()),
        ("sample_prompts", pa.list_(pa.string())),  # templates
        ("lora_key", pa.string()),
        ("lora_sha256", pa.string()),
        ("lora_bytes", pa.int64()),
        ("preview_key", pa.string()),
        ("sample_keys", pa.list_(pa.string())),
        ("style_alignment", pa.float64()),  # CLIP-I; the three are null where nothing was scored
        ("subject_alignment", pa.float64()),  # DINO
        ("text_alignment", pa.float64()),  # CLIP-T
        ("n_bytes", pa.int64()),  # of all objects
        ("created", pa.timestamp("us", tz="UTC")),
        ("attempt", pa.string()),
        ("objects", pa.list_(OBJECT)),
        ("job", pa.string()),  # JSON: the whole identity
        ("report", pa.string()),  # JSON: timings, losses, what was assumed
    ]
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class IndexSummary:
    """What was indexed; `digest` is the catalog's, over the entries that could be read."""

    entries: int
    failures: int
    unreadable: tuple[Unreadable, ...]
    digest: str


def write_index(
    store: Store, entries: Iterable[Entry], failures: Iterable[Failure], unreadable: Sequence[Unreadable]
) -> IndexSummary:
    """Put index.parquet and index.json in the store, in place of older ones.

    Entries come in the order of their job ids and are not kept, so that 100,000 of them fit; `unreadable` may be
    filled while they are taken.
    """
    rows: list[dict[str, Any]] = []
    shown, lines = [], []
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, SCHEMA, compression="zstd") as writer:
        for entry in entries:
            rows.append(row(entry))
            shown.append(_shown(rows[-1]))
            lines.append(digest_line(entry))
            if len(rows) == BATCH_ROWS:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
                rows = []
        writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
    store.put("index.parquet", sink.getvalue().to_pybytes(), content_type="application/vnd.apache.parquet")

    given_up = [_given_up(failure) for failure in failures]
    digest = digest_of_lines(lines)
    page = {
        "version": VERSION,
        "digest": digest,
        "entries": sorted(shown, key=_order),
        "failures": given_up,
        "unreadable": [asdict(record) for record in unreadable],
    }
    store.put("index.json", json.dumps(page, ensure_ascii=False).encode(), content_type="application/json")
    return IndexSummary(len(lines), len(given_up), tuple(unreadable), digest)


def row(entry: Entry) -> dict[str, Any]:
    """One entry's values; null for what its job does not say."""
    job, subject, style = entry.job, entry.job["subject"], entry.job["style"]
    base, samples = _part(job, "base"), _part(job, "samples")
    lora, preview = entry.objects.get("merged.safetensors"), entry.objects.get("merged.png")
    return {
        "job_id": entry.job_id,
        "subject": entry.subject,
        "style": entry.style,
        "method": entry.method,
        "seed": _typed(job.get("seed"), int),
        "knobs": _json(job.get("knobs")),
        "architecture": _typed(base.get("architecture"), str),
        "base_sha256": _typed(base.get("digest"), str),
        "subject_sha256": _typed(subject.get("lora"), str),
        "style_sha256": _typed(style.get("lora"), str),
        "subject_prompt": _typed(subject.get("prompt"), str),
        "style_prompt": _typed(style.get("prompt"), str),
        "subject_trigger": _typed(subject.get("trigger"), str),
        "style_trigger": _typed(style.get("trigger"), str),
        "subject_weight": _typed(subject.get("weight"), (int, float)),
        "style_weight": _typed(style.get("weight"), (int, float)),
        "sample_prompts": _templates(samples),
        "lora_key": lora and lora.key,
        "lora_sha256": lora and lora.sha256,
        "lora_bytes": lora and lora.size,
        "preview_key": preview and preview.key,
        "sample_keys": [item.key for name, item in sorted(entry.objects.items()) if name.startswith("samples/")],
        **alignments(entry),
        "n_bytes": entry.n_bytes,
        "created": entry.created,
        "attempt": entry.attempt,
        "objects": [asdict(item) for _, item in sorted(entry.objects.items())],
        "job": _json(job),
        "report": _json(entry.report),
    }


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    names = (*ORDER, "lora_key", "lora_bytes", "preview_key", "sample_keys")
    scores = {name: row[name] for name in ALIGNMENTS if row[name] is not None}
    return {name: row[name] for name in names} | scores | {"created": row["created"].isoformat()}


def _given_up(failure: Failure) -> dict[str, Any]:
    job = failure.job
    names = {"subject": job["subject"]["id"], "style": job["style"]["id"], "method": job["method"]}
    return {"job_id": failure.job_id, **names, "kind": failure.kind, "reason": failure.reason}


def _order(row: dict[str, Any]) -> list[tuple[bool, Any]]:
    return [(row[name] is None, row[name]) for name in ORDER]


def _part(job: Any, name: str) -> dict[str, Any]:
    value = job.get(name)
    return value if isinstance(value, dict) else {}


def _templates(samples: dict[str, Any]) -> list[str]:
    prompts = samples.get("prompts")
    found = [p.get("template") for p in prompts if isinstance(p, dict)] if isinstance(prompts, list | tuple) else []
    return [text for text in found if isinstance(text, str)]


def _typed(value: Any, kind: type | tuple[type, ...]) -> Any:
    return value if isinstance(value, kind) and not isinstance(value, bool) else None


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
