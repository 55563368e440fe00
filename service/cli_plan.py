"""`ziplora plan`, `inspect`, `methods`, `schema`: what can be known before anything runs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from service.console import OUT, counted, size_text, tracked
from ziplora.errors import LoRAError

if TYPE_CHECKING:
    from service.manifest import Manifest
    from service.plan import Plan


@click.command()
@click.argument("manifest")
@click.option("--output", help="Catalog to use instead of the manifest's.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@click.option("--download", is_flag=True, help="Fetch a base that is a hub id and not in the local hub cache.")
def plan(manifest: str, output: str | None, as_json: bool, download: bool) -> None:
    """Check MANIFEST and every file it names, and say what a run would do. Needs neither GPU nor Ray."""
    planned, _ = make_plan(manifest, output, download)
    if as_json:
        from service.plan_json import plan_json

        click.echo(json.dumps(plan_json(planned), indent=2))
    else:
        print_plan(planned)
    planned.check()


def make_plan(manifest: str, output: str | None, download: bool) -> "tuple[Plan, Manifest]":
    import dataclasses

    from service.manifest import read_manifest
    from service.plan import plan as make
    from service.storage import open_store

    read = read_manifest(manifest)
    if output is not None:
        read = dataclasses.replace(read, output=open_store(output).url)
    return make(read, download=download, watch=lambda steps: tracked(steps, "checking LoRAs")), read


def print_plan(planned: "Plan") -> None:
    from service.plan_text import summary_lines

    for line in summary_lines(planned):
        OUT.print(line, soft_wrap=True)


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Figures of its updates, .png or .svg.")
@click.option("--beside", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A style, for --plot.")
@click.option("--mergers", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Of a merge, for --plot.")
def inspect(file: Path, as_json: bool, plot: Path | None, beside: Path | None, mergers: Path | None) -> None:
    """What a LoRA FILE holds: layout, ranks, alphas, targets, trigger words, and what would be refused."""
    from dataclasses import asdict

    from ziplora.layouts import inspect_file

    seen = inspect_file(file)
    if as_json:
        click.echo(json.dumps(asdict(seen), indent=2, default=str))
    else:
        table = Table(show_header=False, box=None, title=seen.name, title_justify="left")
        of = f" of the base's {seen.n_targets_of_base}" if seen.n_targets_of_base else ""
        rows = {
            "layout": seen.layout,
            "size": size_text(seen.n_bytes),
            "base": f"{seen.base or 'unknown'} by structure"
            + (f", {seen.stated_base} as stated" if seen.stated_base else ""),
            "dtype": counted(seen.dtypes, "tensors"),
            "ranks": counted(seen.ranks, "modules"),
            "alphas": counted(seen.alphas, "modules"),
            "merge targets": f"{seen.n_targets}{of}",
            "carried along": counted(seen.carried, "modules") or "none",
            "trigger words": ", ".join(seen.triggers) or "none stated",
            "notes": "\n".join(seen.notes),
            "refused": "\n".join(seen.refusals),
        }
        for name, value in rows.items():
            if value:
                table.add_row(name, str(value))
        OUT.print(table)
    if seen.refusals:
        raise LoRAError(f"{seen.name} cannot be merged: {seen.refusals[0]}")
    if plot is not None:
        from service.cli_plots import plotted

        plotted(file, plot, beside, mergers)


@click.command()
def methods() -> None:
    """The merge methods that a manifest can name, with their settings."""
    from dataclasses import fields

    from service.yaml_text import flow
    from ziplora.methods import METHODS

    for method in METHODS.values():
        knobs = {
            field.name: list(field.default) if isinstance(field.default, tuple) else field.default
            for field in fields(method.knobs)
        }
        rows = {
            "does": method.summary,
            "yields": method.yields,
            "costs": method.cost,
            "settings": flow(knobs).strip("{}") or "none",
            "paper": method.paper,
        }
        _print_method(method.name, rows)
    of = "several methods on each pair, the one with the highest score kept: {method: best, of: [direct, ziplora]}"
    _print_method("best", {"does": of})


def _print_method(name: str, rows: dict[str, str]) -> None:
    OUT.print(name, style="bold")
    table = Table(show_header=False, box=None, padding=(0, 2))
    for row in rows.items():
        table.add_row(*row)
    OUT.print(table)


@click.command()
def schema() -> None:
    """The JSON schema of a manifest, for editors that check YAML."""
    from service.manifest_schema import manifest_schema

    click.echo(json.dumps(manifest_schema(), indent=2))


COMMANDS = (plan, inspect, methods, schema)
