"""A contact sheet of a catalog: subjects down, styles across, one preview per pair."""

from collections.abc import Sequence
from io import BytesIO

from PIL import Image, ImageDraw, ImageFont

from service.entry import Entry
from service.storage import Store

LABEL = 18  # pixels: height of the style names, and what the subject names need per character is measured
GAP = 4


def contact_sheet(store: Store, entries: Sequence[Entry], cell: int = 128) -> Image.Image:
    """Previews (`merged.png`) of these entries, each in a square of `cell` pixels; the newest where a pair has several.

    A pair without an entry, or an entry without a preview, stays blank.
    """
    newest = {(entry.subject, entry.style): entry for entry in sorted(entries, key=lambda entry: entry.created)}
    subjects, styles = sorted({subject for subject, _ in newest}), sorted({style for _, style in newest})
    font = ImageFont.load_default(13)
    margin = max((int(font.getlength(name)) for name in subjects), default=0) + 2 * GAP
    step = cell + GAP
    sheet = Image.new("RGB", (margin + len(styles) * step, LABEL + len(subjects) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for column, style in enumerate(styles):
        draw.text((margin + column * step + cell / 2, LABEL / 2), style, "black", font, anchor="mm")
    for row, subject in enumerate(subjects):
        top = LABEL + row * step
        draw.text((GAP, top + cell / 2), subject, "black", font, anchor="lm")
        for column, style in enumerate(styles):
            entry = newest.get((subject, style))
            if entry is not None and "merged.png" in entry.objects:
                with Image.open(BytesIO(store.get(entry.objects["merged.png"].key))) as preview:
                    # small pictures enlarged without smoothing: what was sampled is what is seen
                    filter = Image.Resampling.NEAREST if preview.width < cell else Image.Resampling.LANCZOS
                    sheet.paste(preview.convert("RGB").resize((cell, cell), filter), (margin + column * step, top))
    return sheet
