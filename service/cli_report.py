"""`ziplora report`: methods held against each other, as text or as a page."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click

from service.cli_options import CATALOG_HELP, filtered, open_catalog
from service.console import OUT
from service.errors import NotFound

FORMATS = ("markdown", "csv", "html")


@click.command(epilog=CATALOG_HELP)
@click.argument("catalog")
@filtered
@click.option("--against", metavar="METHOD", help="Baseline of the differences; default: direct, if there is one.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(FORMATS),
    help="Default: by the suffix of --out, or markdown.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write; default: standard output, of html report.html in CATALOG.",
)
def report(
    catalog: str, subject: str, style: str, method: str, against: str | None, kind: str | None, out: Path | None
) -> None:
    """Compare the methods of CATALOG: alignments with intervals, differences on equal pairs, the paper's figures."""
    from service import report_page, report_text
    from service.pages import name_of
    from service.report import make_report, read_rows, result_of

    kind = kind or _kind(out)
    opened = open_catalog(catalog)
    rows, given_up, digest = read_rows(opened)
    patterns = {"subject": subject, "style": style, "method": method}

    def wanted(one: Mapping[str, Any]) -> bool:
        return all(fnmatchcase(one[name], pattern) for name, pattern in patterns.items())

    results, failed = [result_of(row) for row in rows if wanted(row)], [one for one in given_up if wanted(one)]
    if not results:
        raise NotFound(f"{catalog} has no merge that matches: `ziplora ls {catalog}` lists what it has")
    made = make_report(results, failed, title=name_of(opened.store.url), digest=digest, against=against)
    if kind == "html" and out is None:
        opened.store.put(report_page.PAGE, report_page.page(made), content_type="text/html; charset=utf-8")
        OUT.print(f"{opened.store.url}/{report_page.PAGE}", soft_wrap=True)
        return
    if kind == "html":
        text = report_page.page(made, pictures=report_page.pictures_of(opened.store, made))
    else:
        text = (report_text.csv_text if kind == "csv" else report_text.markdown)(made).encode()
    if out is None:
        click.echo(text, nl=False)
        return
    try:
        out.write_bytes(text)
    except OSError as error:
        raise click.UsageError(f"{out} cannot be written: {error.strerror}") from error
    OUT.print(str(out), soft_wrap=True)


def _kind(out: Path | None) -> str:
    suffixes = {".md": "markdown", ".csv": "csv", ".html": "html", ".htm": "html"}
    if out is None:
        return "markdown"
    if out.suffix.lower() not in suffixes:
        raise click.UsageError(f"{out} has none of the suffixes .md, .csv, .html: name the --format")
    return suffixes[out.suffix.lower()]
