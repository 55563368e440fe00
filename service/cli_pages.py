"""`ziplora index`, `gallery`, `watch`, `study …`: options and what is printed; the work is index.py's, pages.py's, …"""

import time
from typing import TYPE_CHECKING

import click

from service.cli_options import CATALOG_HELP, open_catalog
from service.console import OUT, complain, left_out, redrawn, tracked

if TYPE_CHECKING:
    from service.watch import View


@click.command(epilog=CATALOG_HELP)
@click.argument("catalog")
@click.option("--rebuild", is_flag=True, help="Read every entry again, not only those that the index lacks.")
def index(catalog: str, rebuild: bool) -> None:
    """Bring the index of CATALOG up to date: index/*.parquet, one row per merge, and index.json."""
    summary = open_catalog(catalog).build_index(rebuild=rebuild)
    for record in summary.unreadable:
        left_out(record)
    OUT.print(
        f"{summary.entries} merges, {summary.failures} given up, digest {summary.digest}"
        f" ({summary.read} entries read, {summary.written} of {len(summary.shards)} shards written)",
        soft_wrap=True,
    )


@click.command(epilog=CATALOG_HELP)
@click.argument("catalog")
@click.option("--title", default="", help="Heading of the page; default: the catalog's name.")
@click.option(
    "--references",
    "manifest",
    metavar="MANIFEST",
    help="Show a reference picture beside each subject and style, small, from the images that MANIFEST names. They"
    " become part of the catalog: do not, if who may see it should not see them.",
)
def gallery(catalog: str, title: str, manifest: str | None) -> int:
    """Write gallery.html beside CATALOG: a page to look through it, which opens from disk and from S3."""
    from service.pages import PAGE, Gallery, put_references

    opened = open_catalog(catalog)
    if manifest is not None:
        put_references(opened.store, reference_pictures(manifest))
    made = Gallery(opened, title)
    for _ in tracked(made.steps(), "thumbnails"):
        pass
    written = made.written
    for record in written.problems:
        complain(f"{record.key}: {record.reason}", "not shown")
    OUT.print(
        f"{opened.store.url}/{PAGE}: {written.cells} merges, {written.subjects} subjects × {written.styles} styles",
        soft_wrap=True,
    )
    return 1 if written.problems else 0


def reference_pictures(manifest: str) -> dict[tuple[str, str], bytes]:
    """The first reference image of each subject and style that has one, by (role, id)."""
    from service.manifest import read_manifest
    from service.storage import split_location

    read = read_manifest(manifest)
    found: dict[tuple[str, str], bytes] = {}
    for spec in (*read.subjects, *read.styles):
        if spec.images:
            store, key = split_location(spec.images[0])
            found[spec.role, spec.id] = store.get(key)
    return found


@click.command(epilog=CATALOG_HELP)
@click.argument("catalog")
@click.option("--every", default=5.0, type=click.FloatRange(min=0.5), show_default=True, help="Seconds between looks.")
@click.option("--once", is_flag=True, help="Look once.")
def watch(catalog: str, every: float, once: bool) -> None:
    """Watch CATALOG fill: merges, rate, time left, what came last. Ends with the newest run; from any machine."""
    from service.watch import Watch

    looked = time.monotonic()

    def wait() -> None:
        nonlocal looked
        time.sleep(max(every, 5 * (time.monotonic() - looked)))  # a listing of 100,000 takes its time
        looked = time.monotonic()

    last: list[str] = []
    with redrawn() as screen:
        for view in Watch(open_catalog(catalog), wait):
            lines = view_lines(view)
            if screen is not None:
                screen("\n".join(lines))
            elif lines != last:
                OUT.print("\n".join(lines), soft_wrap=True)
            last = lines
            if once:
                break


def view_lines(view: "View") -> list[str]:
    run = view.standing
    lines = [f"{view.merges} merges, {view.given_up} given up"]
    if view.per_minute is not None and view.running:
        lines[0] += f", {view.per_minute:.1f} per minute"
    if run is not None:
        done = run.committed + run.given_up
        state = f"no word since {run.updated[:16].replace('T', ' ')} UTC" if view.stale else run.state
        lines.append(f"run {run.run_id}: {done} of {run.jobs} done, {run.workers} workers, {state}")
        if view.eta_s is not None:
            lines[-1] += f", about {duration(view.eta_s)} left"
    lines += [f"  {merge.at:%H:%M:%S}  {merge.subject} × {merge.style} ({merge.method})" for merge in view.recent]
    return lines


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


COMMANDS = (index, gallery, watch)
