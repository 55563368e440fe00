"""What the shipped LoRAs look like inside, and what the training-free merges make of them: `make bench-inside`.

The paper's two observations (arXiv 2311.13600v2) on the pocket world's LoRAs: how much of ΔW is small, and how much two
LoRAs meet column by column; then, for every training-free method, what its factorisation leaves out and its seconds.
Weights only, so a minute on one core. Results: tests/bench/results/inside.json.
"""

import json
import time
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from tests.bench.record import save
from ziplora.base import Base, load_base
from ziplora.baseline_knobs import DareKnobs, NullSpaceKnobs, PruneKnobs, SvdKnobs, TiesKnobs
from ziplora.diagnose import alignment, interference, sparsity
from ziplora.formats import read_lora
from ziplora.lora import LoRA, n_bytes
from ziplora.merged import Pair
from ziplora.methods import METHODS

WEIGHTS = Path(__file__).parents[2] / "ziplora" / "pocket" / "weights"
RESULTS = Path(__file__).parent / "results" / "inside.json"
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


def main() -> None:
    torch.set_num_threads(1)
    subjects, styles = shipped("subjects"), shipped("styles")
    results = {
        "inside": {"subjects": inside(subjects), "styles": inside(styles)},
        "meeting": meeting(subjects, styles),
        "merges": merges(load_base(WEIGHTS / "base"), Pair(subjects["mushroom"], styles["retro"])),
    }
    save(RESULTS, results)
    print(json.dumps(results["merges"], indent=1))


if __name__ == "__main__":
    main()
