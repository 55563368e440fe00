"""`ziplora ls`, `show`, `sheet`: a look at a catalog."""

import json
from pathlib import Path

import click
from rich.table import Table

from service.cli_options import CATALOG_HELP, filtered, open_catalog
from service.console import OUT, left_out, size_text
from service.entry import alignments
from service.errors import NotFound
from service.retry import select_failures
from service.wording import number


@click.command(epilog=CATALOG_HELP)
@click.argument("catalog")
@filtered
@click.option("--json", "as_json", is_flag=True)
def ls(catalog: str, subject: str, style: str, method: str, as_json: bool) -> None:
    """List what CATALOG holds, and what was given up."""
    opened = open_catalog(catalog)
    entries = sorted(
        opened.select(subject, style, method, left_out), key=lambda e: (e.subject, e.style, e.method, e.job_id)
    )
    failures = select_failures(opened, subject, style, method, unreadable=left_out)
    if as_json:
        for entry in entries:
            click.echo(
                json.dumps(
                    {"job_id": entry.job_id, "subject": entry.subject, "style": entry.style, "method": entry.method}
                    | {name: value for name, value in alignments(entry).items() if value is not None}
                )
            )
        return
    scored = any(value is not None for entry in entries for value in alignments(entry).values())
    titles = ("CLIP-I style", "DINO subject", "CLIP-T text") if scored else ()
    table = Table("subject", "style", "method", "job", "images", *titles, "size", "made")
    for entry in entries:
        images = sum(name.startswith("samples/") for name in entry.objects)
        table.add_row(
            entry.subject,
            entry.style,
            entry.method,
            entry.job_id[:12],
            str(images),
            *(("–" if value is None else f"{value:.3f}") for value in alignments(entry).values() if scored),
            size_text(entry.n_bytes),
            f"{entry.created:%Y-%m-%d %H:%M}",
        )
    OUT.print(table)
    for failure in failures:
        job = failure.job
        pair = f"{job.get('subject', {}).get('id', '?')}/{job.get('style', {}).get('id', '?')}"
        OUT.print(f"given up: {pair} ({failure.kind}): {failure.reason}", soft_wrap=True)
    OUT.print(f"{number(len(entries), 'merge')}, {len(failures)} given up")


@click.command(epilog=CATALOG_HELP)
@click.argument("catalog")
@click.argument("job")
def show(catalog: str, job: str) -> None:
    """Everything that is known of one merge: JOB is the start of a job id, or SUBJECT/STYLE."""
    opened = open_catalog(catalog)
    subject, slash, style = job.partition("/")
    if slash:
        found = opened.select(subject, style, unreadable=left_out)
    else:
        found = [entry for entry in opened.entries(left_out) if entry.job_id.startswith(job)]
    if not found:
        raise NotFound(f"{catalog} has no merge {job}: `ziplora ls {catalog}` lists what it has")
    for entry in found:
        objects = {
            item.name: {"key": item.key, "bytes": item.size, "sha256": item.sha256} for item in entry.objects.values()
        }
        shown = {
            "job_id": entry.job_id,
            "created": entry.created.isoformat(),
            "job": entry.job,
            "report": entry.report,
            "objects": objects,
        }
        click.echo(json.dumps(shown, indent=2, default=str))


@click.command(epilog=CATALOG_HELP)
@click.argument("catalog")
@click.argument("picture", type=click.Path(dir_okay=False, path_type=Path))
@filtered
@click.option("--cell", default=128, type=click.IntRange(16, 1024), show_default=True, help="Pixels of each picture.")
def sheet(catalog: str, picture: Path, subject: str, style: str, method: str, cell: int) -> None:
    """Write a contact sheet of CATALOG to PICTURE (a .png or .jpg): subjects down, styles across."""
    from service.sheet import contact_sheet

    opened = open_catalog(catalog)
    entries = opened.select(subject, style, method, left_out)
    if not entries:
        raise NotFound(f"{catalog} has nothing to show: `ziplora ls {catalog}` lists what it has")
    try:
        contact_sheet(opened.store, entries, cell).save(picture)
    except (OSError, ValueError) as error:
        raise click.UsageError(f"{picture} cannot be written: {error}") from error
    OUT.print(f"{picture}: {number(len({(e.subject, e.style) for e in entries}), 'pair')}", soft_wrap=True)


COMMANDS = (ls, show, sheet)
