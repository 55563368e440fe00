"""`ziplora pull`, `link`, `export`, `verify`, `gc`, `rm`, `diff`, `copy`: how files leave a catalog, and its care.
Options and what is printed."""

import json
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import click

from service.catalog import COMMIT_S, GARBAGE_S, Catalog
from service.choose import BEST, SCORES, choose
from service.cli_options import CATALOG_HELP, filtered, open_catalog
from service.console import OUT, complain, left_out, size_text, tracked
from service.entry import Entry, why_no_lora
from service.errors import BadInput, NotFound
from service.file_names import stem_of
from service.pull import Pulled, PullOptions, write
from service.pull_layouts import LAYOUTS, LORA, Shown, placed
from service.wording import number
from ziplora.headers import LIMITS

DAY_S = 24 * 3600.0
WATCH_S = 10.0
LAYOUT_HELP = "; ".join(f"{layout.name}: {layout.summary}" for layout in LAYOUTS.values())

base_model = click.option("--base-model", help="Hub id of the base, for model cards; an entry knows its digest only.")
score = click.option(
    "--by", default=SCORES[0], type=click.Choice(SCORES), show_default=True, help="The score that --top and best mean."
)


@click.command(epilog=CATALOG_HELP)
@click.argument("catalog")
@click.argument("dest", type=click.Path(file_okay=False, path_type=Path))
@filtered
@click.option("--top", type=click.IntRange(min=1), help="Only so many, the highest scored.")
@score
@click.option("--layout", default="flat", type=click.Choice(list(LAYOUTS)), show_default=True, help=LAYOUT_HELP)
@click.option("--samples", is_flag=True, help="All sample images too, not only the preview.")
@click.option("--mergers", is_flag=True, help="The merger coefficients too.")
@click.option("--limit", default=LIMITS.max_bytes, type=click.IntRange(min=1), help="Bytes that one file may have.")
@base_model
@click.option("--watch", is_flag=True, help="Go on until the batch at work has ended (or Ctrl-C).")
@click.option("--interval", default=WATCH_S, type=click.FloatRange(min=0.1), show_default=True, help="Seconds.")
def pull(
    catalog: str,
    dest: Path,
    subject: str,
    style: str,
    method: str,
    top: int | None,
    by: str,
    layout: str,
    samples: bool,
    mergers: bool,
    limit: int,
    base_model: str | None,
    watch: bool,
    interval: float,
) -> int:
    """Copy merged LoRAs from CATALOG to the directory DEST, verified; run again to go on after a cut.

    --method best takes of each pair the merge with the highest score, whichever method made it.
    """
    extras = [*(["samples/*"] if samples else []), *(["mergers.safetensors"] if mergers else []), "peft.safetensors"]
    options = PullOptions(layout, tuple(extras), limit, base_model)
    opened = open_catalog(catalog)
    if watch:
        return watched(opened, dest, options, (subject, style, method), top, by, interval)
    steps = opened.pull(
        dest, subject, style, method, extras, layout=layout, top=top, by=by, limit_bytes=limit, base_model=base_model
    )
    if not len(steps):
        raise NotFound(nothing_matches(catalog, subject, style, method))
    return told(tracked(steps, "pulling"), dest)


def watched(
    catalog: Catalog,
    dest: Path,
    options: PullOptions,
    patterns: tuple[str, str, str],
    top: int | None,
    by: str,
    interval: float,
) -> int:
    from service.follow import follow

    OUT.print(f"following {catalog.store.url} until its batch ends; Ctrl-C stops, what is pulled stays", soft_wrap=True)
    choice = partial(choose, best=patterns[2] == BEST, top=top, by=by)
    pulled = follow(catalog, dest, options, patterns, choice, partial(time.sleep, interval))
    return told(tracked(pulled, "pulling"), dest, each=True)


