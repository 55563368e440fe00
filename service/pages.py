"""The gallery: a static page beside the catalog, made from the index. Opens from disk and from S3, asks no other host.

    gallery.html                    open this
    report.html                     methods compared, where the catalog has several; see report_page.py
    pages/*.css, *.js               the page itself
    pages/catalog.js                what the grid shows; written last and as a whole, so a page never sees half a state
    pages/rows/<two digits>-<digest>.js   all about the merges whose ids begin so; replaced under another name
    pages/thumbs/<job>.webp         previews, small
    pages/references/<role>-<id>-<digest>.webp   reference pictures, only where they were asked for
    pages/live.js                   how far a run is

Data is JavaScript, not JSON, because a page opened from disk may load scripts and nothing else. Ids and prompts are
whatever a user wrote: here they are JSON strings, in the page only ever text (no HTML is built from them).
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from service import report_page
from service.entry import ALIGNMENTS, RECIPE, Unreadable
from service.errors import AlreadyCommitted, Unavailable
from service.index import IndexSummary, read_rows, update_index
from service.references import stored_references
from service.report import make_report, result_of, variant_names
from service.steps import Steps, parallel
from service.storage import Store
from service.thumbnails import ID_DIGITS, PREFIX, make_thumbnail, thumbnail_key

if TYPE_CHECKING:
    from service.catalog import Catalog

PAGE = "gallery.html"
DATA = "pages/catalog.js"
LIVE = "pages/live.js"
ROWS = "pages/rows/"
FORMAT = "1"  # of rows and data; part of their names, so that a newer page never reads older ones
KEPT_S = 3600.0  # rows that no page needs any more stay so long, for pages that are open
OWN = ("gallery.css", "model.js", "grid.js", "detail.js", "gallery.js")
STATIC = ("element.js", *(f"gallery/{name}" for name in OWN))  # templates, in pages/ under their names alone
TYPES = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8", "html": "text/html; charset=utf-8"}
COLUMNS = [
    *(
        "job_id",
        "subject",
        "style",
        "method",
        "merged_by",
        "seed",
        "knobs",
        "attempt",
        "subject_trigger",
        "style_trigger",
    ),
    *("lora_key", "lora_bytes", "preview_key", "created", "objects", "job", "report", "architecture"),
    *("seconds", "merge_seconds"),
    *ALIGNMENTS,
]


@dataclass(frozen=True, slots=True)
class Written:
    """What a gallery shows; `digest`: of the catalog then; `problems`: previews that cannot be shown."""

    cells: int
    subjects: int
    styles: int
    digest: str
    problems: tuple[Unreadable, ...]


class Gallery:
    """The gallery of one catalog. Keep it to write again: only what has changed since is then read."""

    def __init__(self, catalog: "Catalog", title: str = "") -> None:
        self.catalog, self.store, self.title = catalog, catalog.store, title
        self.cells: dict[str, tuple[str, list[dict[str, Any]]]] = {}  # by group: its state and cells
        self.problems: dict[str, Unreadable] = {}  # by job id
        self.static = False
        self.compared: tuple[str, int] | None = None  # the state that report.html shows
        self.written = Written(0, 0, 0, "", ())

    def refresh(self) -> Written:
        """Index, thumbnails and pages brought up to date."""
        for _ in self.steps():
            pass
        return self.written

    def steps(self) -> Steps[str]:
        """One step per thumbnail that is missing, the pages at the end; `written` tells what they show."""
        summary = self.read()
        missing = self._missing()

        def start() -> Iterator[str]:
            for (job_id, key, _), problem in zip(
                missing, parallel(lambda one: make_thumbnail(self.store, one), missing, 8), strict=True
            ):
                if problem is not None:
                    self.problems[job_id] = problem
                yield key
            self.write(summary)

        return Steps(len(missing), start)

    def read(self) -> IndexSummary:
        """Bring the index up to date, and what is kept of it here."""
        summary = update_index(self.catalog)
        there = {found.key for found in self.store.list(ROWS)}
        states = {name: group[1][:12] for shard in summary.shards.values() for name, group in shard.groups.items()}
        for shard, known in summary.shards.items():
            due = {
                name
                for name in known.groups
                if self.cells.get(name, ("", []))[0] != states[name] or rows_key(name, states[name]) not in there
            }
            if due:
                self._take(shard, due, states, there)
        self.cells = {name: self.cells[name] for name in states}
        return summary

    def _take(self, shard: str, due: set[str], states: Mapping[str, str], there: set[str]) -> None:
        rows: dict[str, list[dict[str, Any]]] = {}
        for row in read_rows(self.store, shard, COLUMNS).to_pylist():
            if row["job_id"][:2] in due:
                rows.setdefault(row["job_id"][:2], []).append(row)
        if rows.keys() != due:
            raise Unavailable(f"the index of {self.store.url} changes while pages are made of it: run it again")
        for name, found in rows.items():
            key = rows_key(name, states[name])
            if key not in there:
                put_script(self.store, key, "rows", {"group": name, "rows": [details(row) for row in found]})
            self.cells[name] = (states[name], [cell(row) for row in found])

    def _missing(self) -> list[tuple[str, str, int]]:
        there = {found.key for found in self.store.list(PREFIX)}
        return [
            (one["job_id"], one["preview"], one["preview_bytes"])
            for _, cells in self.cells.values()
            for one in cells
            if one["preview"] and one["job_id"] not in self.problems and thumbnail_key(one["job_id"]) not in there
        ]

    def write(self, summary: IndexSummary) -> Written:
        if not self.static:
            write_static(self.store, self.title or name_of(self.store.url))
            self.static = True
        page = self._page(summary)
        if page["compared"]:
            self._compare(summary)
        put_script(self.store, DATA, "catalog", page)
        self._tidy({rows_key(name, state) for name, (state, _) in self.cells.items()})
        cells, subjects, styles = (len(page[name]) for name in ("cells", "subjects", "styles"))
        self.written = Written(cells, subjects, styles, summary.digest, tuple(self.problems.values()))
        return self.written

    def _compare(self, summary: IndexSummary) -> None:
        state = (summary.digest, len(summary.given_up))
        if state != self.compared:
            results = [one["result"] for _, found in self.cells.values() for one in found]
            title = self.title or name_of(self.store.url)
            made = make_report(results, summary.given_up, title=title, digest=summary.digest)
            self.store.put(report_page.PAGE, report_page.page(made), content_type=TYPES["html"])
            self.compared = state

    def _page(self, summary: IndexSummary) -> dict[str, Any]:
        cells = sorted((one for _, found in self.cells.values() for one in found), key=_order)
        variants = variant_names((one["method"], one["knobs"]) for one in cells)
        subjects = sorted({one["subject"] for one in (*cells, *summary.given_up)})
        styles = sorted({one["style"] for one in (*cells, *summary.given_up)})
        methods = sorted({*variants.values(), *(one["method"] for one in summary.given_up)}, key=_best_known_first)
        texts = _Places()
        row, column, of = ({name: i for i, name in enumerate(names)} for names in (subjects, styles, methods))
        return {
            "title": self.title or name_of(self.store.url),
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            "digest": summary.digest,
            "subjects": subjects,
            "styles": styles,
            "methods": methods,
            "compared": len(set(variants.values())) > 1,
            "references": stored_references(self.store),
            "cells": [
                [
                    row[one["subject"]],
                    column[one["style"]],
                    of[variants[one["method"], one["knobs"]]],
                    one["seed"],
                    one["job_id"][:ID_DIGITS],
                    *one["scores"],
                    *(texts.place(one[name]) for name in ("template", "subject_trigger", "style_trigger")),
                    one["sample_seed"],
                    int(bool(one["preview"]) and one["job_id"] not in self.problems),
                ]
                for one in cells
            ],
            "texts": texts.values,
            "failures": [
                [
                    row[one["subject"]],
                    column[one["style"]],
                    of[one["method"]],
                    *(one[name] for name in ("kind", "reason", "attempts")),
                ]
                for one in summary.given_up
            ],
            "unreadable": len(summary.unreadable),
            "groups": {name: state for name, (state, _) in sorted(self.cells.items())},
        }

    def _tidy(self, needed: set[str]) -> None:
        now = datetime.now(UTC)
        for found in list(self.store.list(ROWS)):
            if found.key not in needed and (now - found.modified).total_seconds() > KEPT_S:
                self.store.delete(found.key)


def cell(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the grid must know of a merge."""
    report = json.loads(row["report"])
    first = next(iter(_samples(report)), {})
    previews = {item["key"]: item["size"] for item in row["objects"]}
    return {
        **{name: row[name] for name in ("job_id", "subject", "style", "method", "seed", "knobs")},
        "subject_trigger": row["subject_trigger"] or "",
        "style_trigger": row["style_trigger"] or "",
        "template": _template(row, first.get("prompt") or ""),
        "sample_seed": first.get("seed"),
        "scores": [None if row[name] is None else round(row[name] * 1000) for name in ALIGNMENTS],
        "preview": row["preview_key"],
        "preview_bytes": previews.get(row["preview_key"], 0),
        "result": result_of(row),
    }


