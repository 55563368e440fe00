"""The subjects and styles of a manifest: ids, where LoRAs and images lie, how a LoRA is trained that is not given.

Ids become keys of the catalog and file names on any system, so they hold no separator.
"""

from collections.abc import Iterator
from typing import Any

from service.errors import StorageError
from service.jobs import Role
from service.locations import is_pattern, matches
from service.manifest_checks import check_lora, check_training
from service.manifest_reading import ID, ID_RULE, Reading
from service.manifest_specs import LoRASpec
from service.wording import FieldPath, field_name, shown

WINDOWS_NAMES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}


def read_loras(reading: Reading, role: str) -> Iterator[LoRASpec]:
    """The subjects or the styles, but for those whose fields have a fault, which is reported."""
    seen: dict[str, str] = {}
    for id, entry in reading.section(role).items():
        _check_id(reading, role, id, seen)
        if not isinstance(entry, dict):
            continue
        lora = reading.location((role, id, "lora"), entry.get("lora"))
        images = tuple(_images(reading, (role, id, "images"), entry.get("images", [])))
        if not entry.get("lora") and not entry.get("images"):
            reading.problem(
                (role, id, "lora"),
                "missing; expected the LoRA file: a path or s3://bucket/key, or else images, to train one on",
            )
        if entry.get("lora") and "training" in entry:
            reading.problem((role, id, "training"), "given beside lora, which is trained already; keep one of them")
        checked = check_lora(entry)
        if checked:
            kind: Role = "subject" if role == "subjects" else "style"
            training = _training(reading) | checked.training.model_dump(exclude_unset=True)
            texts = checked.prompt, checked.trigger
            yield LoRASpec(id, kind, lora, *texts, images, checked.weight, training, checked.priority)


def _training(reading: Reading) -> dict[str, Any]:
    """The manifest's own settings, the paper's where it has none."""
    section = check_training(reading.raw.get("training", {}))
    return section.model_dump() if section is not None else {}


def _check_id(reading: Reading, role: str, id: str, seen: dict[str, str]) -> None:
    twin = seen.setdefault(id.lower(), id)
    if not ID.fullmatch(id):
        reading.problem((role, id), f"the id {shown(id)} cannot be used; expected {ID_RULE}")
    elif id.lower().split(".")[0] in WINDOWS_NAMES or id.endswith("."):
        reading.problem((role, id), f"the id {shown(id)} cannot be a file name on Windows; rename it")
    elif twin != id:
        line = reading.lines[role, twin]
        reading.problem((role, id), f"the id differs from {twin} on line {line} by case alone; rename one of them")


def _images(reading: Reading, field: FieldPath, images: Any) -> Iterator[str]:
    """Single images as written, patterns in sorted order; each image once."""
    seen: dict[str, FieldPath] = {}
    several = isinstance(images, list)
    for i, text in enumerate(images if several else [images]):
        own = (*field, i) if several else field
        for location in _expanded(reading, own, reading.location(own, text)):
            if location in seen:
                reading.problem(own, f"{location} is already in {field_name(seen[location])}; name each image once")
            seen.setdefault(location, own)
            yield location


def _expanded(reading: Reading, field: FieldPath, location: str) -> list[str]:
    if not is_pattern(location):
        return [location] if location else []
    try:
        found = matches(location)
    except StorageError as error:
        reading.problem(field, f"{location} could not be listed: {error}")
        return []
    if not found:
        reading.problem(field, f"{location} matches no file; expected an image, or leave images out")
    return found
