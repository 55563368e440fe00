"""Methods held against each other over a catalog: means with intervals, differences on common pairs, what is missing.

Values only, from rows of the index or entries. Scores are those that the merges were given when they were made; a
method that the catalog does not hold is not in the report, and what was not scored has no figure.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from service.choose import BEST, harmonic
from service.errors import AccessDenied, BadInput, NotFound
from service.intervals import Interval, clustered
from service.jobs import MASKED_ARCHITECTURES

if TYPE_CHECKING:
    from service.catalog import Catalog

Pair = tuple[str, str]  # subject id, style id
NO_VALUE = float("nan")
DEFAULT_BASELINE = "direct"


@dataclass(frozen=True, slots=True)
class Measure:
    """`better`: +1 where more is better, −1 where less is; `digits` after the point."""

    name: str
    label: str
    about: str
    better: int
    digits: int = 3


MEASURES: tuple[Measure, ...] = (
    Measure("harmonic", "style × subject", "harmonic mean of style and subject alignment, merge by merge", 1),
    Measure("style", "style", "style alignment: CLIP image features, samples × style images", 1),
    Measure("subject", "subject", "subject alignment: DINO features, samples × subject images", 1),
    Measure("text", "text", "text alignment: CLIP, samples × their prompts", 1),
    Measure(
        "eq3", "Eq. 3 × 1000", "both reconstruction terms of Eq. 3 at the last step, of methods that iterate it", -1, 2
    ),
    Measure("merge_s", "merge s", "seconds of the merge itself, which pairs merged side by side share", -1, 2),
    Measure("seconds", "all s", "seconds of all stages: reading, calibration, merge, samples, scores", -1, 1),
)
JUDGED = tuple(measure.name for measure in MEASURES[:4])


@dataclass(frozen=True, slots=True)
class Result:
    """One merge as a report sees it; `setting` is equal for merges that were sampled and judged alike, `asked` for
    those that were to show the same and were judged alike, on whatever base."""

    job_id: str
    subject: str
    style: str
    method: str
    knobs: str  # JSON
    seed: int
    values: Mapping[str, float]  # by name of MEASURES, those that there are
    setting: str
    asked: str
    architecture: str
    shown: bool  # whether it has a preview
    merged_by: str = ""  # the method itself, or the one that `best` chose

    @property
    def own_base(self) -> bool:
        """Whether its method works on a base of its own, whatever base the others have."""
        return self.architecture in MASKED_ARCHITECTURES


@dataclass(frozen=True, slots=True)
class Missing:
    """A pair of the grid that a method has not merged; `reason`: why it was given up, None if it was never tried."""

    subject: str
    style: str
    reason: str | None


@dataclass(frozen=True, slots=True)
class Row:
    """One method. `minus`: differences to the baseline on the pairs and seeds that both have. `first_on`: pairs, of the
    `common` ones that every scored method has, on which its style × subject is the highest."""

    variant: str
    method: str
    pairs: int
    merges: int
    seeds: tuple[int, ...]
    measures: Mapping[str, Interval]
    minus: Mapping[str, Interval]
    missing: tuple[Missing, ...]
    unscored: int
    first_on: int
    won: Mapping[str, int]  # merges by the method that made them: of `best`, which of its candidates


@dataclass(frozen=True, slots=True)
class Report:
    """`cells`: by pair and variant the merge of the lowest seed, for contact sheets; `notes`: what one must know."""

    title: str
    digest: str
    rows: tuple[Row, ...]
    against: str | None
    pairs: tuple[Pair, ...]
    cells: Mapping[Pair, Mapping[str, Result]]
    architectures: tuple[str, ...]
    common: int
    notes: tuple[str, ...]

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Those of which some method has a figure."""
        return tuple(one for one in MEASURES if any(one.name in row.measures for row in self.rows))


# From a catalog


def read_rows(catalog: "Catalog") -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]], str]:
    """Rows of all merges, what was given up, and the catalog's digest. By the index, which is brought up to date; from
    the entries themselves where nothing may be written."""
    from service import index, index_rows

    try:
        summary = catalog.build_index()
    except AccessDenied:
        rows: list[Mapping[str, Any]] = [index_rows.row(entry) for entry in catalog.entries()]
        given_up: list[Mapping[str, Any]] = [
            {"subject": one.job["subject"]["id"], "style": one.job["style"]["id"], "method": one.job["method"]}
            | {"reason": one.reason}
            for one in catalog.failures()
        ]
        return rows, given_up, ""
    found = (index.read_rows(catalog.store, shard, COLUMNS).to_pylist() for shard in summary.shards)
    return [row for own in found for row in own], list(summary.given_up), summary.digest


COLUMNS = [
    *(
        "job_id",
        "subject",
        "style",
        "method",
        "merged_by",
        "seed",
        "knobs",
        "architecture",
        "preview_key",
        "job",
        "report",
    ),
    *("style_alignment", "subject_alignment", "text_alignment", "seconds", "merge_seconds"),
]


