"""`ziplora index`, `gallery`, `watch`, `study …`: options and what is printed; the work is index.py's, pages.py's, …"""

import click

from service.cli_options import CATALOG_HELP, open_catalog
from service.console import OUT, left_out


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


COMMANDS = (index,)
