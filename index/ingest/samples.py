"""From what lies beside an image to a Pair, or to what is wrong with it: captions, json, the rows of tables."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from index.ingest.shards import Sample, Shard
from index.records import ImageLocation, Pair
from index.text import one_line

if TYPE_CHECKING:
    import numpy as np

MAX_TEXT_BYTES = 16 << 20  # a caption or a json file above this is not read
NO_CAPTION = "no caption"  # the reason of what lacks nothing else
CAPTION_NAMES = ("caption", "text", "txt", "prompt", "description")


class BadMetadata(dict[str, Any]):
    """Stands for a json file that could not be read."""


def make_sample(
    shard: Shard,
    key: str,
    *,
    text: bytes | None = None,
    metadata: Mapping[str, Any],
    image: ImageLocation,
    encoded: bytes | None,
    vector: "np.ndarray | None" = None,
) -> Sample:
    """A Pair, or what is wrong with it. The caption is `text`, else the metadata's `caption` or `text`."""
    if isinstance(metadata, BadMetadata):
        return shard.bad(key, image.offset, "the json beside the image cannot be read")
    status = metadata.get("status", "success")
    if shard.is_img2dataset and status != "success":
        return shard.bad(key, image.offset, f"img2dataset status is {status!r}")
    try:
        caption = text.decode() if text is not None else first_text(metadata, CAPTION_NAMES)
    except UnicodeDecodeError:
        return shard.bad(key, image.offset, "the caption is not UTF-8")
    caption = one_line(caption)
    if not caption:
        return shard.bad(key, image.offset, NO_CAPTION)
    return Pair(
        dataset=shard.dataset,
        shard=shard.name,
        key=key,
        caption=caption,
        image=image,
        encoded=encoded,
        metadata={name: value for name, value in metadata.items() if name != "caption"},
        vector=vector,
    )


def first_text(metadata: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of these entries that is there and not empty, as text."""
    return next((str(metadata[name]) for name in names if metadata.get(name)), "")


def parse_metadata(content: bytes | None) -> dict[str, Any]:
    """A json object; NaN and Infinity, which no other reader of ours would take, become null."""
    try:
        value = parse_json((content or b"null").decode())
    except (ValueError, RecursionError):
        return BadMetadata()
    return value if isinstance(value, dict) else {"value": value}


def parse_json(text: str) -> Any:
    """A json value that can be written as strict json in UTF-8 again. ValueError or RecursionError when it is none."""
    value = json.loads(text, parse_constant=lambda _: None, parse_float=_finite)
    if "\\ud" in text.lower():  # half of a surrogate pair can be written in json, but not in UTF-8
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    return value


def as_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a table as json would have it: times and the like as text, NaN as null."""
    value: dict[str, Any] = parse_json(json.dumps(row, default=str))
    return value


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None
