"""Best-of over a pocket grid, beside each of its candidates alone: `make bench-best`.

4 subjects × 3 styles through the service, merged by each method, by the best of them, and by the best with a score that
is good enough, so that costly methods run only where cheap ones score low. Mean style × subject (harmonic mean of both
alignments) with intervals, differences to each method, and what the pairs cost. Scores that choose are also the scores
that are reported, so best-of cannot lose by them; `other judge` is text alignment, which chooses nothing here.

An interrupted bench goes on where it was: the catalog is kept in build/best. Results: tests/bench/results/best_of.json.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from service.catalog import Catalog
from service.manifest import parse_manifest
from service.messages import JobResult, Tile, WorkerSettings
from service.plan import plan
from service.report import make_report, read_rows, result_of
from service.worker import Worker
from tests.bench.record import save
from ziplora import pocket

RESULTS = Path(__file__).parent / "results" / "best_of.json"
SUBJECTS, STYLES = ("mushroom", "rocket", "guitar", "key"), ("retro", "denim", "arcade")
METHODS = ["direct", "ziplora-closed", "ziplora-composed"]  # the cheapest first
GOOD_ENOUGH = 0.7
BEST = {"method": "best", "of": METHODS}
MERGES: list[Any] = [*METHODS, BEST, BEST | {"good_enough": GOOD_ENOUGH}]


def manifest_of(output: Path) -> bytes:
    def loras(concepts: tuple[pocket.Concept, ...], names: tuple[str, ...]) -> dict[str, Any]:
        return {
            one.name: {
                "lora": str(one.lora),
                "prompt": one.prompt,
                "trigger": one.trigger,
                "images": [str(path) for path in one.images],
            }
            for one in concepts
            if one.name in names
        }

    return json.dumps(
        {
            "base": str(pocket.path()),
            "subjects": loras(pocket.SUBJECTS, SUBJECTS),
            "styles": loras(pocket.STYLES, STYLES),
            "merge": MERGES,
            "samples": {"prompts": ["a {subject} in {style}"], "seeds": [0, 1], "steps": 20},
            "scores": {kind: str(pocket.scorer(kind)) for kind in ("clip", "dino")},
            "output": str(output),
        }
    ).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/best"))
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long; run it again to go on")
    given = parser.parse_args()
    until = time.monotonic() + given.seconds
    given.work.mkdir(parents=True, exist_ok=True)
    output = (given.work / "catalog").absolute()
    planned = plan(parse_manifest(manifest_of(output), name="best_of.yaml", directory=str(given.work.absolute())))
    planned.check()
    catalog = Catalog(output)
    if planned.left:
        settings = WorkerSettings(str(output), str(pocket.path()), None, cache_dir=str(given.work / "cache"))
        worker = Worker(settings)
        for number, job in enumerate(planned.left):
            if time.monotonic() > until:
                print(f"{len(planned.left) - number} of {len(planned.jobs)} left: run it again to go on")
                return
            for message in [*worker.work(Tile((job,))), *worker.work(Tile(()))]:
                if isinstance(message, JobResult) and message.status != "committed":
                    raise SystemExit(f"{job.pair} {job.method}: {message.reason}")
            print(f"{number + 1}/{len(planned.left)} {job.pair} {job.method}", flush=True)
    rows, given_up, _ = read_rows(catalog)
    results = [result_of(row) for row in rows]
    by_method = {one: make_report(results, given_up, against=one) for one in METHODS}
    report = by_method["direct"]
    figures = {
        "settings": {
            "subjects": SUBJECTS,
            "styles": STYLES,
            "merges": MERGES,
            "samples": {"seeds": [0, 1], "steps": 20, "prompt": "a {subject} in {style}"},
        },
        "methods": {
            row.variant: {
                "pairs": row.pairs,
                **{name: interval.as_dict() for name, interval in row.measures.items()},
                "minus": {
                    against: next(one for one in made.rows if one.variant == row.variant).minus["harmonic"].as_dict()
                    for against, made in by_method.items()
                    if against != row.variant
                },
            }
            for row in report.rows
        },
        "took": [note for note in report.notes if " took " in note],
        "candidates_tried": {
            name: sum(len(entry.report["best"]["candidates"]) for entry in catalog.entries() if _is(entry, enough))
            for name, enough in (("best", None), (f"best, good enough {GOOD_ENOUGH}", GOOD_ENOUGH))
        },
    }
    save(RESULTS, figures)
    for row in report.rows:
        told = ", ".join(f"{name} {row.measures[name].mean:.3f}" for name in ("harmonic", "text", "seconds"))
        print(f"{row.variant}: {told}")
    print(json.dumps({name: figures[name] for name in ("took", "candidates_tried")}, indent=1))


def _is(entry: Any, good_enough: float | None) -> bool:
    return entry.method == "best" and entry.job["knobs"]["good_enough"] == good_enough


if __name__ == "__main__":
    main()
