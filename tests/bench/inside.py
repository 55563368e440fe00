"""What the shipped LoRAs look like inside, and what the training-free merges make of them: `make bench-inside`.

The paper's two observations (arXiv 2311.13600v2) on the pocket world's LoRAs: how much of ΔW is small and whether the
samples need it (its sparsity study: the smallest 0 to 95 % dropped, sampled and scored), and how much two LoRAs meet
column by column; then, for every training-free method, what its factorisation leaves out and its seconds. About two
minutes on one core. Results: tests/bench/results/inside.json, inside-dropped.png, inside-interference.png.
"""

import json
import time
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.bench.record import save
from ziplora import pocket
from ziplora.base import Base, load_base
from ziplora.baseline_knobs import DareKnobs, NullSpaceKnobs, PruneKnobs, SvdKnobs, TiesKnobs
from ziplora.calibrate import calibrate
from ziplora.closed_form_knobs import ClosedKnobs
from ziplora.diagnose import alignment, interference, sparsity, without_smallest
from ziplora.formats import read_lora
from ziplora.lora import LoRA, n_bytes
from ziplora.merged import Pair
from ziplora.methods import METHODS
from ziplora.optimize_knobs import ZipLoRAKnobs
from ziplora.plots import plot_dropped, plot_interference
from ziplora.sample import Request, sample_requests
from ziplora.score import load_clip, load_dino, score

WEIGHTS = Path(__file__).parents[2] / "ziplora" / "pocket" / "weights"
RESULTS = Path(__file__).parent / "results" / "inside.json"
DROPPED = (0.0, 0.5, 0.8, 0.9, 0.95)  # shares of |ΔW|, the smallest first
STUDIED = (("subjects", ("mushroom", "rocket")), ("styles", ("retro", "denim")))
SAMPLES, STEPS = 4, 20  # pictures of each LoRA at each share, denoising steps
WHOLE = 10_000
CASES: dict[str, tuple[str, Any]] = {
    "svd": ("svd", SvdKnobs()),
    "np-lora": ("np-lora", NullSpaceKnobs()),
    "np-lora, full projection": ("np-lora", NullSpaceKnobs(mu=None)),
    "prune 0.2": ("prune", PruneKnobs(0.2)),
    "prune 0.2, whole": ("prune", PruneKnobs(0.2, WHOLE)),
    "ties 0.2": ("ties", TiesKnobs(0.2)),
    "ties 1": ("ties", TiesKnobs(1.0)),
    "dare 0.5": ("dare", DareKnobs(0.5)),
    "dare 0.1": ("dare", DareKnobs(0.1)),
}


def shipped(kind: str) -> dict[str, LoRA]:
    return {path.stem: read_lora(path).lora for path in sorted((WEIGHTS / "loras" / kind).glob("*/*.safetensors"))}


def inside(loras: dict[str, LoRA]) -> dict[str, Any]:
    found = {name: sparsity(lora) for name, lora in loras.items()}
    return {
        name: {
            "below": {str(threshold): round(share, 4) for threshold, share in one.below.items()},
            "energy_left": {str(dropped): round(left, 4) for dropped, left in one.energy_left.items()},
            "effective_rank": round(mean(one.effective_rank.values()), 2),
            "rank": sorted(set(one.rank.values())),
        }
        for name, one in found.items()
    }


def meeting(subjects: dict[str, LoRA], styles: dict[str, LoRA]) -> dict[str, Any]:
    """Means over layers, of each pair of a subject and a style, and of two LoRAs of one kind to compare with."""
    names = list(subjects)
    pairs = {f"{one} × {other}": (subjects[one], styles[other]) for one in subjects for other in styles}
    own = {f"{a} × {b}": (subjects[a], subjects[b]) for a, b in pairwise(names)}
    # training starts from random `down`s that it hardly moves: equal starts make two LoRAs read the same directions
    return {
        label: {
            name: {
                "down_cosine": round(down_cosine(*both), 4),
                "alignment": round(mean(alignment(*both).values()), 4),
                "interference": round(mean(interference(*both).values()), 4),
            }
            for name, both in group.items()
        }
        for label, group in (("subject and style", pairs), ("two subjects", own))
    }


def down_cosine(one: LoRA, other: LoRA) -> float:
    """Mean over layers of the cosine of the two `down` matrices."""
    pairs = [(layer.down.flatten(), other.layers[path].down.flatten()) for path, layer in one.layers.items()]
    return mean(float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs)


