"""What the commands on catalogs share: the argument's help, the filters, and opening it."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from service.catalog import Catalog

F = TypeVar("F", bound=Callable[..., Any])
CATALOG_HELP = "CATALOG is a directory or s3://bucket/prefix."
FILTERS = (
    click.option("--subject", default="*", help="Pattern of subject ids, such as 'dog*'."),
    click.option("--style", default="*", help="Pattern of style ids."),
    click.option("--method", default="*", help="Pattern of merge methods."),
)


def filtered(command: F) -> F:
    """The command with --subject, --style and --method."""
    for option in reversed(FILTERS):
        command = option(command)
    return command


def open_catalog(location: str) -> Catalog:
    """The catalog, once it has answered a first request; NotFound, AccessDenied, Unavailable."""
    catalog = Catalog(location)
    catalog.store.probe(write=False)
    return catalog
