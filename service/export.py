"""A merge at another style strength, from what the catalog keeps: no merge is done again, and no GPU is needed.

In every merged file whose method keeps the two LoRAs apart, the rows from `subject_rank` on are the style's
(`lora.stacked`), so that a strength is a factor on them: ΔW = ΔW_c·diag(m_c) + w_s·ΔW_s·diag(m_s), as in the style
control of arXiv 2311.13600v2. There are two ways to it. From the published file, whose values were rounded to fp16: the
style's are then rounded once more. From both source LoRAs and the kept mergers: what a merge at this strength would
have published, value for value.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import torch

from service.entry import Entry, Object, why_no_lora
from service.errors import BadInput, Corrupted
from service.pull_layouts import CARD, LORA, PREVIEW, samples
from service.storage import Store, sha256_of, split_location
from ziplora import formats
from ziplora.headers import Header, read_header_bytes
from ziplora.lora import LoRA, Mergers, restyled, scaled, stacked, zipped

MERGERS = "mergers.safetensors"
UNMERGED = ("direct",)  # whose halves are the LoRAs as they are: it has no mergers and needs none


def export(
    store: Store,
    entry: Entry,
    style_strength: float,
    *,
    sources: tuple[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
) -> dict[str, bytes]:
    """`merged.safetensors` at this style strength, with its sidecar, and a preview where a sample was made at it.

    `sources` are the subject's and the style's LoRA, for the exact way. Raises BadInput when the method mixes the two
    so that no strength can be changed, or the sources are others; Corrupted, FormatError.
    """
    content, name = _content(store, entry.objects.get(LORA), entry), f"{LORA} of {_pair(entry)}"
    header = read_header_bytes(content, name)
    rank = _subject_rank(header, entry)
    title = f"{header.metadata.get('modelspec.title', _pair(entry))}, style {style_strength:g}"
    own = {"ziplora.style_strength": repr(style_strength), "modelspec.title": title, "ss_output_name": title}
    if sources is None and dtype is torch.float16:
        files = {
            LORA: formats.restyle_kohya(
                content, subject_rank=rank, style_strength=style_strength, metadata=own, name=name
            )
        }
    else:
        if sources is None:
            lora = restyled(formats.read_lora(content, name=name).lora, rank, style_strength)
        else:
            subject, style = halves(store, entry, sources)
            lora = stacked([subject, scaled(style, style_strength)])
        kept = {key: value for key, value in header.metadata.items() if not key.startswith("ss_network_")}
        kept.pop("sshs_model_hash", None)
        files = {
            LORA: formats.write_kohya(lora, metadata={**kept, **own}, architecture=_architecture(entry), dtype=dtype)
        }
    if card := entry.objects.get(CARD):
        files[CARD] = _content(store, card, entry)
    for name, _ in samples(entry, style_strength)[:1]:
        files[PREVIEW] = _content(store, entry.objects[name], entry)
    return files


def halves(store: Store, entry: Entry, sources: tuple[str, str]) -> tuple[LoRA, LoRA]:
    """ΔW_c·diag(m_c) and ΔW_s·diag(m_s) of Eq. 2, from the LoRAs that were merged and the mergers that were kept."""
    loras = []
    for role, location in zip(("subject", "style"), sources, strict=True):
        concept = entry.job[role]
        held, key = split_location(location)
        known = entry.lora_sha256(role)
        if sha256_of(held, key) != known:
            raise BadInput(
                f"{location} is not the {role} that {_pair(entry)} was merged from, whose sha256 is"
                f" {known[:12]}…: name that file"
            )
        lora = formats.read_lora(held.get(key), name=location).lora
        weight = concept.get("weight", 1.0)
        loras.append(lora if weight == 1.0 else scaled(lora, weight))
    subject, style = loras
    if MERGERS in entry.objects:
        mergers: Mergers = formats.read_mergers(_content(store, entry.objects[MERGERS], entry), name=MERGERS)
        return zipped(subject, style, mergers)
    if entry.merged_by not in UNMERGED:
        raise BadInput(
            f"{entry.merged_by} keeps no mergers: leave the source LoRAs away, then the published file is taken"
        )
    return subject, style


def as_entry(entry: Entry, files: Mapping[str, bytes]) -> Entry:
    """The entry with these files in place of its own, so that they are laid out as a pulled one's are."""
    kept = {name: item for name, item in entry.objects.items() if name.startswith("samples/")}
    made = {
        name: Object(name, "", hashlib.sha256(content).hexdigest(), len(content), "") for name, content in files.items()
    }
    return replace(entry, objects={**kept, **made})


def _subject_rank(header: Header, entry: Entry) -> int:
    text = header.metadata.get("ziplora.subject_rank", "")
    if not text.isdecimal():
        raise BadInput(f"{_pair(entry)}: its merged LoRA does not say which rows are the style's: merge it again")
    rank = max((info.shape[0] for key, info in header.tensors.items() if key.endswith(".lora_down.weight")), default=0)
    if int(text) >= rank:
        raise BadInput(
            f"{_pair(entry)}: {entry.merged_by} leaves the style no rows of its own, so its strength cannot be changed"
            " afterwards: give the style a weight in the manifest and merge again"
        )
    return int(text)


def _content(store: Store, item: Object | None, entry: Entry) -> bytes:
    if item is None:
        raise BadInput(f"{_pair(entry)}, nothing to export: {why_no_lora(entry)}")
    content = store.get_range(item.key, 0, item.size + 1)
    if len(content) != item.size or hashlib.sha256(content).hexdigest() != item.sha256:
        raise Corrupted(f"{store.url}/{item.key} is not what its entry says; verify the catalog")
    return content


def _architecture(entry: Entry) -> "formats.Architecture":
    base = entry.job.get("base")
    found = base.get("architecture") if isinstance(base, dict) else None
    if found not in ("sdxl", "sd15"):
        raise BadInput(f"{_pair(entry)}: its base is {found}, LoRAs are written for sdxl and sd15")
    return found


def _pair(entry: Entry) -> str:
    return f"{entry.subject}/{entry.style}"