def details(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the dialog shows of a merge."""
    job, report = json.loads(row["job"]), json.loads(row["report"])
    keys = {item["name"]: item["key"] for item in row["objects"]}
    scores = report.get("scores") if isinstance(report.get("scores"), dict) else {}
    return {
        "id": row["job_id"],
        "created": row["created"].isoformat(timespec="seconds"),
        "lora": row["lora_key"],
        "bytes": row["lora_bytes"],
        "recipe": keys.get(RECIPE),
        "triggers": [row["subject_trigger"] or "", row["style_trigger"] or ""],
        "knobs": job.get("knobs"),
        "weights": [_of(job, "subject", "weight"), _of(job, "style", "weight")],
        "samples": [
            [keys[one["object"]], one.get("prompt") or "", one.get("style_strength", 1.0), one.get("seed")]
            for one in _samples(report)
            if one.get("object") in keys
        ],
        "scores": [None if row[name] is None else round(row[name], 4) for name in ALIGNMENTS],
        "unscored": scores.get("missing") or {},
        "merge": report.get("merge") if isinstance(report.get("merge"), dict) else {},
        "best": report.get("best") if isinstance(report.get("best"), dict) else None,
        "stages": report.get("stages") or {},
        "device": report.get("device"),
        "observed": [_of(report, "subject", "calibrated_on"), _of(report, "style", "calibrated_on")],
    }


def write_static(store: Store, title: str) -> None:
    """The page without its data."""
    templates = files("service") / "templates"
    for name in STATIC:
        body = (templates / name).read_bytes()
        store.put(f"pages/{name.rpartition('/')[2]}", body, content_type=TYPES[name.rpartition(".")[2]])
    with suppress(AlreadyCommitted):  # a page that finds nothing there would complain in the console
        put_live(store, None, create_only=True)
    store.put(PAGE, (templates / "gallery" / PAGE).read_bytes(), content_type=TYPES["html"])


def put_live(store: Store, live: Mapping[str, Any] | None, *, create_only: bool = False) -> None:
    """How far a run is, for pages that are open; None: nobody has said."""
    put_script(store, LIVE, "live", live, create_only=create_only)


def put_script(store: Store, key: str, call: str, value: Any, *, create_only: bool = False) -> None:
    """A script that hands `value` to the page; ASCII, whatever it holds."""
    body = f"ziplora.take.{call}({json.dumps(value, ensure_ascii=True, separators=(',', ':'))});\n"
    store.put(key, body.encode(), content_type=TYPES["js"], create_only=create_only)


def rows_key(group: str, state: str) -> str:
    return f"{ROWS}{group}-{FORMAT}{state}.js"


def name_of(url: str) -> str:
    return url.rstrip("/").rpartition("/")[2] or "catalog"


class _Places:
    """Texts told once and named by their places."""

    def __init__(self) -> None:
        self.values: list[str] = []
        self.places: dict[str, int] = {}

    def place(self, text: str) -> int:
        if text not in self.places:
            self.places[text] = len(self.values)
            self.values.append(text)
        return self.places[text]


def _template(row: Mapping[str, Any], prompt: str) -> str:
    """The prompt's template, which many cells share, if it gives this prompt; else the prompt, as a template."""
    for one in _of(json.loads(row["job"]), "samples", "prompts") or []:
        template = one.get("template") if isinstance(one, dict) else None
        if isinstance(template, str):
            rendered = (
                re.sub(
                    r"\{\{|\}\}|\{subject\}|\{style\}",
                    lambda match: {
                        "{{": "{",
                        "}}": "}",
                        "{subject}": row["subject_trigger"] or "",
                        "{style}": row["style_trigger"] or "",
                    }[match[0]],
                    template,
                )
            )  # fmt: skip
            if rendered == prompt:
                return template
    return prompt.replace("{", "{{").replace("}", "}}")


def _samples(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    listed = report.get("samples")
    return [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []


def _of(value: Mapping[str, Any], part: str, name: str) -> Any:
    inner = value.get(part)
    return inner.get(name) if isinstance(inner, dict) else None


def _order(one: Mapping[str, Any]) -> tuple[Any, ...]:
    return (one["subject"], one["style"], one["method"], one["knobs"], one["seed"] or 0, one["job_id"])


def _best_known_first(method: str) -> tuple[bool, str]:
    return (not method.startswith("ziplora"), method)
