"""Pictures inside a page: data URIs, small enough for a page with many of them. Nothing is loaded from elsewhere."""

import base64
import html
import io
from typing import TYPE_CHECKING

from index.embedder import decode_image
from index.errors import UserError
from index.images import readable_image
from index.records import Hit, StoredPair

if TYPE_CHECKING:
    import PIL.Image

PIXELATED_BELOW = 96  # pictures this small are shown by their pixels


def picture(shown: Hit | StoredPair, *, pixels: int) -> str:
    """The `<img>` of a pair, or a line that says why it cannot be read: the page is written all the same.

    Its longer side has at most `pixels`. A thumbnail of the knowledge base stands in for an original that is gone, if
    the pair was fetched with it.
    """
    try:
        image = open_picture(shown)
    except (UserError, OSError, ValueError) as error:
        return f"<p>The image cannot be read:<br>{html.escape(str(error))}</p>"
    kind = ' class="small"' if max(image.size) < PIXELATED_BELOW else ""
    return f'<img{kind} src="{data_uri(image, pixels=pixels)}" alt="{html.escape(shown.caption)}" loading="lazy">'


def open_picture(shown: Hit | StoredPair) -> "PIL.Image.Image":
    """The decoded picture, upright, though the network sees it as it is stored. UserError or OSError if unreadable."""
    import PIL.ImageOps

    stored = decode_image(readable_image(shown) if isinstance(shown, StoredPair) else shown.image.read())
    try:
        return PIL.ImageOps.exif_transpose(stored)
    except Exception:  # a camera may have written anything there
        return stored


def data_uri(image: "PIL.Image.Image", *, pixels: int) -> str:
    """The picture itself, its longer side at most `pixels`, as a URI."""
    small = image.convert("RGB")
    small.thumbnail((pixels, pixels))
    # Small pictures are drawn by their pixels, so they must not be blurred by JPEG.
    kind = "PNG" if max(image.size) < 2 * PIXELATED_BELOW else "JPEG"
    buffer = io.BytesIO()
    small.save(buffer, kind, quality=88)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
