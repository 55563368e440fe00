"""How good are merges? Every method on the pocket world's grid of subjects × styles, where the true pictures are known.

    python -m tests.bench.quality [--pairs N] [--seeds N] [--methods M …] [--minutes N]
    python -m tests.bench.quality --sweep
    python -m tests.bench.quality --composition

A method is a name in METHODS, with knobs and weights where they differ from the defaults: `ziplora:learning_rate=0.03`,
`direct@0.7` (both LoRAs at .7), `direct@1/0` (the subject's alone); `truth` is the renderer. `styledrop` takes
`--masked-base`. Every measured pair is
appended to records.jsonl in the work directory, so an interrupted run goes on where it was, and a later one adds to it.
Results: quality.json, quality.md and one contact sheet per method. `--sweep` tries what the paper leaves open, on pairs
fixed beforehand; `--composition` what could make merges compose better, on the grid's first four styles.
"""

import argparse
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.bench.measuring import machine
from tests.bench.quality_measures import TRUTH, Cell, Measured, Settings, Stand, Variant, digest_of, parse_variant
from tests.bench.quality_report import contact_sheet, first_of, markdown, summary
from ziplora import pocket
from ziplora.methods import METHODS
from ziplora.pocket import world
from ziplora.sample import SCHEDULERS

BASELINES = ("direct@0.5", "direct@0.7", "direct@1/0", "direct@0/1", TRUTH.name)
AGAINST = ("direct", "ziplora")
TITLES = {
    "quality": "Quality of merges in the pocket world",
    "sweep": "What the paper leaves open",
    "composition": "What could make merges compose better",
}
SWEEP_PAIRS = ((0, 0), (2, 1), (4, 2), (6, 3))
"""Places in SUBJECTS and STYLES, chosen before there were any results."""


def sweep_variants() -> list[str]:
    """One thing at a time around the defaults, and the pairs of settings that act on each other."""
    knobs = [
        {},
        # how far the mergers can move: Adam takes about `learning_rate` per step
        {"learning_rate": 5e-5},
        {"learning_rate": 0.003},
        {"learning_rate": 0.03},
        {"learning_rate": 0.1},
        {"steps": 25},
        {"steps": 50},
        {"steps": 200},
        {"steps": 25, "learning_rate": 0.03},
        {"steps": 200, "learning_rate": 0.03},
        # the third term of Eq. 3
        {"penalty_weight": 0},
        {"penalty_weight": 0, "learning_rate": 0.03},
        {"penalty_weight": 0, "learning_rate": 0.03, "steps": 200},
        {"penalty_weight": 0.1},
        {"penalty_weight": 1},
        {"penalty": "columns", "penalty_weight": 0.001},
        {"penalty": "columns"},
        {"penalty": "columns", "penalty_weight": 0.1},
        {"penalty": "literal", "penalty_weight": 0.0001},
        {"penalty": "literal"},
        # the first two
        {"reconstruction": "norm"},
        {"reconstruction": "norm", "penalty_weight": 0},
        {"reconstruction": "norm", "penalty": "columns"},
        {"reconstruction": "norm", "penalty": "literal"},
        {"reconstruction": "norm", "penalty_weight": 0, "learning_rate": 0.03},
        {"noise": "shared"},
        {"batch": 4},
        {"draws": 16},
        {"draws": 64},
    ]
    texts = [",".join(f"{name}={value}" for name, value in one.items()) for one in knobs]
    return ["direct", *("ziplora" + (f":{text}" if text else "") for text in texts)]


def composition_variants() -> list[str]:
    """Settings fixed before there were any results. ziplora with 150 steps has as many passes as ziplora-composed,
    which has a third term; what differs of the closed forms is H, the weights of the outputs."""
    return [
        "direct",
        "ziplora",
        "ziplora:steps=150",
        "ziplora:layers=q-out",
        # γ, the target, the latents of the combined term
        "ziplora-composed",
        "ziplora-composed:combined_weight=0.25",
        "ziplora-composed:combined_weight=4",
        "ziplora-composed:combined_target=sum",
        "ziplora-composed:combined_draws=8",
        "ziplora-composed:combined_draws=100",
        "ziplora-composed:layers=q-out",
        # H
        "ziplora-closed",
        "ziplora-closed:output_weights=true",
        "ziplora-matrix",
        "ziplora-matrix:output_weights=false",
        "ziplora-refined",
    ]


