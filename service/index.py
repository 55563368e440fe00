"""The index: one row per entry, for people and programs that query catalogs. Derived; owns pyarrow.

index.parquet is for pandas, duckdb and polars; index.json, for web pages, holds the little that a page shows, the
jobs given up and the records that could not be read. Equal entries give equal rows in equal order: by subject, style,
method, seed, job id.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from service.entry import VERSION, Entry, Failure, Unreadable, digest_of
from service.storage import Store

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
    store: Store, entries: Sequence[Entry], failures: Sequence[Failure], unreadable: Sequence[Unreadable]
) -> IndexSummary:
    """Put index.parquet and index.json in the store, in place of older ones."""
    ordered = sorted(entries, key=_order)
    store.put("index.parquet", table(ordered), content_type="application/vnd.apache.parquet")
    digest = digest_of(ordered)
    page = {
        "version": VERSION,
        "digest": digest,
        "entries": [_shown(entry) for entry in ordered],
        "failures": [_given_up(failure) for failure in sorted(failures, key=lambda f: f.job_id)],
        "unreadable": [asdict(record) for record in sorted(unreadable, key=lambda u: u.key)],
    }
    store.put("index.json", json.dumps(page, ensure_ascii=False).encode(), content_type="application/json")
    return IndexSummary(len(ordered), len(failures), tuple(unreadable), digest)


def table(entries: Sequence[Entry]) -> bytes:
    """The rows as a Parquet file, equal bytes for equal rows."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([row(entry) for entry in entries], SCHEMA), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


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
        "n_bytes": entry.n_bytes,
        "created": entry.created,
        "attempt": entry.attempt,
        "objects": [asdict(item) for _, item in sorted(entry.objects.items())],
        "job": _json(job),
        "report": _json(entry.report),
    }


def _shown(entry: Entry) -> dict[str, Any]:
    values = row(entry)
    names = ("job_id", "subject", "style", "method", "seed", "lora_key", "lora_bytes", "preview_key", "sample_keys")
    return {name: values[name] for name in names} | {"created": entry.created.isoformat()}


def _given_up(failure: Failure) -> dict[str, Any]:
    job = failure.job
    names = {"subject": job["subject"]["id"], "style": job["style"]["id"], "method": job["method"]}
    return {"job_id": failure.job_id, **names, "kind": failure.kind, "reason": failure.reason}


def _order(entry: Entry) -> tuple[str, str, str, str, str]:
    return entry.subject, entry.style, entry.method, f"{entry.job.get('seed')!s:>20}", entry.job_id


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