def merges(base: Base, pair: Pair) -> dict[str, Any]:
    results = {}
    for label, (name, knobs) in CASES.items():
        started = time.monotonic()
        (merged,) = METHODS[name].load()(base, [pair], knobs)
        lora = merged.lora()
        results[label] = {
            **{key: round(value, 4) for key, value in merged.report.items()},
            "rank": max(layer.rank for layer in lora.layers.values()),
            "bytes_fp16": n_bytes(lora) // 2,
            "s": round(time.monotonic() - started, 2),
        }
    return results


def dropped(base: Base) -> dict[str, Any]:
    """Each LoRA under its own prompt: alignment with its own pictures (DINO of subjects, CLIP-I of styles) and the root
    mean square difference of pixels in [0, 1] to the whole LoRA's samples, by share dropped; 1 is the base alone."""
    clip, dino = load_clip(pocket.scorer("clip")), load_dino(pocket.scorer("dino"))
    found: dict[str, Any] = {}
    for kind, names in STUDIED:
        for concept in (one for one in (*pocket.SUBJECTS, *pocket.STYLES) if one.name in names):
            lora = read_lora(concept.lora).lora
            own = [Image.open(path).convert("RGB") for path in concept.images]
            whole: np.ndarray | None = None
            found[concept.name] = {"kind": kind, "prompt": concept.prompt, "dropped": {}}
            for share in (*DROPPED, 1.0):
                left = without_smallest(lora, share) if share < 1 else LoRA({})
                requests = [Request(left, concept.prompt, seed) for seed in range(SAMPLES)]
                pictures = list(sample_requests(base, requests, steps=STEPS))
                pixels = np.stack([np.asarray(one, dtype=np.float64) / 255 for one in pictures])
                whole = pixels if whole is None else whole
                scores = score(pictures, style_images=own, subject_images=own, clip=clip, dino=dino)
                found[concept.name]["dropped"][str(share)] = {
                    "alignment": round(float(scores.subject if kind == "subjects" else scores.style), 4),
                    "pixels": round(float(np.sqrt(((pixels - whole) ** 2).mean())), 4),
                }
    return found


def meeting_after(base: Base, subject: str, style: str) -> dict[str, dict[str, float]]:
    """Interference by layer of one pair before and after merging, whose mergers scale columns."""
    concepts = {one.name: one for one in (*pocket.SUBJECTS, *pocket.STYLES)}
    sides = [concepts[name] for name in (subject, style)]
    loras = [read_lora(one.lora).lora for one in sides]
    cases = {"as they are": interference(*loras)}
    for name, knobs in (("ziplora", ZipLoRAKnobs()), ("ziplora-closed", ClosedKnobs())):
        observe = METHODS[name].calibration(knobs, 0)
        assert observe is not None
        calibrations = [
            calibrate(
                base, lora, one.prompt, [Image.open(path).convert("RGB") for path in one.images], observe, one.name
            )
            for lora, one in zip(loras, sides, strict=True)
        ]
        (merged,) = METHODS[name].load()(base, [Pair(*loras, *calibrations)], knobs)
        cases[f"after {name}"] = interference(merged.subject, merged.style)
    return cases


def main() -> None:
    torch.set_num_threads(1)
    base = load_base(WEIGHTS / "base")
    subjects, styles = shipped("subjects"), shipped("styles")
    results = {
        "inside": {"subjects": inside(subjects), "styles": inside(styles)},
        "meeting": meeting(subjects, styles),
        "dropped": dropped(base),
        "merges": merges(base, Pair(subjects["mushroom"], styles["retro"])),
    }
    cases = meeting_after(base, "mushroom", "retro")
    results["after"] = {name: round(mean(values.values()), 4) for name, values in cases.items()}
    plot_interference(cases, RESULTS.with_name("inside-interference.png"))
    scores = {
        name: {float(share): one["alignment"] for share, one in of["dropped"].items()}
        for name, of in results["dropped"].items()
    }
    plot_dropped(scores, RESULTS.with_name("inside-dropped.png"), "alignment with its own pictures")
    save(RESULTS, results)
    print(json.dumps({name: results[name] for name in ("dropped", "after", "merges")}, indent=1))


if __name__ == "__main__":
    main()