def told(steps: Iterable[Pulled], dest: Path, *, each: bool = False) -> int:
    """Follow a pull to its end and sum it up; the exit code."""
    counts: dict[str, int] = {}
    n_bytes = 0
    for pulled in steps:
        counts[pulled.state] = counts.get(pulled.state, 0) + 1
        n_bytes += pulled.size if pulled.state in ("pulled", "resumed") else 0
        if pulled.problem:
            complain(
                f"{pulled.name or pulled.job_id[:12]}: {pulled.problem}",
                "refused" if pulled.state == "failed" else "left out",
            )
        elif each:
            OUT.print(f"{pulled.state} {pulled.path}", soft_wrap=True)
    summary = ", ".join(f"{number} {state}" for state, number in sorted(counts.items())) or "nothing"
    OUT.print(f"{dest}: {summary} ({size_text(n_bytes)})", soft_wrap=True)
    return 1 if counts.get("failed") else 0


@click.command(epilog=CATALOG_HELP)
@click.argument("catalog")
@filtered
@click.option("--object", "name", default="merged.safetensors", show_default=True, help="Name of the object.")
@click.option("--days", default=1.0, type=click.FloatRange(min=0, min_open=True), show_default=True)
@click.option("--json", "as_json", is_flag=True)
def link(catalog: str, subject: str, style: str, method: str, name: str, days: float, as_json: bool) -> None:
    """URLs from which anyone can fetch merged LoRAs without credentials, for so many DAYS (at most 7).

    A catalog in a directory gives file URLs, which are good on this machine only.
    """
    opened = open_catalog(catalog)
    found = list(opened.select(subject, style, method, left_out))
    entries = [entry for entry in found if name in entry.objects]
    for entry in found if name == LORA else ():
        if name not in entry.objects:
            complain(f"{entry.subject}/{entry.style}: {why_no_lora(entry)}", "left out")
    if not found:
        raise NotFound(nothing_matches(catalog, subject, style, method))
    if not entries:
        raise NotFound(
            f"{catalog} has no {name} of what matches subject {subject}, style {style}, method {method}:"
            f" `ziplora show {catalog} {found[0].subject}/{found[0].style}` lists what there is of one"
        )
    suffix = "".join(Path(name).suffixes)
    for entry in entries:
        file_name = f"{stem_of(entry)}{suffix}"
        url = opened.store.link(
            entry.objects[name].key,
            round(days * DAY_S),
            file_name.encode("ascii", "replace").decode().replace("?", "_"),
        )
        shown = {"subject": entry.subject, "style": entry.style, "method": entry.method, "url": url}
        click.echo(json.dumps(shown | {"sha256": entry.objects[name].sha256}) if as_json else url)


@click.command(epilog=CATALOG_HELP)
@click.argument("catalog")
@click.argument("job")
@click.argument("dest", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--style-strength", required=True, type=click.FloatRange(0, 10), help="Factor on the style; 1: as merged."
)
@click.option("--layout", default="flat", type=click.Choice(list(LAYOUTS)), show_default=True, help=LAYOUT_HELP)
@click.option("--dtype", default="float16", type=click.Choice(["float16", "float32"]), show_default=True)
@click.option(
    "--subject-lora", help="The subject's LoRA as it was merged; with --style-lora, nothing is rounded twice."
)
@click.option("--style-lora", help="The style's LoRA as it was merged.")
@base_model
def export(
    catalog: str,
    job: str,
    dest: Path,
    style_strength: float,
    layout: str,
    dtype: str,
    subject_lora: str | None,
    style_lora: str | None,
    base_model: str | None,
) -> None:
    """Write one merge at another style strength to the directory DEST, without merging again and without a GPU.

    JOB is the start of a job id, or SUBJECT/STYLE. From the published file, unless both source LoRAs are given.
    """
    import torch

    from service.export import as_entry
    from service.export import export as make

    if (subject_lora is None) != (style_lora is None):
        raise click.UsageError("--subject-lora and --style-lora go together")
    opened = open_catalog(catalog)
    entry = the_one(opened, catalog, job)
    sources = (subject_lora, style_lora) if subject_lora and style_lora else None
    files = make(opened.store, entry, style_strength, sources=sources, dtype=getattr(torch, dtype))
    shown = as_entry(entry, files)
    stem = f"{stem_of(entry)}-style{100 * style_strength:g}".replace(".", "_")
    for file in placed(layout, shown, stem, (), Shown(base_model, style_strength)):
        source = file.source
        content = source if isinstance(source, bytes) else files.get(source.name) or opened.store.get(source.key)
        OUT.print(f"{write(content, dest, file.path)} {dest / file.path}", soft_wrap=True)


