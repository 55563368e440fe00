"""Reference images: a file's bytes decoded with bounds, or refused in one sentence. Owns no state; Pillow only."""

import io
import warnings

from PIL import Image, UnidentifiedImageError

from service.errors import BadInput

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
MAX_BYTES = 256 * 2**20
MAX_PIXELS = 100_000_000


def check_image(content: bytes, name: str) -> tuple[int, int]:
    """(width, height) of an image that decodes to its last row. BadInput for everything else."""
    if not content:
        raise BadInput(f"{name} is empty: 0 bytes; expected an image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadInput(f"{name} has {image.width}×{image.height} pixels; at most {MAX_PIXELS:,} are read")
                image.load()
                return image.size
    except UnidentifiedImageError:
        raise BadInput(f"{name} is no image; expected one of {', '.join(FORMATS)}") from None
    except BadInput:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, MemoryError) as error:
        raise BadInput(f"{name} is damaged ({error}); expected a whole image") from error
