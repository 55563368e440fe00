"""From the bench's records to a table, comparisons and contact sheets."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from service.intervals import Interval, clustered
from ziplora.pocket import Concept, world

COLUMNS = {
    "harmonic": "style × subject",
    "style": "style",
    "subject": "subject",
    "text": "text",
    "both": "both right",
    "subject_right": "subject right",
    "style_right": "style right",
    "recontext_both": "with crown or ball: both right",
    "recontext_extra": "… it is there",
    "recontext_text": "… text",
    "subject_alone": "subject alone",
    "style_alone": "style alone",
    "eq3": "Eq. 3",
    "lost_subject": "lost of subject",
    "lost_style": "lost of style",
    "truth_clip": "truth, CLIP features",
    "truth_dino": "truth, subject features",
    "truth_pixels": "truth, pixels",
    "merge_cpu_s": "CPU s/pair",
    "calibration_cpu_s": "CPU s/LoRA",
}
COMPARED = ("harmonic", "both", "text", "recontext_both", "subject_alone", "style_alone", "truth_clip", "eq3")
SCALE = {"eq3": 1000.0}
SHARES = {"both", "subject_right", "style_right", "recontext_both", "recontext_extra", "subject_alone", "style_alone"}
SECONDS = {"merge_cpu_s", "calibration_cpu_s"}
LEGEND = """\
Means over pairs with 95 % intervals from a bootstrap over subjects and styles. runs: pairs × seeds; a pair's seeds are
averaged first. A pair works if both are right in at least half of its samples.

- style × subject: harmonic mean, pair by pair, of style alignment (CLIP image features, samples × style reference) and
  subject alignment (DINO's stand-in, samples × subject pictures). text: CLIP, samples × plain-word caption.
- both right: share of "subject in style" samples in which the recogniser names the true shape and the true style.
- subject alone, style alone: both named right on the LoRA's own prompt, so that what leaks over from the other LoRA
  counts as wrong.
- Eq. 3: both reconstruction terms, mean squares × 1000, on draws that no merge was fitted to. lost: each term over the
  mean square of the LoRA's own effect.
- truth: samples against renderings of the true picture (cosines; root mean square difference to the nearest of 32).
- `truth` is the renderer itself before the same judges; `method@a/b` weighs the subject by a and the style by b.
"""

Record = Mapping[str, Any]


def cells(records: Sequence[Record], variant: str, name: str) -> dict[tuple[str, str], float]:
    """The mean over seeds of each pair."""
    by_pair: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in records:
        if record["variant"] == variant and name in record["values"]:
            by_pair[record["subject"], record["style"]].append(record["values"][name] * SCALE.get(name, 1.0))
    return {pair: sum(values) / len(values) for pair, values in by_pair.items()}


def differences(records: Sequence[Record], variant: str, other: str, name: str) -> Interval:
    """`variant` − `other` on the pairs and seeds that both have."""
    keys = [{_key(r) for r in records if r["variant"] == one} for one in (variant, other)]
    common = [record for record in records if _key(record) in keys[0] & keys[1]]
    a, b = (cells(common, one, name) for one in (variant, other))
    return clustered({pair: a[pair] - b[pair] for pair in a.keys() & b.keys()})


def _key(record: Record) -> tuple[str, str, int]:
    return record["subject"], record["style"], record["seed"]


def summary(records: Sequence[Record], variants: Sequence[str], against: Sequence[str]) -> dict[str, Any]:
    """Per variant: an interval of every measure, the number of pairs and of runs (pairs × seeds), the pairs that work
    (both right in at least half of the samples), and differences to the variants in `against`."""
    table = {}
    for variant in variants:
        mine = [record for record in records if record["variant"] == variant]
        if not mine:
            continue
        both = cells(mine, variant, "both")
        table[variant] = {
            "pairs": len(both),
            "runs": len(mine),
            "seeds": sorted({record["seed"] for record in mine}),
            "pairs_that_work": sum(share >= 0.5 for share in both.values()),
            "measures": {name: clustered(found).as_dict() for name in COLUMNS if (found := cells(mine, variant, name))},
            "minus": {
                other: {
                    name: found.as_dict()
                    for name in COMPARED
                    if (found := differences(records, variant, other, name)).pairs
                }
                for other in against
                if other != variant and any(record["variant"] == other for record in records)
            },
        }
    return table


def markdown(table: Mapping[str, Any], title: str) -> str:
    lines = [f"# {title}", "", *LEGEND.splitlines(), ""]
    groups = (tuple(COLUMNS)[:7], tuple(COLUMNS)[7:12], tuple(COLUMNS)[12:])
    for group in groups:
        lines += ["| method | pairs, runs, pairs that work | " + " | ".join(COLUMNS[name] for name in group) + " |"]
        lines += ["|---|---|" + "---|" * len(group)]
        for variant, row in table.items():
            values = [_shown(name, row["measures"].get(name)) for name in group]
            lines.append(
                f"| `{variant}` | {row['pairs']}, {row['runs']}, {row['pairs_that_work']} | "
                + " | ".join(values)
                + " |"
            )
        lines.append("")
    for other in dict.fromkeys(other for row in table.values() for other in row["minus"]):
        lines += [f"Difference to `{other}` on the same pairs and seeds:", ""]
        lines += [
            "| method | " + " | ".join(COLUMNS[name] for name in COMPARED) + " |",
            "|---" * (len(COMPARED) + 1) + "|",
        ]
        for variant, row in table.items():
            if other in row["minus"]:
                values = [_shown(name, row["minus"][other].get(name), sign="+") for name in COMPARED]
                lines.append(f"| `{variant}` | " + " | ".join(values) + " |")
        lines.append("")
    return "\n".join(lines)


def _shown(name: str, interval: Mapping[str, float | None] | None, sign: str = "") -> str:
    if interval is None:
        return "–"
    mean, low, high = (
        None if interval[bound] is None else f"{interval[bound]:{sign}.{2 if name in SHARES else 3}f}"
        for bound in ("mean", "low", "high")
    )
    return f"{mean}" if low is None or name in SECONDS else f"{mean} ({low} … {high})"


def contact_sheet(
    pictures: Mapping[tuple[str, str], Image.Image], subjects: Sequence[Concept], styles: Sequence[Concept]
) -> Image.Image:
    """Rows are subjects, columns styles; the first row and column show reference pictures, empty cells are white."""
    blank = Image.new("RGB", (world.SIZE, world.SIZE), "white")
    head = [blank, *(_reference(style) for style in styles)]
    rows = [
        [_reference(subject), *(pictures.get((subject.name, style.name), blank) for style in styles)]
        for subject in subjects
    ]
    return world.sheet([head, *rows])


def _reference(concept: Concept) -> Image.Image:
    return Image.open(concept.images[0]).convert("RGB")


def first_of(strip: Path) -> Image.Image:
    """The first picture of a stored row of samples."""
    return Image.open(strip).convert("RGB").crop((0, 0, world.SIZE, world.SIZE))
