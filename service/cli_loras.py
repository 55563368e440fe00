"""`ziplora loras`: the LoRAs that runs trained from a manifest's pictures, listed and copied. Options and printing."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path, PurePosixPath

import click
from rich.table import Table

from service.cli_options import CATALOG_HELP, open_catalog
from service.console import OUT, left_out, size_text, tracked
from service.errors import Corrupted
from service.pull import write
from service.steps import Steps
from service.storage import Store
from service.trained import TrainedLoRA, TrainedLoRAs


@click.command(epilog=CATALOG_HELP)
@click.argument("catalog")
@click.argument("dest", required=False, type=click.Path(file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True)
def loras(catalog: str, dest: Path | None, as_json: bool) -> None:
    """List the LoRAs that runs trained in CATALOG, from manifests that give images only, and StyleDrop's adapters
    (`-amused`); with DEST, copy them there."""
    store = open_catalog(catalog).store
    found = list(TrainedLoRAs(store).all(left_out))
    if as_json:
        for lora in found:
            click.echo(json.dumps({**asdict(lora), "created": lora.created.isoformat()}))
    else:
        OUT.print(_table(found))
    if dest is not None:
        names = list(_names(found))
        copies = Steps(len(found), lambda: (_copied(store, *one, dest) for one in zip(found, names, strict=True)))
        states = Counter(tracked(copies, "copying LoRAs"))
        OUT.print(f"{dest}: {states['pulled']} copied, {states['kept']} were there", soft_wrap=True)


def _table(found: Iterable[TrainedLoRA]) -> Table:
    table = Table()
    table.add_column("LoRA", no_wrap=True)
    for title in ("trained as", "images", "rank", "steps", "size", "training"):
        table.add_column(title)
    for lora in found:
        settings = lora.training.get("settings", {})
        # an adapter has no prompt but its captions
        table.add_row(
            lora.called,
            str(settings.get("prompt") or next(iter(lora.training.get("captions", ())), "")),
            str(len(lora.training.get("images", ()))),
            str(settings.get("rank")),
            str(settings.get("steps")),
            size_text(lora.size),
            lora.training_id[:12],
        )
    return table


def _names(found: Iterable[TrainedLoRA]) -> Iterator[str]:
    """A file's name each; with the training's id where several are called the same."""
    found = list(found)
    called = Counter(lora.name.casefold() for lora in found)
    for lora in found:
        same = called[lora.name.casefold()] > 1
        yield f"{lora.name}-{lora.training_id[:12]}.safetensors" if same else f"{lora.name}.safetensors"


def _copied(store: Store, lora: TrainedLoRA, name: str, dest: Path) -> str:
    content = store.get(lora.key)
    if len(content) != lora.size or hashlib.sha256(content).hexdigest() != lora.sha256:
        raise Corrupted(
            f"{store.url}/{lora.key} is not what its record says: remove loras/ of {lora.training_id[:12]}…"
        )
    return write(content, dest, PurePosixPath(name))
