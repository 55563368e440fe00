"""One entry as a row, and rows as Parquet: the columns that people query. Owns pyarrow, with index.py."""

import io
import json
from collections.abc import Collection, Iterable
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from service.entry import Entry, alignments
from service.errors import Corrupted

BATCH_ROWS = 2000  # turned into columns at a time: a row as Python values takes ten times the memory
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
        ("merged_by", pa.string()),  # the method itself, or the one that `best` chose
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
        ("device", pa.string()),
        ("seconds", pa.float64()),  # all stages together
        ("merge_seconds", pa.float64()),
        ("peak_bytes", pa.int64()),
        ("created", pa.timestamp("us", tz="UTC")),
        ("attempt", pa.string()),
        ("objects", pa.list_(OBJECT)),
        ("job", pa.string()),  # JSON: the whole identity
        ("report", pa.string()),  # JSON: timings, losses, what was assumed
    ]
)  # fmt: skip
MEDIA_TYPE = "application/vnd.apache.parquet"


def row(entry: Entry) -> dict[str, Any]:
    """One entry's values; null for what its job or report does not say."""
    job, subject, style = entry.job, entry.job["subject"], entry.job["style"]
    base, samples = _part(job, "base"), _part(job, "samples")
    lora, preview = entry.objects.get("merged.safetensors"), entry.objects.get("merged.png")
    stages = {name: s for name, s in _part(entry.report, "stages").items() if _typed(s, (int, float)) is not None}
    return {
        "job_id": entry.job_id,
        "subject": entry.subject,
        "style": entry.style,
        "method": entry.method,
        "merged_by": entry.merged_by,
        "seed": _whole(job.get("seed")),
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
        "device": _typed(entry.report.get("device"), str),
        "seconds": float(sum(stages.values())) if stages else None,
        "merge_seconds": stages.get("merge"),
        "peak_bytes": _whole(entry.report.get("peak_bytes")),
        "created": entry.created,
        "attempt": entry.attempt,
        "objects": [asdict(item) for _, item in sorted(entry.objects.items())],
        "job": _json(job),
        "report": _json(entry.report),
    }


def table_of(entries: Iterable[Entry]) -> pa.Table:
    batches, rows = [], []
    for entry in entries:
        rows.append(row(entry))
        if len(rows) == BATCH_ROWS:
            batches.append(pa.RecordBatch.from_pylist(rows, SCHEMA))
            rows = []
    return pa.Table.from_batches([*batches, pa.RecordBatch.from_pylist(rows, SCHEMA)], SCHEMA)


def joined(tables: Iterable[pa.Table]) -> pa.Table:
    """One table, in the order of job ids."""
    return pa.concat_tables([EMPTY, *tables]).sort_by("job_id")


def kept(table: pa.Table, job_ids: Collection[str]) -> pa.Table:
    return table.filter(pa.array([job_id in job_ids for job_id in table["job_id"].to_pylist()], pa.bool_()))


def write_parquet(table: pa.Table) -> bytes:
    """Equal rows give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=BATCH_ROWS)
    return sink.getvalue().to_pybytes()


def read_parquet(body: bytes, name: str, columns: list[str] | None = None) -> pa.Table:
    """Corrupted for what is no shard of this version: the index is derived, so it can be made again."""
    try:
        file = pq.ParquetFile(io.BytesIO(body))
        if not file.schema_arrow.equals(SCHEMA):
            raise Corrupted(f"{name} was written by another version; make it again with `ziplora index --rebuild`")
        return file.read(columns)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise Corrupted(f"{name} cannot be read ({error}); make it again with `ziplora index --rebuild`") from error


def _part(value: Any, name: str) -> dict[str, Any]:
    part = value.get(name)
    return part if isinstance(part, dict) else {}


def _templates(samples: dict[str, Any]) -> list[str]:
    prompts = samples.get("prompts")
    found = [p.get("template") for p in prompts if isinstance(p, dict)] if isinstance(prompts, list | tuple) else []
    return [text for text in found if isinstance(text, str)]


def _typed(value: Any, kind: type | tuple[type, ...]) -> Any:
    return value if isinstance(value, kind) and not isinstance(value, bool) else None


def _whole(value: Any) -> int | None:
    """The number, if the column can hold it."""
    return value if type(value) is int and abs(value) < 2**63 else None


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


EMPTY = SCHEMA.empty_table()
