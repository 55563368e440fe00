"""What a scorer's directory holds, from JSON and safetensors headers alone: whether it can judge, and its digest."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from service.errors import ManifestError
from service.inputs import DigestCache
from service.jobs import ScorerRef
from service.model_files import (
    PICKLES,
    TOKENIZER_FILES,
    WEIGHT_LIMITS,
    digest_of,
    find_on_hub,
    is_hub_id,
    read_json,
    shards,
)
from ziplora.errors import LoRAError
from ziplora.layouts import read_header_file

Kind = Literal["clip", "dino"]

MODELS: dict[Kind, tuple[str, ...]] = {  # model types of `transformers`
    "clip": ("clip",),
    # those whose first token is the class, and the one whose features are a map
    "dino": ("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "resnet"),
}
EXAMPLES: dict[Kind, str] = {"clip": "openai/clip-vit-base-patch32", "dino": "facebook/dino-vits16"}
PREPROCESSING = ("preprocessor_config.json", "processor_config.json")
FETCHED = ["*.json", "merges.txt", "model.safetensors", "model-*.safetensors"]


@dataclass(frozen=True, slots=True)
class ScorerFiles:
    """A scorer as found on this machine."""

    directory: Path
    ref: ScorerRef


def read_scorer(
    kind: Kind,
    location: str,
    revision: str | None = None,
    *,
    digests: DigestCache | None = None,
    download: bool = False,
) -> ScorerFiles:
    """A directory as `save_pretrained` writes it, or a hub id in the local hub cache (`download` fetches it).

    Raises ManifestError with everything that is wrong, one line each.
    """
    directory, commit = _find(kind, location, revision, download)
    name = f"{kind} scorer {location}"
    problems = list(_problems(kind, name, directory, on_hub=commit is not None))
    if problems:
        raise ManifestError("\n".join(problems))
    weights = _weights(name, directory)
    for path in weights:
        if path.suffix == ".safetensors":
            try:
                read_header_file(path, WEIGHT_LIMITS, name=f"{name}: {path.name}")
            except LoRAError as error:
                raise ManifestError(str(error)) from error
    settings = ("config.json", *PREPROCESSING, *(TOKENIZER_FILES if kind == "clip" else ()))
    files = [file for file in settings if (directory / file).is_file()] + [path.name for path in weights]
    return ScorerFiles(directory, ScorerRef(location, commit, digest_of(directory, files, digests or DigestCache())))


def _find(kind: Kind, location: str, revision: str | None, download: bool) -> tuple[Path, str | None]:
    """The directory, and the commit if it is a hub snapshot."""
    path = Path(location)
    if path.is_dir():
        if revision is not None:
            raise ManifestError(f"{kind} scorer {location} is a directory: a revision goes with a hub id; remove it")
        return path, None
    if path.is_file() or not is_hub_id(location):
        found = "is a file" if path.is_file() else "does not exist"
        raise ManifestError(
            f"{kind} scorer {location} {found}; expected a directory as save_pretrained writes it, or a hub id such as "
            f"{EXAMPLES[kind]}"
        )
    return find_on_hub(f"{kind} scorer", location, revision, (lambda *_: FETCHED) if download else None)


def _problems(kind: Kind, name: str, directory: Path, on_hub: bool) -> Iterator[str]:
    """What is missing or unfit; nothing else is looked at where it is another kind of model."""
    if not (directory / "config.json").is_file():
        yield f"{name} has no config.json; expected a directory as save_pretrained writes it"
        return
    found = read_json(directory / "config.json", f"{name}: config.json").get("model_type")
    if found not in MODELS[kind]:
        yield f"{name} is a {found or 'model of unknown type'}; expected {' or '.join(MODELS[kind])}"
        return
    if not any((directory / file).is_file() for file in PREPROCESSING):
        yield f"{name} has no preprocessor_config.json, which says how it wants its pictures"
    tokenizer = [(directory / file).is_file() for file in ("tokenizer.json", "vocab.json", "merges.txt")]
    if kind == "clip" and not (tokenizer[0] or all(tokenizer[1:])):
        yield f"{name} holds neither tokenizer.json nor vocab.json with merges.txt"
    if not _weights(name, directory):
        pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)
        # CLIP ViT-B/32 and DINO ViT-S/16 among them
        elsewhere = "; some models of the hub have it in a revision such as refs/pr/15 only" if on_hub else ""
        yield (
            f"{name} has only {pickles[0]}, a format that can run code when it is loaded; expected model.safetensors: "
            f"load it where you trust it and write it with model.save_pretrained(DIRECTORY){elsewhere}"
            if pickles
            else f"{name} has no weights; expected model.safetensors or its shards{elsewhere}"
        )


def _weights(name: str, directory: Path) -> list[Path]:
    """The files that transformers would load, the index of shards first; [] if there are none."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    return [index, *shards(index, f"{name}: {index.name}")] if index.is_file() else []
