"""Assemble what a release contains, in fp16: base, judges, LoRAs with their pictures, and the record of how they were
made.

    python -m ziplora.pocket.ship --out DIR [--into ziplora/pocket/weights]

Says where everything is in `into`/loras.json. A miniature of SD 1.5 is assembled in a directory of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionXLPipeline

from ziplora.pocket import WEIGHTS, world
from ziplora.pocket.models import SHAPE_TRIGGERS, STYLE_TRIGGERS, Family
from ziplora.pocket.train_loras import Task, tasks

LIMIT_BYTES = 16_000_000


def ship_base(out: Path, into: Path) -> Family:
    """The averaged weights with the (perhaps polished) autoencoder, and what they are a miniature of. Afterwards LoRAs
    are trained on exactly these numbers."""
    pipeline = DiffusionPipeline.from_pretrained(out / "base", dtype=torch.float16)
    pipeline.vae = AutoencoderKL.from_pretrained(out / "vae", dtype=torch.float16)
    # loaded without a dtype, diffusers' models become fp32 and transformers' keep what they were saved in: so save fp32
    family: Family = "sdxl" if isinstance(pipeline, StableDiffusionXLPipeline) else "sd15"
    for suffix in ("", "_2") if family == "sdxl" else ("",):
        getattr(pipeline, f"text_encoder{suffix}").float()
        embed_triggers(getattr(pipeline, f"tokenizer{suffix}"), getattr(pipeline, f"text_encoder{suffix}"))
    shutil.rmtree(into / "base", ignore_errors=True)
    pipeline.save_pretrained(into / "base")
    return family


@torch.no_grad()
def embed_triggers(tokenizer: Any, encoder: Any) -> None:
    """Give the words that training never used the mean embedding of the shapes, or of the styles.

    Left at their random start they would shift every token after them; CLIP's rare words have been seen a few times.
    """
    table = encoder.get_input_embeddings().weight

    def ids(words: Sequence[str]) -> list[int]:
        return [tokenizer(word).input_ids[1] for word in words]

    for triggers, known in ((SHAPE_TRIGGERS, world.SEEN_SHAPES), (STYLE_TRIGGERS, world.SEEN_STYLES)):
        table[ids(triggers)] = table[ids(known)].mean(0)


def ship_scorers(out: Path, into: Path) -> None:
    for name in ("recogniser", "clip", "dino"):
        if (out / name / "config.json").exists():
            shutil.rmtree(into / "scorers" / name, ignore_errors=True)
            shutil.copytree(out / name, into / "scorers" / name)


def ship_loras(out: Path, into: Path, family: Family) -> dict[str, Any]:
    """Copies what was trained and returns its measurements by name."""
    shutil.rmtree(into / "loras", ignore_errors=True)
    index: dict[str, list[dict[str, Any]]] = {"subjects": [], "styles": []}
    reports: dict[str, Any] = {}
    for task in tasks(family):
        folder = out / "loras" / task.role / task.name
        if not (folder / "report.json").exists():
            continue
        report = json.loads((folder / "report.json").read_text())
        index[task.role].append(_entry(task, report, folder, into))
        reports[task.name] = {key: value for key, value in report.items() if isinstance(value, int | float)}
    (into / "loras.json").write_text(json.dumps(index, indent=1) + "\n")
    return reports


def _entry(task: Task, report: Mapping[str, Any], folder: Path, into: Path) -> dict[str, Any]:
    target = into / "loras" / task.role / task.name
    target.mkdir(parents=True)
    for path in sorted(folder.iterdir()):
        if path.suffix in (".png", ".txt", ".safetensors"):
            shutil.copy(path, target / path.name)
    images = sorted(path.relative_to(into).as_posix() for path in target.glob("*.png"))
    lora = (target / f"{task.name}.safetensors").relative_to(into).as_posix()
    return {
        "name": task.name,
        "prompt": report["prompt"],  # a style that was tried on another picture has another than its task
        "trigger": task.trigger,
        "lora": lora,
        "images": images,
        "layout": task.layout,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--into", type=Path, default=WEIGHTS)
    parser.add_argument("--base-only", action="store_true", help="before LoRAs are trained: only the base")
    arguments = parser.parse_args()
    out, into = arguments.out, arguments.into
    into.mkdir(parents=True, exist_ok=True)
    family = ship_base(out, into)
    if arguments.base_only:
        return
    ship_scorers(out, into)
    recipe = {"base": json.loads((out / "recipe.json").read_text())}
    reports = ship_loras(out, into, family)
    for name in ("vae", "recogniser", "clip", "dino", "check"):
        if (out / name / "training.json").exists():
            recipe[name] = json.loads((out / name / "training.json").read_text())
    (into / "recipe.json").write_text(json.dumps(recipe | {"loras": reports}) + "\n")
    n_bytes = sum(path.stat().st_size for path in into.rglob("*") if path.is_file())
    print(f"{n_bytes / 1e6:.2f} MB of {LIMIT_BYTES / 1e6:.0f} MB")
    if n_bytes > LIMIT_BYTES:
        raise SystemExit("too large to ship")


if __name__ == "__main__":
    main()
