"""Small pictures for pages: WebP, under names that follow from the job. Derived: what is missing is made again."""

import warnings
from io import BytesIO

from PIL import Image, ImageOps, UnidentifiedImageError

from service.entry import Entry, Object, Unreadable
from service.errors import StorageError
from service.images import FORMATS, MAX_PIXELS
from service.storage import Store

SIDE = 256  # pixels of the longer side
QUALITY = 82
CRISP = 128  # up to this side a picture is drawn by the pixel: enlarged without smoothing, kept without loss
MAX_BYTES = 64 << 20  # of a picture that is read
ID_DIGITS = 16  # of a job id, in names
PREFIX = "pages/thumbs/"


def thumbnail_key(job_id: str) -> str:
    return f"{PREFIX}{job_id[:ID_DIGITS]}.webp"


def thumbnail(content: bytes, side: int = SIDE, quality: int = QUALITY) -> bytes:
    """A WebP of at most side × side pixels; ValueError for what is no picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(content), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}×{image.height} pixels; at most {MAX_PIXELS:,} are read")
                picture = ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"no picture: expected one of {', '.join(FORMATS)}") from None
    except (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise ValueError(f"no picture that can be read: {error}") from error
    crisp = max(picture.size) <= CRISP
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = BytesIO()
    picture.save(out, "WEBP", lossless=crisp, quality=100 if crisp else quality, method=4)
    return out.getvalue()


def put_thumbnail(store: Store, job_id: str, content: bytes) -> None:
    """Leave a thumbnail of a job's preview where pages look for it; ValueError for what is no picture."""
    store.put(thumbnail_key(job_id), thumbnail(content), content_type="image/webp")


def make_thumbnail(store: Store, entry: Entry | tuple[str, str, int]) -> Unreadable | None:
    """From the stored preview of an entry or (job id, key, bytes); what is wrong with it, if anything."""
    job_id, key, size = entry if isinstance(entry, tuple) else _preview(entry)
    if size > MAX_BYTES:
        return Unreadable(key, f"it has {size:,} bytes; pictures of at most {MAX_BYTES >> 20} MiB are shown small")
    try:
        put_thumbnail(store, job_id, store.get_range(key, 0, size))
    except (ValueError, StorageError) as error:
        return Unreadable(key, str(error))
    return None


def _preview(entry: Entry) -> tuple[str, str, int]:
    preview: Object = entry.objects["merged.png"]
    return entry.job_id, preview.key, preview.size