def the_one(opened: Catalog, catalog: str, job: str) -> Entry:
    """The entry of a job id's start, or of SUBJECT/STYLE; NotFound, BadInput when several match."""
    subject, slash, style = job.partition("/")
    entries = opened.select(subject, style, unreadable=left_out) if slash else opened.entries(left_out)
    found = [entry for entry in entries if slash or entry.job_id.startswith(job)]
    if not found:
        raise NotFound(f"{catalog} has no merge {job}: `ziplora ls {catalog}` lists what it has")
    if len(found) > 1:
        listed = ", ".join(f"{entry.job_id[:12]} ({entry.method})" for entry in found[:8])
        raise BadInput(f"{job} is {len(found)} merges: {listed}; give the start of one job id")
    return found[0]


@click.command(epilog=CATALOG_HELP)
@click.argument("catalog")
@filtered
@click.option(
    "--record",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write what was found to this file, a line per object, and go on from there if it exists.",
)
def verify(catalog: str, subject: str, style: str, method: str, record: Path | None) -> int:
    """Read every object of CATALOG, trained LoRAs too, and compare it with the sha256 in its entry."""
    from service.care import VerifyRecord

    opened = open_catalog(catalog)
    kept = VerifyRecord(record, opened.store.url) if record else None
    before = len(kept.sound) if kept else 0
    bad = n = n_bytes = 0
    for checked in tracked(opened.verify(subject, style, method, kept.sound if kept else None), "verifying"):
        n, n_bytes = n + 1, n_bytes + checked.size
        if kept:
            kept.add(checked)
        if checked.problem:
            bad += 1
            OUT.print(f"{checked.key}: {checked.problem}", soft_wrap=True)
    known = f", {before} known to be sound from {record}" if before else ""
    OUT.print(f"{number(n, 'object')} read ({size_text(n_bytes)}){known}, {bad} not as promised", soft_wrap=True)
    return 1 if bad else 0


@click.command(epilog=CATALOG_HELP)
@click.argument("catalog")
@click.option("--delete", is_flag=True, help="Remove it. Without this, only what would go is shown.")
@click.option(
    "--older-than",
    "hours",
    default=GARBAGE_S / 3600,
    type=click.FloatRange(min=2 * COMMIT_S / 3600),
    show_default=True,
    help="Hours; younger attempts may be at work.",
)
def gc(catalog: str, delete: bool, hours: float) -> int:
    """What CATALOG holds for nothing: attempts that never became an entry, uploads that were never finished, and
    checkpoints of trainings that nobody went on with.

    Safe while batches run: what is or will be committed is never touched.
    """
    opened = open_catalog(catalog)
    garbage = opened.garbage(hours * 3600)
    size = size_text(sum(item.size for item in garbage))
    if not delete:
        for item in garbage:
            OUT.print(
                f"{item.name}: {item.reason} ({number(len(item.objects), 'object')}, {size_text(item.size)})",
                soft_wrap=True,
            )
        OUT.print(f"{len(garbage)} to remove ({size}), older than {hours:g} h; --delete does it")
        return 0
    spared = sum(not gone for _, gone in tracked(opened.collect(garbage), "removing"))
    OUT.print(f"{len(garbage) - spared} removed ({size}){f', {spared} turned out to be in use' if spared else ''}")
    return 0


