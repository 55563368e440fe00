"""Directories of models as diffusers and transformers write them: found in the local hub cache, their JSON, shards and
digest. What is in them is read in base_files.py and scorer_files.py."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from service.errors import ManifestError
from service.inputs import DigestCache, open_input
from ziplora.layouts import Limits

TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5")
WEIGHT_LIMITS = Limits(max_bytes=2**40)  # SDXL's UNet in fp32 has 10 GB in one file
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
MAX_JSON_BYTES = 32 * 2**20


def is_hub_id(location: str) -> bool:
    return HUB_ID.fullmatch(location) is not None


def find_on_hub(
    what: str, repo: str, revision: str | None, download: Callable[[str, str | None], list[str]] | None
) -> tuple[Path, str]:
    """The snapshot in the local hub cache and its commit; `download` says which files to fetch first, None: nothing.

    Raises ManifestError, which calls the model `what`.
    """
    # half a second that other commands need not wait for; and with it comes tqdm, which reads TQDM_DISABLE only once
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        patterns = download(repo, revision) if download else None
        found = Path(snapshot_download(repo, revision=revision, local_files_only=not download, allow_patterns=patterns))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        at = f" at revision {revision}" if revision else ""
        raise ManifestError(
            f"{what} {repo}{at} is no directory and not in the local hub cache; fetch it once with `hf download {repo}"
            f"{f' --revision {revision}' if revision else ''}`, or allow the download"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ManifestError(f"{what} {repo} could not be fetched from the hub: {str(error).splitlines()[0]}") from error
    return found, found.name  # a snapshot's directory is named after its commit


def shards(index: Path, where: str) -> list[Path]:
    """The shards that an index names, each of them there and beside it. ManifestError calls the index `where`."""
    weight_map = read_json(index, where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ManifestError(f"{where} has no weight_map; fetch the model again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ManifestError(f"{where} names {name!r}; expected safetensors files beside it")
        if not (index.parent / name).is_file():
            raise ManifestError(f"{where} names {name}, which is missing; fetch the model again")
    return [index.parent / name for name in names]


def read_json(path: Path, where: str = "") -> dict[str, Any]:
    """An object from a JSON file of bounded size. ManifestError calls the file `where`."""
    where = where or f"base {path.parent}: {path.name}"
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ManifestError(f"{where} is {path.stat().st_size:,} bytes; at most {MAX_JSON_BYTES:,} are read")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ManifestError(f"{where} is no JSON ({error}); fetch the model again") from error
    if not isinstance(value, dict):
        raise ManifestError(f"{where} holds {type(value).__name__}; expected an object")
    return value


def digest_of(directory: Path, files: Iterable[str], remembered: DigestCache) -> str:
    """sha256 over the sorted (relative path, sha256) of the files."""
    names = sorted(files)
    with ThreadPoolExecutor(4) as pool:  # hashlib releases the GIL
        digests = list(pool.map(lambda name: open_input(directory / name, remembered).sha256(), names))
    lines = "".join(f"{digest}  {name}\n" for name, digest in zip(names, digests, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()
