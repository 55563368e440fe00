"""Catalogs to look at: real entries with real pictures, made without a model."""

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from io import BytesIO
from typing import Any

from PIL import Image

from service.catalog import Catalog
from service.entry import Entry, Object, write_entry


def picture(text: str, side: int = 48) -> bytes:
    """A PNG that is another one for every text."""
    digest = hashlib.sha256(text.encode()).digest()
    small = Image.frombytes("RGB", (3, 3), digest[:27])
    out = BytesIO()
    small.resize((side, side), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def job(subject: str, style: str, method: str = "ziplora", template: str = "a {subject} in {style}") -> dict[str, Any]:
    return {
        "algorithm": 1,
        "base": {"digest": "b" * 64, "architecture": "sdxl"},
        "subject": {"id": subject, "lora": "1" * 64, "prompt": "a photo", "trigger": f"sks {subject}", "weight": 1.0}
        | {"images": [hashlib.sha256(picture(f"subject {subject}")).hexdigest()]},
        "style": {"id": style, "lora": "2" * 64, "prompt": "a house", "trigger": f"szn {style}", "weight": 1.0}
        | {"images": [hashlib.sha256(picture(f"style {style}")).hexdigest()]},
        "method": method,
        "knobs": {"steps": 100},
        "seed": 0,
        "samples": {"prompts": [{"name": "both", "template": template}], "seeds": [0, 7]},
        "outputs": [],
    }


def id_of(job: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()


def samples_of(job: dict[str, Any], strengths: Sequence[float] = (1.0, 0.7, 0.4)) -> list[dict[str, Any]]:
    template = job["samples"]["prompts"][0]["template"]
    prompt = template.format(subject=job["subject"]["trigger"], style=job["style"]["trigger"])
    return [
        {"object": f"samples/{i:03}.png", "name": "both", "prompt": prompt, "style_strength": strength, "seed": seed}
        for i, (strength, seed) in enumerate((s, seed) for s in strengths for seed in (0, 7))
    ]


def report_of(job: dict[str, Any], scored: bool = True, strengths: Sequence[float] = (1.0, 0.7, 0.4)) -> dict[str, Any]:
    digest = hashlib.sha256(id_of(job).encode()).digest()
    scores = {f"{kind}_alignment": 0.3 + digest[i] / 512 for i, kind in enumerate(("style", "subject", "text"))}
    return {
        "samples": samples_of(job, strengths),
        "merge": {"similarity": 0.7, "steps": 100, "style_loss": [0.02, 0.005]},
        "stages": {"merge": 10.0, "sample": 2.5},
        "device": "cpu",
    } | ({"scores": scores | {"missing": {}}} if scored else {})


def commit(catalog: Catalog, job: dict[str, Any], scored: bool = True, side: int = 48) -> Entry:
    report = report_of(job, scored)
    files: dict[str, Any] = {
        one["object"]: picture(f"{id_of(job)} {one['style_strength']} {one['seed']}", side) for one in report["samples"]
    }
    files |= {"merged.safetensors": b"weights of " + id_of(job).encode(), "merged.png": files["samples/000.png"]}
    return catalog.commit(id_of(job), job, files, report)


def put_entry_alone(catalog: Catalog, job: dict[str, Any], preview: bytes | None = None) -> str:
    """The entry without its objects: a hundred thousand are made in a minute."""
    job_id = id_of(job)
    report = report_of(job, strengths=(1.0, 0.4))
    names = ["merged.safetensors", "merged.json", "merged.png", *(one["object"] for one in report["samples"])]
    objects = {
        name: Object(
            name,
            f"pairs/{job_id}/{job_id[:16]}/{name}",
            hashlib.sha256(f"{job_id}{name}".encode()).hexdigest(),
            len(preview) if preview and name == "merged.png" else 1000,
            "image/png",
        )
        for name in names
    }
    entry = Entry(job_id, job, objects, report, job_id[:16], datetime(2026, 1, 1, tzinfo=UTC))
    catalog.store.put(f"entries/{job_id}.json", write_entry(entry))
    if preview:
        catalog.store.put(objects["merged.png"].key, preview)
    return job_id