@click.command(epilog=CATALOG_HELP)
@click.argument("catalog")
@filtered
@click.option("--job", "jobs", multiple=True, help="Start of a job id; several may be given.")
@click.option(
    "--not-in",
    "manifests",
    multiple=True,
    help="Everything but the jobs of this manifest; several may be given, then those of none.",
)
@click.option("--delete", is_flag=True, help="Remove them. Without this, only what would go is shown.")
def rm(
    catalog: str,
    subject: str,
    style: str,
    method: str,
    jobs: tuple[str, ...],
    manifests: tuple[str, ...],
    delete: bool,
) -> int:
    """Take merges back from CATALOG, with all their files: by pattern, by job id, or all that manifests do not name.

    Filters add up: what is removed matches every one that is given.
    """
    if (subject, style, method) == ("*", "*", "*") and not jobs and not manifests:
        raise click.UsageError("that would be the whole catalog: give patterns, --job or --not-in MANIFEST")
    opened = open_catalog(catalog)
    keep = set().union(*(job_ids_of(manifest) for manifest in manifests))
    entries = [
        entry
        for entry in opened.select(subject, style, method, left_out)
        if entry.job_id not in keep and (not jobs or entry.job_id.startswith(jobs))
    ]
    size = size_text(sum(entry.n_bytes for entry in entries))
    if not delete:
        for entry in entries:
            OUT.print(f"{entry.subject}/{entry.style} ({entry.method}) {entry.job_id[:12]}, {size_text(entry.n_bytes)}")
        OUT.print(f"{number(len(entries), 'merge')} to remove ({size}); --delete does it")
        return 0
    for _ in tracked(opened.remove(entries), "removing"):
        pass
    if entries:
        opened.build_index()
    OUT.print(f"{number(len(entries), 'merge')} removed ({size})")
    return 0


def job_ids_of(manifest: str) -> set[str]:
    """The ids of a manifest's jobs; its errors when a file that it names cannot be used: nothing is lost to them."""
    from service.manifest import read_manifest
    from service.plan import plan

    planned = plan(read_manifest(manifest), watch=lambda steps: tracked(steps, "checking LoRAs"))
    planned.check()
    return {job.job_id for job in planned.jobs}


@click.command(epilog="FIRST and SECOND are directories or s3://bucket/prefix.")
@click.argument("first")
@click.argument("second")
@click.option("--json", "as_json", is_flag=True)
def diff(first: str, second: str, as_json: bool) -> int:
    """How two catalogs differ: merges and trained LoRAs that only one has, other content, other settings. Exit code 1
    if they do."""
    from dataclasses import asdict

    found = open_catalog(first).differences(open_catalog(second))
    signs = {"only first": "<", "only second": ">", "objects differ": "!", "made otherwise": "~"}
    for item in found:
        if as_json:
            click.echo(json.dumps(asdict(item)))
            continue
        ids = " → ".join(job_id[:12] for job_id in item.job_ids)
        OUT.print(f"{signs[item.kind]} {item.pair} ({item.method}) {ids}: {item.kind}", soft_wrap=True)
        for detail in item.details:
            OUT.print(f"    {detail}", soft_wrap=True)
    if not as_json:
        OUT.print(number(len(found), "difference") if found else "the same content")
    return 1 if found else 0


@click.command(epilog="SOURCE and DEST are directories or s3://bucket/prefix.")
@click.argument("source")
@click.argument("dest")
@filtered
def copy(source: str, dest: str, subject: str, style: str, method: str) -> int:
    """Copy merges from one catalog into another, verified on the way; run again to go on after a cut.

    The LoRAs that runs trained for them come along. What DEST has already is kept. Its index is brought up to date at
    the end.
    """
    opened, target = open_catalog(source), Catalog(dest)
    target.store.probe()
    steps = opened.copy_to(target, subject, style, method)
    if not len(steps):
        raise NotFound(nothing_matches(source, subject, style, method))
    counts: dict[str, int] = {}
    n_bytes = failed = 0
    for copied in tracked(steps, "copying"):
        what = f"trained LoRAs {copied.state}" if copied.trained else copied.state
        counts[what] = counts.get(what, 0) + 1
        failed += copied.state == "failed"
        n_bytes += copied.n_bytes
        if copied.problem:
            complain(f"{copied.pair}: {copied.problem}", "refused")
    target.build_index()
    summary = ", ".join(f"{number} {state}" for state, number in sorted(counts.items()))
    OUT.print(f"{dest}: {summary} ({size_text(n_bytes)})", soft_wrap=True)
    return 1 if failed else 0


def nothing_matches(catalog: str, subject: str, style: str, method: str) -> str:
    return (
        f"{catalog} has nothing that matches subject {subject}, style {style}, method {method}:"
        f" `ziplora ls {catalog}` lists what it has"
    )


COMMANDS: tuple[Any, ...] = (pull, link, export, verify, gc, rm, diff, copy)
