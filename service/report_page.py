"""The comparison as a page: one HTML file that asks nothing of any other host. Beside a catalog (`report.html`) its
pictures are the gallery's thumbnails; elsewhere they are inside.

Ids, prompts and reasons are whatever a user wrote: here they are JSON in a data block, in the page only ever text.
"""

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from service.errors import NotFound
from service.intervals import Interval
from service.published import PUBLISHED, SOURCE
from service.report import Report, Result
from service.report_text import ARCHITECTURES, LEGEND
from service.storage import Store
from service.thumbnails import ID_DIGITS, thumbnail_key

PAGE = "report.html"
MOST_PICTURES = 2000  # inside one file, about 20 MB


def page(report: Report, *, pictures: Mapping[str, bytes] | None = None) -> bytes:
    """The HTML. `pictures`: WebP by job id, for a page that lies by itself; None: beside the catalog's thumbnails."""
    templates = files("service") / "templates"
    html, style, own = ((templates / "report" / f"report.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    script = (templates / "element.js").read_text("utf-8") + own
    data = json.dumps(_data(report, pictures), separators=(",", ":"), allow_nan=False)
    for mark, text in {
        "@STYLE-HASH@": _hash(style),
        "@SCRIPT-HASH@": _hash(script),
        "@STYLE@": style,
        "@SCRIPT@": script,
        # last, so that nothing in it is taken for a mark; no text in it can end the block
        "@DATA@": data.replace("<", "\\u003c"),
    }.items():
        html = html.replace(mark, text, 1)
    return html.encode()


def pictures_of(store: Store, report: Report) -> dict[str, bytes]:
    """The gallery's thumbnails of the merges on the contact sheet, by job id, the first MOST_PICTURES of them; one that
    nobody has made yet is left out."""
    found: dict[str, bytes] = {}
    for one in (one for cells in report.cells.values() for one in cells.values() if one.shown):
        if len(found) == MOST_PICTURES:
            break
        try:
            found[one.job_id] = store.get(thumbnail_key(one.job_id))
        except NotFound:
            continue
    return found


def _hash(text: str) -> str:
    """As a Content-Security-Policy names an inline block."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _data(report: Report, pictures: Mapping[str, bytes] | None) -> dict[str, Any]:
    reasons = {
        (one.subject, one.style, row.variant): one.reason for row in report.rows for one in row.missing if one.reason
    }
    variants = [row.variant for row in report.rows]
    return {
        "title": report.title,
        "updated": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "digest": report.digest,
        "legend": LEGEND,
        "source": f"{SOURCE[0].upper()}{SOURCE[1:]}",
        "against": report.against,
        "common": report.common,
        "architectures": [[one, ARCHITECTURES[one]] for one in report.architectures if one in ARCHITECTURES],
        "notes": list(report.notes),
        "measures": [asdict(one) for one in report.measures],
        "rows": [
            {
                "variant": row.variant,
                "method": row.method,
                "pairs": row.pairs,
                "merges": row.merges,
                "first_on": row.first_on,
                "measures": {name: _bounds(one) for name, one in row.measures.items()},
                "minus": {name: _bounds(one) for name, one in row.minus.items()},
                "published": PUBLISHED[row.method].alignments if row.method in PUBLISHED else {},
                "missing": [[one.subject, one.style, one.reason] for one in row.missing],
            }
            for row in report.rows
        ],
        "published": [{"method": method, **asdict(one)} for method, one in PUBLISHED.items()],
        "gallery": pictures is None,
        "sheet": {
            "variants": variants,
            "pairs": [
                [
                    *pair,
                    [
                        _cell(report.cells.get(pair, {}).get(variant), reasons.get((*pair, variant)), pictures)
                        for variant in variants
                    ],
                ]
                for pair in report.pairs
            ],
        },
    }


def _cell(one: Result | None, reason: str | None, pictures: Mapping[str, bytes] | None) -> list[Any] | None:
    """[id, picture, style × subject]; [reason] of a pair that was given up; None of one that was not merged."""
    if one is None:
        return None if reason is None else [reason]
    value = one.values.get("harmonic")
    return [one.job_id[:ID_DIGITS], _picture(one, pictures), None if value is None else round(value, 4)]


def _picture(one: Result, pictures: Mapping[str, bytes] | None) -> str | int:
    """1 for the thumbnail beside the page, 0 for none, or the picture itself as a data URL."""
    if pictures is None:
        return int(one.shown)
    content = pictures.get(one.job_id)
    return 0 if content is None else f"data:image/webp;base64,{base64.b64encode(content).decode()}"


def _bounds(interval: Interval) -> list[float | None]:
    return [None if math.isnan(value) else value for value in (interval.mean, interval.low, interval.high)]
