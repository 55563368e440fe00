"""As much of kustomize as deploy/kustomize uses: resources, and patches in the form of JSON Patch (RFC 6902). So a
manifest is rendered without any other program; `kubectl kustomize DIR` gives the same documents.

Everything else that a kustomization can say is refused, not passed over.
"""

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from service.errors import BadInput

Document = dict[str, Any]
KNOWN = {"apiVersion", "kind", "resources", "patches"}


class _Dumper(yaml.SafeDumper):
    """No anchors; texts of several lines as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def build(directory: Path) -> list[Document]:
    """The documents of a kustomization, patched. BadInput for what this does not know."""
    kustomization = _kustomization(directory)
    documents: list[Document] = []
    for name in kustomization.get("resources", []):
        path = directory / name
        if path.is_dir():
            documents += build(path)
        else:
            documents += [_apart(one) for one in yaml.safe_load_all(path.read_text()) if one]
    return patched(documents, directory)


def patched(documents: Sequence[Document], directory: Path) -> list[Document]:
    """The documents with the patches of a kustomization or component."""
    documents = list(documents)
    for entry in _kustomization(directory).get("patches", []):
        kind = entry["target"]["kind"]
        meant = [i for i, document in enumerate(documents) if document["kind"] == kind]
        if not meant or set(entry["target"]) != {"kind"}:
            raise BadInput(f"{directory}: a patch is for {entry['target']}, which nothing is; expected a kind that is")
        for i in meant:
            documents[i] = json_patched(documents[i], yaml.safe_load(entry["patch"]))
    return documents


def json_patched(document: Document, operations: Iterable[dict[str, Any]]) -> Document:
    """RFC 6902: add, replace, remove. BadInput for a path that is not there and other operations."""
    document = copy.deepcopy(document)
    for operation in operations:
        *path, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        target: Any = document
        try:
            for part in path:
                target = target[int(part)] if isinstance(target, list) else target[part]
            key: Any = int(last) if isinstance(target, list) and last != "-" else last
            match operation["op"]:
                case "add" if isinstance(target, list):
                    target.insert(len(target) if last == "-" else key, copy.deepcopy(operation["value"]))
                case "add":
                    target[key] = copy.deepcopy(operation["value"])
                case "replace":
                    target[key]  # must be there
                    target[key] = copy.deepcopy(operation["value"])
                case "remove":
                    del target[key]
                case other:
                    raise BadInput(f"a patch wants to {other}; add, replace and remove are known")
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise BadInput(f"a patch of {document['kind']} names {operation['path']}, which is not there") from error
    return document


def to_yaml(documents: Iterable[Document]) -> str:
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=10_000, allow_unicode=True)


def _kustomization(directory: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load((directory / "kustomization.yaml").read_text())
    except OSError as error:
        raise BadInput(f"{directory} is no kustomization: {error.strerror}") from error
    if strange := set(content) - KNOWN:
        raise BadInput(f"{directory}/kustomization.yaml has {', '.join(sorted(strange))}, which is not known here")
    return content


def _apart(value: Any) -> Any:
    """A copy in which what anchors share is written out, or one patch would change several places."""
    if isinstance(value, dict):
        return {key: _apart(one) for key, one in value.items()}
    return [_apart(one) for one in value] if isinstance(value, list) else value