def result_of(row: Mapping[str, Any]) -> Result:
    """From a row of the index (see index_rows.SCHEMA)."""
    job, report = json.loads(row["job"]), json.loads(row["report"])
    style, subject, text = (row[f"{name}_alignment"] for name in ("style", "subject", "text"))
    values = {
        "harmonic": None if style is None or subject is None else harmonic(style, subject),
        "style": style,
        "subject": subject,
        "text": text,
        "eq3": _reconstruction(report.get("merge")),
        "merge_s": row["merge_seconds"],
        "seconds": row["seconds"],
    }
    return Result(
        job_id=row["job_id"],
        subject=row["subject"],
        style=row["style"],
        method=row["method"],
        knobs=row["knobs"],
        seed=row["seed"] or 0,
        values={name: value for name, value in values.items() if value is not None},
        setting=_setting(job),
        asked=_asked(job),
        architecture=row["architecture"] or "",
        shown=row["preview_key"] is not None,
        merged_by=row["merged_by"],
    )


def _reconstruction(merge: Any) -> float | None:
    """Both terms of Eq. 3 at the last step, × 1000; None where the method reports none."""
    last = [merge.get(f"{role}_loss") for role in ("subject", "style")] if isinstance(merge, dict) else []
    ends = [one[-1] for one in last if isinstance(one, list) and one and isinstance(one[-1], float)]
    return 1000 * sum(ends) if len(ends) == 2 else None


def _setting(job: Mapping[str, Any]) -> str:
    """What merges must have in common to be compared: base, samples and judges. Other style strengths than 1 are not
    judged, so they may differ."""
    samples = job.get("samples")
    sampled = {k: v for k, v in samples.items() if k != "style_strengths"} if isinstance(samples, dict) else None
    return _short_digest([job.get("base"), sampled, job.get("scorers")])


def _asked(job: Mapping[str, Any]) -> str:
    """What merges on different bases must have in common to be compared: prompts, seeds and judges."""
    samples = job.get("samples")
    shown = [samples.get(name) for name in ("prompts", "seeds")] if isinstance(samples, dict) else None
    return _short_digest([shown, job.get("scorers")])


def _short_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


# The report


def make_report(
    results: Sequence[Result],
    given_up: Iterable[Mapping[str, Any]] = (),
    *,
    title: str = "",
    digest: str = "",
    against: str | None = None,
) -> Report:
    """`against`: the baseline, a method or one of its variants; if None, `direct` where there is one. NotFound when
    there is nothing to report; BadInput when no method, or several, are called like the baseline."""
    if not results:
        raise NotFound("there are no merges to report on: run a manifest first, or take wider patterns")
    named = variant_names((one.method, one.knobs) for one in results)
    by_variant: dict[str, list[Result]] = defaultdict(list)
    for one in results:
        by_variant[named[one.method, one.knobs]].append(one)
    baseline = _baseline(by_variant, against)
    failures = list(given_up)
    pairs = sorted({(one.subject, one.style) for one in results} | {(one["subject"], one["style"]) for one in failures})
    table = {variant: {name: _cells(own, name) for name in JUDGED} for variant, own in by_variant.items()}
    first, common = _firsts({variant: cells["harmonic"] for variant, cells in table.items() if cells["harmonic"]})
    order = sorted(by_variant, key=lambda variant: (variant != baseline, _rank(table[variant]), variant))
    rows = [
        _row(variant, by_variant[variant], by_variant.get(baseline or ""), pairs, failures, first[variant])
        for variant in order
    ]
    return Report(
        title=title,
        digest=digest,
        rows=tuple(rows),
        against=baseline,
        pairs=tuple(pairs),
        cells=_sheet(by_variant),
        architectures=tuple(sorted({one.architecture for one in results if one.architecture and not one.own_base})),
        common=common,
        notes=tuple(_notes(results, rows)),
    )


