"""A report as Markdown, for a note or a pull request, and as CSV, for whatever draws figures."""

import csv
import io
import math
from collections.abc import Iterator, Sequence

from service.intervals import Interval
from service.published import PUBLISHED, SOURCE
from service.report import MEASURES, Measure, Report, Row
from service.wording import some

ARCHITECTURES = {"sdxl": "SDXL 1.0", "sd15": "SD 1.5"}
LEGEND = (
    "Means over pairs (a pair's seeds are averaged first) with 95 % intervals from a bootstrap over subjects and over"
    " styles."
)


def markdown(report: Report) -> str:
    return "\n".join([*_head(report), *_table(report), *_differences(report), *_published(report), *_gaps(report), ""])


def _head(report: Report) -> Iterator[str]:
    yield f"# Methods compared: {report.title}"
    yield ""
    yield f"{LEGEND} {'; '.join(f'{one.label}: {one.about}' for one in report.measures)}."
    yield ""
    for note in report.notes:
        yield f"- {note}"
    if report.notes:
        yield ""


def _table(report: Report) -> Iterator[str]:
    measures = report.measures
    columns = ["method", "pairs, merges", *(one.label for one in measures)]
    if report.common:
        columns.append(f"first on (of {report.common} pairs)")
    columns += [f"published on {ARCHITECTURES.get(one, one)}" for one in report.architectures]
    yield _line(columns)
    yield _line(["---"] * len(columns))
    for row in report.rows:
        values = [interval_text(row.measures.get(one.name), one) for one in measures]
        first = [str(row.first_on) if "harmonic" in row.measures else "–"] if report.common else []
        published = [published_text(row.method, one) for one in report.architectures]
        yield _line([code(row.variant), f"{row.pairs}, {row.merges}", *values, *first, *published])
    yield ""


def _differences(report: Report) -> Iterator[str]:
    rows = [row for row in report.rows if row.minus]
    if not rows or report.against is None:
        return
    measures = [one for one in report.measures if any(one.name in row.minus for row in rows)]
    yield f"Difference to {code(report.against)} on the pairs and seeds that both have:"
    yield ""
    yield _line(["method", *(one.label for one in measures)])
    yield _line(["---"] * (1 + len(measures)))
    for row in rows:
        yield _line([code(row.variant), *(interval_text(row.minus.get(one.name), one, sign="+") for one in measures)])
    yield ""


def _published(report: Report) -> Iterator[str]:
    yield f"{SOURCE[0].upper()}{SOURCE[1:]}."
    absent = [name for name in PUBLISHED if name not in {row.method for row in report.rows}]
    for name in absent:
        told = ", ".join(
            f"{published_text(name, one)} on {ARCHITECTURES[one]}"
            for one in report.architectures
            if one in ARCHITECTURES
        )
        if told:
            yield f"- not in this catalog: {PUBLISHED[name].name}, published {told}"
    yield ""


def _gaps(report: Report) -> Iterator[str]:
    for row in report.rows:
        reasons: dict[str, list[str]] = {}
        for one in row.missing:
            reasons.setdefault(one.reason or "not merged", []).append(f"{one.subject}/{one.style}")
        for reason, pairs in reasons.items():
            yield f"- missing of {code(row.variant)}: {some(pairs)} ({escaped(reason)})"


def published_text(method: str, architecture: str) -> str:
    """`.699 / .420 / .303`, style, subject and text; a dash where the paper has none."""
    found = PUBLISHED[method].alignments.get(architecture) if method in PUBLISHED else None
    return " / ".join(f"{value:.3f}" for value in found) if found else "–"


def interval_text(interval: Interval | None, measure: Measure, sign: str = "") -> str:
    if interval is None:
        return "–"
    mean, low, high = (f"{value:{sign}.{measure.digits}f}" for value in (interval.mean, interval.low, interval.high))
    return mean if math.isnan(interval.low) else f"{mean} ({low} … {high})"


def code(text: str) -> str:
    return f"`{text.replace('`', '')}`".replace("|", "\\|").replace("\n", " ")


def escaped(text: str) -> str:
    return " ".join(text.split())


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


CSV_COLUMNS = ("source", "method", "measure", "against", "mean", "low", "high", "pairs", "merges")


def csv_text(report: Report) -> str:
    """One line per method and measure; `source` is `catalog`, or `published <base>` for the paper's figures."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in report.rows:
        writer.writerows(_csv_rows(row, report.against))
    for architecture in report.architectures:
        for name, published in PUBLISHED.items():
            for measure, value in zip(
                ("style", "subject", "text"), published.alignments.get(architecture, ()), strict=False
            ):
                writer.writerow([f"published {architecture}", name, measure, "", value, "", "", 32, ""])
    return out.getvalue()


def _csv_rows(row: Row, against: str | None) -> Iterator[list[object]]:
    for baseline, found in (("", row.measures), (against or "", row.minus)):
        for measure in MEASURES:
            if measure.name in found:
                interval = found[measure.name]
                bounds = [None if math.isnan(value) else value for value in (interval.low, interval.high)]
                yield [
                    "catalog", row.variant, measure.name, baseline, interval.mean, *bounds, interval.pairs, row.merges
                ]  # fmt: skip
