"""Where the files of an entry go when they leave a catalog, for each tool that loads LoRAs. Values only.

What the tools look for, as read in their sources:

    A1111, Forge   <stem>.json ("activation text", "description" …; ui_extra_networks_user_metadata.py) and <stem>.png
    InvokeAI       the same two (backend/model_manager/util/lora_metadata_extractor.py), words split at commas
    ComfyUI        <stem>.png (app/model_manager.py); trigger words from the header's modelspec.trigger_phrase, and
                   <stem>.txt as notes (ComfyUI-Custom-Scripts)
    diffusers      a directory with pytorch_lora_weights.safetensors; with README.md beside it, a Hub repository
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from service.entry import Entry, Object
from service.model_card import WEIGHTS, Picture, model_card, triggers

LORA, CARD, PREVIEW = "merged.safetensors", "merged.json", "merged.png"  # object names
MAX_PICTURES = 9  # in a model card


@dataclass(frozen=True, slots=True)
class Placed:
    """A file to be, below the destination: an object of the entry, or content made here."""

    path: PurePosixPath
    source: Object | bytes


@dataclass(frozen=True, slots=True)
class Shown:
    """What sidecars say beyond the entry: the base's hub id, which an entry does not know, and the style strength that
    the samples beside a LoRA are to have."""

    base_model: str | None = None
    style_strength: float = 1.0


@dataclass(frozen=True, slots=True)
class Layout:
    name: str
    summary: str
    place: Callable[[Entry, str, Shown], list[Placed]]  # (entry, stem, …)


def placed(layout: str, entry: Entry, stem: str, extras: Iterable[str] = (), shown: Shown = Shown()) -> list[Placed]:
    """All files of an entry: what the layout wants, and in a directory `<stem>/` the objects that `extras` match.

    None without a merged LoRA. ValueError for an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout} is unknown; one of {', '.join(LAYOUTS)}")
    if LORA not in entry.objects:
        return []
    files = LAYOUTS[layout].place(entry, stem, shown)
    extras = tuple(extras)
    names = [name for name in entry.objects if any(fnmatchcase(name, pattern) for pattern in extras)]
    taken = {str(file.path).casefold() for file in files}
    beside = [Placed(PurePosixPath(stem, name), entry.objects[name]) for name in names if name not in MAIN]
    return files + [file for file in beside if str(file.path).casefold() not in taken]


def _sidecars(entry: Entry, stem: str, shown: Shown) -> list[Placed]:
    return _present(entry, {name: f"{stem}.{name.partition('.')[2]}" for name in MAIN})


def _comfyui(entry: Entry, stem: str, shown: Shown) -> list[Placed]:
    lines = [
        f"Trigger words: {triggers(entry)}",
        *(f"Sample: {prompt}" for _, prompt in samples(entry, shown.style_strength)),
    ]
    notes = "\n".join(dict.fromkeys(" ".join(line.split()) for line in lines)) + "\n"
    files = _present(entry, {LORA: f"{stem}.safetensors", PREVIEW: f"{stem}.png"})
    return [*files, Placed(PurePosixPath(f"{stem}.txt"), notes.encode(errors="replace"))]


def _diffusers(entry: Entry, stem: str, shown: Shown) -> list[Placed]:
    gallery = samples(entry, shown.style_strength)[:MAX_PICTURES]
    pictures = [Picture(f"images/{number:03}.png", prompt) for number, (_, prompt) in enumerate(gallery)]
    files = [Placed(PurePosixPath(stem, WEIGHTS), entry.objects[LORA])]
    files += [
        Placed(PurePosixPath(stem, picture.path), entry.objects[name])
        for picture, (name, _) in zip(pictures, gallery, strict=True)
    ]
    card = model_card(entry, pictures, shown.base_model, shown.style_strength)
    return [*files, Placed(PurePosixPath(stem, "README.md"), card.encode(errors="replace"))]


def samples(entry: Entry, style_strength: float = 1.0) -> list[tuple[str, str]]:
    """(object name, prompt) of the samples at this style strength, in their order; what the report says is not trusted
    to be there."""
    listed = entry.report.get("samples")
    known = {
        item["object"]: item
        for item in (listed if isinstance(listed, list) else [])
        if isinstance(item, dict) and isinstance(item.get("object"), str) and isinstance(item.get("prompt"), str)
    }
    names = sorted(name for name in entry.objects if name.startswith("samples/") and name.endswith(".png"))
    return [
        (name, known[name]["prompt"] if name in known else triggers(entry))
        for name in names
        if known.get(name, {}).get("style_strength", 1.0) == style_strength
    ]


def _present(entry: Entry, names: dict[str, str]) -> list[Placed]:
    return [Placed(PurePosixPath(path), entry.objects[name]) for name, path in names.items() if name in entry.objects]


MAIN = (LORA, CARD, PREVIEW)
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("flat", "<stem>.safetensors, .json and .png side by side, which suits every tool below", _sidecars),
        Layout("a1111", "A1111 and Forge: DEST is models/Lora or a directory in it", _sidecars),
        Layout("comfyui", "ComfyUI: DEST is models/loras or a directory in it", _comfyui),
        Layout("invokeai", "InvokeAI: DEST is scanned in its model manager", _sidecars),
        Layout(
            "diffusers", "a directory per LoRA for load_lora_weights, ready to go to the Hugging Face Hub", _diffusers
        ),
    )
}