class Records:
    """What has been measured, one line of JSON for each pair, seed and variant, and the sampled pictures beside it.

    A record counts only for the settings, weights and knobs that it was made with."""

    def __init__(self, work: Path, settings: Settings) -> None:
        self.work, self.file, self.settings = work, work / "records.jsonl", settings
        self.models = digest_of(pocket.path(), pocket.WEIGHTS / "scorers")
        self.concepts = {c.name: digest_of(c.lora, *c.images) for c in (*pocket.SUBJECTS, *pocket.STYLES)}
        work.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.all = [record for line in lines if (record := _parsed(line)) is not None]

    def made_with(self, variant: Variant, subject: str, style: str) -> str:
        parts = [asdict(self.settings), self.models, variant.as_dict(), self.concepts[subject], self.concepts[style]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def of(self, variant: Variant) -> list[dict[str, Any]]:
        return [
            record | {"variant": variant.name}
            for record in self.all
            if {record["subject"], record["style"]} <= self.concepts.keys()
            and record["made_with"] == self.made_with(variant, record["subject"], record["style"])
        ]

    def append(self, variant: Variant, cell: Cell, measured: Measured) -> None:
        record = {
            "variant": variant.name,
            "made_with": self.made_with(variant, cell.subject.name, cell.style.name),
            "subject": cell.subject.name,
            "style": cell.style.name,
            "seed": cell.seed,
            "values": measured.values,
            "report": dict(measured.report),
        }
        strip = self.strip(variant, cell.subject.name, cell.style.name, cell.seed)
        strip.parent.mkdir(parents=True, exist_ok=True)
        _side_by_side(measured.pictures).save(strip)
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.all.append(record)

    def strip(self, variant: Variant, subject: str, style: str, seed: int) -> Path:
        return self.work / "pictures" / self.made_with(variant, subject, style) / f"{subject}-{style}-{seed}.png"


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # the last line of a run that was killed while writing
        return None


def _side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    row = Image.new("RGB", (world.SIZE * len(pictures), world.SIZE))
    for i, picture in enumerate(pictures):
        row.paste(picture, (i * world.SIZE, 0))
    return row


def grid(n_subjects: int | None, n_styles: int | None) -> list[tuple[int, int]]:
    """All places of the grid along its diagonals, so that any first N of them are spread over rows and columns."""
    rows = len(pocket.SUBJECTS[:n_subjects])
    columns = len(pocket.STYLES[:n_styles])
    return [(i, (i + shift) % columns) for shift in range(columns) for i in range(rows)]


def names_of(pairs: Sequence[tuple[int, int]]) -> set[tuple[str, str]]:
    subjects, styles = (dict(enumerate(concept.name for concept in some)) for some in (pocket.SUBJECTS, pocket.STYLES))
    return {(subjects[i], styles[j]) for i, j in pairs if i in subjects and j in styles}


def blocks(
    pairs: Sequence[tuple[int, int]], seeds: Sequence[int], variants: Sequence[Variant], records: Records, size: int
) -> Iterator[tuple[Variant, list[Cell]]]:
    """What is still to be measured. Seeds outside, variants inside: wherever a run ends, its variants can be
    compared."""
    done = {
        (variant.name, record["subject"], record["style"], record["seed"])
        for variant in variants
        for record in records.of(variant)
    }
    for seed in seeds:
        for start in range(0, len(pairs), size):
            cells = [Cell(pocket.SUBJECTS[i], pocket.STYLES[j], seed) for i, j in pairs[start : start + size]]
            for variant in variants:
                todo = [c for c in cells if (variant.name, c.subject.name, c.style.name, c.seed) not in done]
                if todo:
                    yield variant, todo


def measure(
    options: argparse.Namespace, pairs: Sequence[tuple[int, int]], variants: Sequence[Variant], records: Records
) -> None:
    started = time.monotonic()
    todo = list(blocks(pairs, range(options.seeds), variants, records, options.side_by_side))
    stand = Stand(records.settings) if todo else None
    for number, (variant, cells) in enumerate(todo, 1):
        minutes = (time.monotonic() - started) / 60
        if options.minutes is not None and minutes > options.minutes:
            print(f"{options.minutes} minutes are over: {len(todo) - number + 1} of {len(todo)} blocks not measured")
            return
        assert stand is not None
        for cell, measured in zip(cells, stand.measure(variant, cells), strict=True):
            records.append(variant, cell, measured)
        print(
            f"{number}/{len(todo)} {minutes:.1f} min: seed {cells[0].seed}, {len(cells)} pairs, {variant.name}",
            flush=True,
        )


def report(
    options: argparse.Namespace, pairs: Sequence[tuple[int, int]], variants: Sequence[Variant], records: Records
) -> None:
    names, swept = names_of(pairs), names_of(SWEEP_PAIRS)
    found = [
        record
        for variant in variants
        for record in records.of(variant)
        if (record["subject"], record["style"]) in names and record["seed"] < options.seeds
    ]
    kind = next((name for name in ("sweep", "composition") if getattr(options, name)), "quality")
    table = summary(found, [variant.name for variant in variants], AGAINST)
    apart = [record for record in found if (record["subject"], record["style"]) not in swept]
    result = {
        "command": " ".join(["python -m tests.bench.quality", *_without_places(sys.argv[1:])]),
        "machine": machine(),
        "settings": asdict(records.settings) | {"pairs": len(pairs), "seeds": options.seeds},
        "sha256": {"models": records.models, "concepts": records.concepts},
        "variants": {variant.name: variant.as_dict() for variant in variants},
        "table": table,
        # settings chosen on the sweep's pairs must show themselves on others
        "table_without_sweep_pairs": None if options.sweep else summary(apart, list(table), AGAINST),
        "records": [
            {key: record[key] for key in ("variant", "subject", "style", "seed", "values")} for record in found
        ],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{kind}.json").write_text(json.dumps(result, indent=1) + "\n")
    title = TITLES[kind]
    (options.out / f"{kind}.md").write_text(markdown(table, title))
    print(markdown(table, title))
    if kind == "quality":
        sheets(options.out, variants, found, records)


def _without_places(arguments: Sequence[str]) -> list[str]:
    return [Path(one).name if one.startswith("/") else one for one in arguments]


def sheets(out: Path, variants: Sequence[Variant], found: Sequence[dict[str, Any]], records: Records) -> None:
    for variant in variants:
        mine = [r for r in found if r["variant"] == variant.name and r["seed"] == 0]
        if mine:
            pictures = {
                (r["subject"], r["style"]): first_of(records.strip(variant, r["subject"], r["style"], 0)) for r in mine
            }
            rows = [s for s in pocket.SUBJECTS if any(r["subject"] == s.name for r in mine)]
            columns = [s for s in pocket.STYLES if any(r["style"] == s.name for r in mine)]
            name = re.sub(r"[^A-Za-z0-9.]+", "-", variant.name)
            contact_sheet(pictures, rows, columns).save(out / f"quality-{name}.png", optimize=True)


def merges(method: str) -> bool:
    """Not one that trains: that takes minutes for a pair or a concept, and settings of its own in the pocket world,
    such as joint:rank=8,steps=600,batch=4,lr=4e-4 and styledrop:rank=16,steps=400,batch=4,lr=4e-3,text=0."""
    return not METHODS[method].trains


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = Settings()
    parser.add_argument("--pairs", type=int, help="the first N along the grid's diagonals")
    parser.add_argument("--subjects", type=int, help="only the first N")
    parser.add_argument("--styles", type=int, help="only the first N")
    parser.add_argument("--seeds", type=int, help="of merges and samples (3; in a study 1)")
    parser.add_argument(
        "--methods", nargs="+", metavar="M", help="default: all of METHODS that do not train, and baselines"
    )
    parser.add_argument(
        "--masked-base", type=Path, help="the base of styledrop: ziplora.pocket.train_amused's DIR/base"
    )
    studies = parser.add_mutually_exclusive_group()
    studies.add_argument("--sweep", action="store_true")
    studies.add_argument("--composition", action="store_true")
    parser.add_argument("--minutes", type=float, help="start no block of pairs after this")
    parser.add_argument(
        "--images", type=int, default=usual.images, help="of the combined prompt, for each pair and seed"
    )
    parser.add_argument("--scheduler", default=usual.scheduler, choices=SCHEDULERS)
    parser.add_argument("--steps", type=int, default=usual.steps, help="of sampling")
    parser.add_argument("--guidance", type=float, default=usual.guidance)
    parser.add_argument("--side-by-side", type=int, default=8, help="pairs merged in one go")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if not pocket.SUBJECTS or not pocket.STYLES:
        parser.error("the pocket world's weights are not there: see ziplora/pocket/README.md")
    torch.set_num_threads(options.threads)
    options.seeds = options.seeds or (1 if options.sweep or options.composition else 3)
    defaults = [*filter(merges, METHODS), *BASELINES]
    if options.sweep or options.composition:
        defaults = sweep_variants() if options.sweep else composition_variants()
    variants = [parse_variant(text, options.masked_base) for text in options.methods or defaults]
    pairs = grid(options.subjects, options.styles or (4 if options.composition else None))
    if options.sweep:
        pairs = [pair for pair in SWEEP_PAIRS if pair in pairs]
    pairs = pairs[: options.pairs]
    records = Records(options.work, Settings(options.scheduler, options.steps, options.guidance, options.images))
    measure(options, pairs, variants, records)
    report(options, pairs, variants, records)


if __name__ == "__main__":
    main()
