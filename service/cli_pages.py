"""`ziplora index`, `gallery`, `watch`, `study …`: options and what is printed; the work is index.py's, pages.py's, …"""

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from service.cli_options import CATALOG_HELP, open_catalog
from service.console import OUT, complain, left_out, redrawn, tracked
from service.errors import NotFound
from service.wording import number

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
        f"{number(summary.entries, 'merge')}, {summary.failures} given up, digest {summary.digest}"
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
    from service.pages import PAGE, Gallery
    from service.references import first_pictures, put_references

    opened = open_catalog(catalog)
    if manifest is not None:
        put_references(opened.store, first_pictures(manifest))
    made = Gallery(opened, title)
    for _ in tracked(made.steps(), "thumbnails"):
        pass
    written = made.written
    for record in written.problems:
        complain(f"{record.key}: {record.reason}", "not shown")
    OUT.print(
        f"{opened.store.url}/{PAGE}: {number(written.cells, 'merge')},"
        f" {number(written.subjects, 'subject')} × {number(written.styles, 'style')}",
        soft_wrap=True,
    )
    return 1 if written.problems else 0


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
    lines = [f"{number(view.merges, 'merge')}, {view.given_up} given up"]
    if view.per_minute is not None and view.running:
        lines[0] += f", {view.per_minute:.1f} per minute"
    if run is not None:
        done = run.committed + run.given_up
        state = f"no word since {run.updated[:16].replace('T', ' ')} UTC" if view.stale else run.state
        lines.append(f"run {run.run_id}: {done} of {run.jobs} done, {number(run.workers, 'worker')}, {state}")
        if view.eta_s is not None:
            lines[-1] += f", about {duration(view.eta_s)} left"
    lines += [f"  {merge.at:%H:%M:%S}  {merge.subject} × {merge.style} ({merge.method})" for merge in view.recent]
    return lines


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@click.group()
def study() -> None:
    """The paper's preference study: which of two pictures best shows the style while keeping the subject."""


@study.command(epilog=CATALOG_HELP)
@click.argument("catalog")
@click.option("--methods", required=True, help="The first is held against each of the others: ziplora,direct")
@click.option(
    "--references",
    "manifest",
    metavar="MANIFEST",
    help="Where the reference pictures are; default: those that `gallery --references` has put into the catalog.",
)
@click.option("--name", default="study", show_default=True, help="What the answers are kept under: studies/NAME/")
@click.option("--questions", default=40, type=click.IntRange(min=1), show_default=True, help="For each participant.")
@click.option("--seed", default=0, show_default=True, help="Decides who is asked what, and which is left and right.")
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 lets other machines in.")
@click.option("--port", default=8400, type=click.IntRange(0, 65535), show_default=True)
def serve(
    catalog: str, methods: str, manifest: str | None, name: str, questions: int, seed: int, host: str, port: int
) -> None:
    """Ask the people who open the page. Every answer is stored in CATALOG at once; stop and start as you like."""
    from service.references import reference_bytes
    from service.study import make_study, open_study

    try:
        from service import study_server
    except ModuleNotFoundError as error:
        raise click.UsageError(f"a study takes {error.name}: pip install 'ziplora[study]'") from error
    opened = open_catalog(catalog)
    chosen = [method.strip() for method in methods.split(",") if method.strip()]
    entries = [entry for method in chosen for entry in opened.select(method=method, unreadable=left_out)]
    asked = open_study(opened.store, make_study(name, entries, chosen, questions, seed))
    pictures = reference_bytes(opened.store, asked.questions, entries, manifest)
    OUT.print(
        f"study {name}: {len(asked.questions)} questions, {asked.asked} for each participant; open http://{host}:{port}/",
        soft_wrap=True,
    )
    study_server.serve(study_server.make_app(opened.store, asked, pictures, host), host, port)


@study.command("report", epilog=CATALOG_HELP)
@click.argument("catalog")
@click.option("--name", default="study", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def study_report(catalog: str, name: str, as_json: bool) -> None:
    """What the answers say: preference per pair of methods (Wilson's 95 % interval), agreement per participant."""
    from service.study import read_study, report, responses, study_names

    store = open_catalog(catalog).store
    try:
        of = read_study(store, name)
    except NotFound as error:
        known = ", ".join(study_names(store)) or "none"
        raise NotFound(f"{catalog} has no study {name}; it has: {known}") from error
    told = report(of, responses(store, of))
    if as_json:
        click.echo(json.dumps(asdict(told), indent=2))
        return
    OUT.print(f"study {name}: {told.left.n} answers of {told.participants} participants")
    for found in told.preferences:
        first, second = found.methods
        OUT.print(
            f"  {first} preferred over {second}: {found.share:.1%} of {found.n}"
            f" (95 % interval {found.low:.1%} to {found.high:.1%})",
            soft_wrap=True,
        )
    if told.left.n:
        OUT.print(f"  left picture chosen: {told.left.share:.1%} ({told.left.low:.1%} to {told.left.high:.1%})")
    if told.seconds is not None:
        OUT.print(f"  time for an answer: {told.seconds:.1f} s (median)")
    for one in told.agreements:
        others = "no others" if one.with_others is None else f"{one.with_others:.0%} as most others"
        OUT.print(
            f"  participant {one.participant[:8]}: {one.n} answers, {one.first:.0%} for the first method, {others}"
        )


COMMANDS = (index, gallery, watch, study)
