"""A manifest and the files beside it, packed to travel: to a cluster's job server, or into object storage.

What is written with a relative path travels, at the same relative path, so that the manifest stays as it is, to the
byte: its digest, and the lines that messages name, are those of the user's file. An absolute path names a file of the
cluster's machines, and `s3://…` one that they reach themselves; neither is touched here.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import ManifestError, NotFound
from service.files import local_errors, make_directories
from service.inputs import DigestCache, open_input
from service.locations import is_pattern, matches, resolve_location
from service.manifest import Manifest
from service.model_files import is_hub_id
from service.steps import Steps, parallel
from service.storage import Store
from service.wording import FieldPath
from service.yaml_text import read_yaml


@dataclass(frozen=True, slots=True)
class Parcel:
    """`manifest`: its path within the parcel. `files`: path within the parcel → local file, the manifest among them.
    `there`: absolute paths that the manifest names, to be found on the cluster's machines."""

    manifest: str
    files: Mapping[str, Path]
    there: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


def pack(manifest: Manifest) -> Parcel:
    """What has to travel with a local manifest. ManifestError for files that are not there, and for a relative output,
    which would be lost with the job's directory."""
    source = Path(os.path.abspath(Path(manifest.name).expanduser()))  # no `..` in what becomes a key
    found, there, problems = [source], [], []
    for field, text, is_model in _locations(read_yaml(manifest.source).value):
        if text.startswith(("/", "~")):
            there.append(text)
        elif not text.startswith("s3://"):
            try:
                named = _files(text, source.parent, is_model)
                found += named
                if "images" in field:  # with what each of them is trained on as
                    found += [caption for path in named if (caption := path.with_suffix(".txt")).is_file()]
            except NotFound as error:
                problems.append(f"{manifest.where(*field)}: {error}")
    if problems:
        raise ManifestError("\n".join(problems))
    root = Path(os.path.commonpath([path.parent for path in found]))
    files = {path.relative_to(root).as_posix(): path for path in found}
    return Parcel(source.relative_to(root).as_posix(), files, tuple(there))


def run_name(manifest_digest: str, catalog: str) -> str:
    """What all attempts at one manifest into one catalog have in common, on Ray and on Kubernetes: 24 characters."""
    return f"ziplora-{hashlib.sha256(f'{manifest_digest} {catalog}'.encode()).hexdigest()[:16]}"


def check_output(manifest: Manifest, output: str | None) -> None:
    """ManifestError unless the catalog lies where a cluster can write it: in object storage, or at an absolute path.

    output: what the user gives in place of the manifest's.
    """
    written = str(read_yaml(manifest.source).value["output"]).strip() if output is None else output
    if not written.startswith(("s3://", "/", "~", "file://")):
        where = f"{manifest.where('output')}: " if output is None else "--output: "
        raise ManifestError(
            f"{where}{written} is a relative path, which on a cluster would vanish with the job; expected"
            " s3://bucket/prefix, or an absolute directory that all of its machines share"
        )


def lay_out(parcel: Parcel, directory: Path) -> None:
    """Copies of the parcel's files in `directory`."""
    for name, path in parcel.files.items():
        target = directory / name
        with local_errors(path):
            make_directories(target.parent)
            shutil.copyfile(path, target)


def upload(parcel: Parcel, store: Store, threads: int = 4) -> tuple[str, Steps[str]]:
    """(key of the manifest, one step per file) of the parcel in object storage, below a prefix named by its content.

    What lies there already is not sent again. Raises NotFound, StoreFull, Unavailable, AccessDenied.
    """
    digests = DigestCache()
    lines = (f"{name} {open_input(path, digests).sha256()}" for name, path in sorted(parcel.files.items()))
    prefix = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def send(item: tuple[str, Path]) -> str:
        name, path = item
        key = f"{prefix}/{name}"
        try:
            there = store.head(key).size == path.stat().st_size  # its prefix names its content
        except NotFound:
            there = False
        if not there:
            store.put(key, path)
        return name

    # the manifest last: where it is, everything is
    items = sorted(parcel.files.items(), key=lambda item: item[0] == parcel.manifest)
    last = items.pop()
    return f"{prefix}/{parcel.manifest}", Steps(
        len(items) + 1, lambda: _then(parallel(send, items, threads), send, last)
    )


def _then(steps: Iterator[str], send: Any, last: tuple[str, Path]) -> Iterator[str]:
    yield from steps
    yield send(last)


def _locations(raw: Mapping[str, Any]) -> Iterator[tuple[FieldPath, str, bool]]:
    """(field, what is written, whether it is a model) for everything that a checked manifest reads from disk."""
    for role in ("subjects", "styles"):
        for id, entry in raw[role].items():
            if entry.get("lora"):
                yield (role, id, "lora"), entry["lora"].strip(), False
            images = entry.get("images", [])
            for text in images if isinstance(images, list) else [images]:
                yield (role, id, "images"), text.strip(), False
    models: list[tuple[FieldPath, Any]] = [(("base",), raw["base"])]
    models += [(("scores", kind), model) for kind, model in (raw.get("scores") or {}).items() if model is not None]
    merges = raw.get("merge")
    for i, merge in enumerate(merges if isinstance(merges, list) else [merges]):
        if isinstance(merge, dict) and merge.get("base") is not None:
            models.append((("merge", i, "base") if isinstance(merges, list) else ("merge", "base"), merge["base"]))
    for field, model in models:
        yield field, (model["location"] if isinstance(model, dict) else model).strip(), True


def _files(text: str, directory: Path, is_model: bool) -> list[Path]:
    """The local files that a relative location means; none for a hub id. NotFound."""
    path = resolve_location(text, str(directory))
    if is_pattern(path):
        return [Path(one) for one in matches(path)]
    if is_model and os.path.isdir(path):
        return sorted(one for one in Path(path).rglob("*") if one.is_file())
    if is_model and is_hub_id(text):
        return []
    if not os.path.isfile(path):
        raise NotFound(f"{path} does not exist, so it cannot travel to the cluster; correct it, or write where the "
                       "cluster finds it: an absolute path or s3://bucket/key")  # fmt: skip
    return [Path(path)]
