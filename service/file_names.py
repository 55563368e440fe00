"""File names for people, made from an entry's words: readable, all different, safe on every system, Windows included.

Nothing of a catalog's own spelling survives that could mean something to a shell or a file system. A name has no dot,
so it cannot end in one; it holds `__` and a job id, so it is none of Windows' devices (`con`, `nul`); and with its
suffixes it stays under the 255 bytes of common file systems.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence

from service.entry import Entry

PART_BYTES = 48  # of subject, style and method each: 3·48 and 64 digits of the id leave 40 bytes for suffixes
DIGITS = (8, 16, 64)  # of the job id, which has 64: as many as tell the entries apart


def stems(entries: Sequence[Entry]) -> list[str]:
    """`<subject>__<style>__<method>-<job>` for each entry, without suffix; all differ, also where case does not count.

    An entry keeps its name when others come or go, unless the first eight digits of two job ids agree as well.
    """
    found = [_stem(entry, DIGITS[0]) for entry in entries]
    for digits in DIGITS[1:]:
        seen = Counter(stem.casefold() for stem in found)
        found = [
            stem if seen[stem.casefold()] == 1 else _stem(entry, digits)
            for stem, entry in zip(found, entries, strict=True)
        ]
    return found


def stem_of(entry: Entry) -> str:
    """The name of an entry by itself."""
    return _stem(entry, DIGITS[0])


def _stem(entry: Entry, digits: int) -> str:
    parts = (_file_part(text) for text in (entry.subject, entry.style, entry.method))
    return f"{'__'.join(parts)}-{entry.job_id[:digits]}"


def _file_part(text: str) -> str:
    """Letters, digits, '-' and '_' of a text; what begins with '-' would be an option."""
    safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in unicodedata.normalize("NFC", text))
    short = safe.encode()[:PART_BYTES].decode(errors="ignore").lstrip("-")
    return short or "_"
