"""Catalogs for tests: identities, and entries whose files a worker could have left, their content given by the job."""

import hashlib
import json
from pathlib import Path
from typing import Any

from service.catalog import Catalog
from service.entry import Entry
from service.trained import TrainedLoRA, TrainedLoRAs


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


SUBJECT_LORA, UNUSED_LORA = "1" * 64, "3" * 64  # ids of trainings: of every identity's subject, and of nobody's


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


def trained(
    catalog: Catalog, training_id: str = SUBJECT_LORA, name: str = "dog", role: str = "subject", steps: int = 4
) -> TrainedLoRA:
    """A LoRA as a run that trained it would have left it."""
    content = f"{name} after {steps} steps".encode() * 50
    return TrainedLoRAs(catalog.store).commit(
        training_id, name, role, {"settings": {"steps": steps}}, content, {"steps": steps}
    )
