"""`ziplora pull`, `verify` …: how files leave a catalog, and its care. Options and what is printed."""

from pathlib import Path

import click

from service.cli_options import CATALOG_HELP, filtered, open_catalog
from service.console import OUT, complain, size_text, tracked
from service.errors import NotFound


@click.command(epilog=CATALOG_HELP)
@click.argument("catalog")
@click.argument("dest", type=click.Path(file_okay=False, path_type=Path))
@filtered
@click.option("--samples", is_flag=True, help="All sample images too, not only the preview.")
@click.option("--mergers", is_flag=True, help="The merger coefficients too.")
def pull(catalog: str, dest: Path, subject: str, style: str, method: str, samples: bool, mergers: bool) -> int:
    """Copy merged LoRAs from CATALOG to the directory DEST, verified; run again to go on after a cut."""
    extras = [*(["samples/*"] if samples else []), *(["mergers.safetensors"] if mergers else []), "peft.safetensors"]
    steps = open_catalog(catalog).pull(dest, subject, style, method, extras)
    if not len(steps):
        raise NotFound(
            f"{catalog} has nothing that matches subject {subject}, style {style}, method {method}:"
            f" `ziplora ls {catalog}` lists what it has"
        )
    counts: dict[str, int] = {}
    n_bytes = 0
    for pulled in tracked(steps, "pulling"):
        counts[pulled.state] = counts.get(pulled.state, 0) + 1
        n_bytes += pulled.size if pulled.state in ("pulled", "resumed") else 0
        if pulled.problem:
            complain(f"{pulled.path.name}: {pulled.problem}", "refused")
    OUT.print(
        f"{dest}: "
        + ", ".join(f"{number} {state}" for state, number in sorted(counts.items()))
        + f" ({size_text(n_bytes)})",
        soft_wrap=True,
    )
    return 1 if counts.get("failed") else 0


@click.command(epilog=CATALOG_HELP)
@click.argument("catalog")
@filtered
def verify(catalog: str, subject: str, style: str, method: str) -> int:
    """Read every object of CATALOG and compare it with the sha256 in its entry."""
    bad = n = 0
    for checked in tracked(open_catalog(catalog).verify(subject, style, method), "verifying"):
        n += 1
        if checked.problem:
            bad += 1
            OUT.print(f"{checked.key}: {checked.problem}", soft_wrap=True)
    OUT.print(f"{n} objects, {bad} not as promised")
    return 1 if bad else 0


COMMANDS = (pull, verify)
