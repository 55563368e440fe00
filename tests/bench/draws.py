"""How many draws, and how many rows of output weights, the closed forms need: held-out Eq. 3 on the pocket world.

    python -m tests.bench.draws

Calibration is most of what a closed form costs on a grid, and linear in both numbers. Every merge is judged on the
same 48 held-out draws of each LoRA; the fitted draws differ by seed.
"""

import argparse
import statistics
import time
from typing import Any

import torch

import ziplora.calibrate
from tests.bench.measuring import RESULTS
from tests.bench.quality_measures import Cell, Settings, Stand, parse_variant
from tests.bench.record import save
from ziplora import pocket
from ziplora.calibrate import WEIGHT_ROWS
from ziplora.methods import METHODS

DRAWS = {"ziplora-closed": (4, 8, 16, 32, 64), "ziplora-matrix": (8, 16, 32)}
ROWS = (1, 2, 4, 6, 8)  # of output weights, for ziplora-matrix


def measure(stand: Stand, cells: list[Cell], name: str, draws: int, rows: int) -> dict[str, Any]:
    """Mean over the cells of the held-out loss, by seed, and CPU seconds of observing one LoRA."""
    ziplora.calibrate.WEIGHT_ROWS = rows
    variant = parse_variant(f"{name}:draws={draws}")
    by_seed: dict[int, list[float]] = {}
    started = time.process_time()
    seconds = []
    for cell in cells:
        pairs, spent = stand._pairs(variant, [cell])
        seconds.append(spent)
        merged = METHODS[name].load()(stand.base, pairs, variant.knobs)
        by_seed.setdefault(cell.seed, []).append(1000 * stand._held_out([cell], merged)[0]["eq3"])
    # another number of rows is the same setting to the stand
    stand.calibrations = {key: kept for key, kept in stand.calibrations.items() if key[1].moments == "none"}
    means = [statistics.mean(found) for found in by_seed.values()]
    return {
        "method": name,
        "draws": draws,
        "rows": rows if name == "ziplora-matrix" else 0,
        "eq3_x1000": statistics.mean(means),
        "by_seed": means,
        "calibration_cpu_s": statistics.median(seconds),
        "cpu_s": time.process_time() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=8)
    parser.add_argument("--styles", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    stand = Stand(Settings())
    cells = [
        Cell(subject, style, seed)
        for seed in range(options.seeds)
        for subject in pocket.SUBJECTS[: options.subjects]
        for style in pocket.STYLES[: options.styles]
    ]
    rows = []
    for name, known in DRAWS.items():
        for draws in known:
            for n in ROWS if name == "ziplora-matrix" and draws == 16 else (WEIGHT_ROWS,):
                rows.append(measure(stand, cells, name, draws, n))
                print({key: value for key, value in rows[-1].items() if key != "by_seed"}, flush=True)
    save(RESULTS / "draws.json", {"pairs": len(cells) // options.seeds, "rows": rows})


if __name__ == "__main__":
    main()
