"""Reference pictures for pages: from a manifest's images, and small ones in a catalog where somebody asked for them.

A catalog knows its references by their digests only. They are published in it on request and never by themselves:
they may be pictures of people.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence

from service.entry import Entry
from service.errors import BadInput, StorageError
from service.manifest import read_manifest
from service.manifest_specs import LoRASpec
from service.storage import Store, split_location
from service.study import Question
from service.thumbnails import thumbnail

SIDE = 512  # pixels
PREFIX = "pages/references/"
KEY = re.compile(rf"{PREFIX}(.+)-[0-9a-f]{{12}}\.webp")
OTHER = re.compile(r"[^A-Za-z0-9_-]")


def first_pictures(manifest: str) -> dict[tuple[str, str], bytes]:
    """The first reference image of each subject and style that has one, by (role, id)."""
    return {(spec.role, spec.id): _read(spec.images[0]) for spec in _specs(manifest) if spec.images}


def put_references(store: Store, pictures: Mapping[tuple[str, str], bytes]) -> None:
    """Publish one small picture per (role, id), for the heads of rows and columns. BadInput for what is none, before
    any is published."""
    smalls = {of: _small(content, *of) for of, content in pictures.items()}
    for (role, id), small in smalls.items():
        key = f"{PREFIX}{name_of(role, id)}-{hashlib.sha256(small).hexdigest()[:12]}.webp"
        store.put(key, small, content_type="image/webp")


def stored_references(store: Store) -> dict[str, str]:
    """`subject-dog` → key, for those that somebody has put there."""
    return {match[1]: match[0] for found in store.list(PREFIX) if (match := KEY.fullmatch(found.key))}


def name_of(role: str, id: str) -> str:
    return f"{role}-{OTHER.sub('_', id)}"


def reference_bytes(
    store: Store, questions: Sequence[Question], entries: Iterable[Entry], manifest: str | None
) -> dict[tuple[str, str], bytes]:
    """WebP pictures by (role, id) of all that is asked about. From the manifest only those whose sha256 is one that the
    merges were made with. BadInput when one is missing."""
    needed = sorted({("subject", one.subject) for one in questions} | {("style", one.style) for one in questions})
    found: dict[tuple[str, str], bytes] = {}
    if manifest is None:
        stored = stored_references(store)
        found = {(role, id): store.get(stored[key]) for role, id in needed if (key := name_of(role, id)) in stored}
    else:
        digests = {sha256 for entry in entries for role in ("subject", "style") for sha256 in _images(entry, role)}
        for spec in _specs(manifest):
            for content in map(_read, spec.images if (spec.role, spec.id) in needed else ()):
                if hashlib.sha256(content).hexdigest() in digests:
                    found[spec.role, spec.id] = _small(content, spec.role, spec.id)
                    break
    missing = [f"{role} {id}" for role, id in needed if (role, id) not in found]
    if missing:
        where = f"{manifest} has none" if manifest else f"{store.url} has none"
        raise BadInput(
            f"no reference picture of {', '.join(missing[:5])}{' …' * (len(missing) > 5)}: {where} that the merges were"
            " made with; name the manifest that they were made from with --references"
        )
    return found


def _specs(manifest: str) -> tuple[LoRASpec, ...]:
    read = read_manifest(manifest)
    return (*read.subjects, *read.styles)


def _images(entry: Entry, role: str) -> list[str]:
    images = entry.job[role].get("images")
    return images if isinstance(images, list) else []


def _small(content: bytes, role: str, id: str) -> bytes:
    try:
        return thumbnail(content, SIDE)
    except ValueError as error:
        raise BadInput(f"the reference picture of {role} {id} cannot be shown: {error}") from error


def _read(location: str) -> bytes:
    try:
        store, key = split_location(location)
        return store.get(key)
    except StorageError as error:
        raise BadInput(f"reference picture {location} cannot be read: {error}") from error