def variant_names(methods: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """(method, knobs as JSON) → the method's name, with the knobs that tell its variants apart where it has several."""
    knobs: dict[str, dict[str, dict[str, Any]]] = {}
    for method, text in methods:
        if text not in knobs.setdefault(method, {}):
            given = json.loads(text)
            knobs[method][text] = given if isinstance(given, dict) else {}
    names = {}
    for method, variants in knobs.items():
        every = {name for given in variants.values() for name in given}
        differing = [
            name for name in sorted(every) if len({json.dumps(given.get(name)) for given in variants.values()}) > 1
        ]
        for text, given in variants.items():
            told = ", ".join(f"{name} {_plain(given.get(name))}" for name in differing)
            names[method, text] = f"{method} ({told})" if len(variants) > 1 else method
    return names


def _plain(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(one, dict) and "method" in one for one in value):
        return "/".join(str(one["method"]) for one in value)  # `best`'s candidates
    return value if isinstance(value, str) else json.dumps(value)


def _baseline(by_variant: Mapping[str, Sequence[Result]], against: str | None) -> str | None:
    wanted = against or DEFAULT_BASELINE
    if wanted in by_variant:
        return wanted
    called = sorted(variant for variant, own in by_variant.items() if own[0].method == wanted)
    if len(called) == 1:
        return called[0]
    if against is None:
        return None
    known = ", ".join(sorted(by_variant))
    which = f"{against} has the variants {', '.join(called)}" if called else f"no merge is by {against}"
    raise BadInput(f"{which}; hold the others against one of: {known}")


def _cells(results: Iterable[Result], name: str) -> dict[Pair, float]:
    """The mean over a pair's seeds."""
    found: dict[Pair, list[float]] = defaultdict(list)
    for one in results:
        if name in one.values:
            found[one.subject, one.style].append(one.values[name])
    return {pair: sum(values) / len(values) for pair, values in found.items()}


def _rank(cells: Mapping[str, Mapping[Pair, float]]) -> float:
    own = cells["harmonic"].values()
    return -sum(own) / len(own) if own else 0.0


def _firsts(cells: Mapping[str, Mapping[Pair, float]]) -> tuple[Counter[str], int]:
    """On how many of the pairs that all have each is the highest (of equals, all are), and how many those pairs are."""
    common = set.intersection(*(set(one) for one in cells.values())) if cells else set()
    first: Counter[str] = Counter()
    for pair in common:
        best = max(one[pair] for one in cells.values())
        first.update(variant for variant, one in cells.items() if one[pair] == best)
    return first, len(common)


def _row(
    variant: str,
    results: Sequence[Result],
    baseline: Sequence[Result] | None,
    pairs: Sequence[Pair],
    failures: Sequence[Mapping[str, Any]],
    first_on: int,
) -> Row:
    mine = {(one.subject, one.style) for one in results}
    method = results[0].method
    reasons = {(one["subject"], one["style"]): str(one["reason"]) for one in failures if one["method"] == method}
    measures = {one.name: clustered(cells) for one in MEASURES if (cells := _cells(results, one.name))}
    minus = {}
    if baseline is not None and baseline is not results:
        for name in measures:
            found = differences(results, baseline, name)
            if found.pairs:
                minus[name] = found
    return Row(
        variant=variant,
        method=method,
        pairs=len(mine),
        merges=len(results),
        seeds=tuple(sorted({one.seed for one in results})),
        measures=measures,
        minus=minus,
        missing=tuple(Missing(*pair, reasons.get(pair)) for pair in pairs if pair not in mine),
        unscored=sum("harmonic" not in one.values for one in results),
        first_on=first_on,
        won=dict(Counter(one.merged_by for one in results).most_common()),
    )


def differences(results: Sequence[Result], baseline: Sequence[Result], name: str) -> Interval:
    """`results` − `baseline` on the pairs, seeds and settings that both have; where either has a base of its own, on
    those that were to show the same."""
    across = any(one.own_base for one in (*results, *baseline))

    def key(one: Result) -> tuple[str, str, int, str]:
        return one.subject, one.style, one.seed, one.asked if across else one.setting

    keys = [{key(one) for one in group if name in one.values} for group in (results, baseline)]
    common = keys[0] & keys[1]
    a, b = (_cells([one for one in group if key(one) in common], name) for group in (results, baseline))
    return clustered({pair: a[pair] - b[pair] for pair in a})


def _sheet(by_variant: Mapping[str, Iterable[Result]]) -> dict[Pair, dict[str, Result]]:
    found: dict[Pair, dict[str, Result]] = defaultdict(dict)
    for variant, results in by_variant.items():
        for one in sorted(results, key=lambda one: (-one.seed, one.job_id)):
            found[one.subject, one.style][variant] = one
    return dict(found)


def _notes(results: Sequence[Result], rows: Sequence[Row]) -> Iterable[str]:
    settings = len({one.setting for one in results if not one.own_base})
    for method in sorted({one.method for one in results if one.own_base}):
        yield (
            f"{method} samples on a base of its own, at that base's size; its seconds are without its adapters, which"
            " are trained once for all pairs"
        )
    if settings > 1:
        yield (
            f"these merges were sampled or judged in {settings} different ways (base, samples, scorers), which the"
            " means mix; differences are of merges made alike"
        )
    for row in rows:
        given_up = sum(one.reason is not None for one in row.missing)
        if row.missing:
            of = f"{len(row.missing)} of {row.pairs + len(row.missing)}"
            yield f"{row.variant}: {of} pairs missing, {given_up} given up"
        if row.method == BEST:
            yield f"{row.variant} took {', '.join(f'{name} {n} times' for name, n in row.won.items())}"
        if row.unscored:
            yield f"{row.variant}: {row.unscored} of {row.merges} merges have no style and subject score"
    if min(len({one.subject for one in results}), len({one.style for one in results})) < 2:
        yield "no intervals: they take two subjects and two styles at least"
