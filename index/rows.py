"""Rows of the table from records and back: pairs, ledger entries and bad samples, see `table_schema`."""

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from index.records import BadSample, ImageLocation, ShardRecord, ShownPair, StoredPair

if TYPE_CHECKING:
    import pyarrow as pa

TABLE = "pairs"
PAIR_COLUMNS = [
    *("id", "dataset", "source", "shard", "shard_digest", "key", "caption"),
    *("image_uri", "image_offset", "image_size", "image_sha256", "width", "height", "dhash", "metadata"),
]
SHOWN_COLUMNS = [
    *("id", "dataset", "source", "caption", "image_uri", "image_offset", "image_size", "image_sha256", "metadata"),
]
SHARD_COLUMNS = ["dataset", "source", "shard", "shard_digest", "metadata"]


def arrow_table(rows: list[dict[str, Any]], schema: "pa.Schema") -> "pa.Table":
    """Rows to Arrow, the vectors as one block: converting them number by number would dominate a build."""
    import pyarrow as pa

    vector = schema.field("vector")
    columns = pa.Table.from_pylist(rows, schema=schema.remove(schema.get_field_index("vector")))
    vectors = [row["vector"] for row in rows if row.get("vector") is not None]  # pairs come first, other rows after
    chunks = [pa.nulls(len(rows) - len(vectors), vector.type)]
    if vectors:
        chunks.insert(0, pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(vectors)), type=vector.type))
    return columns.append_column(vector, pa.chunked_array(chunks, vector.type)).select(schema.names)


def shown_pair(row: dict[str, Any], root: str) -> ShownPair:
    """A row with `SHOWN_COLUMNS`. `root` is as in `stored_pair`."""
    return ShownPair(
        id=row["id"],
        dataset=row["dataset"],
        caption=row["caption"],
        image=_location(row, root),
        sha256=row["image_sha256"],
        metadata=json.loads(row["metadata"]),
    )


def stored_pair(row: dict[str, Any], root: str) -> StoredPair:
    """A row with `PAIR_COLUMNS`, and vector and thumbnail where they were read. `root`: folder or URL of the whole."""
    vector = row.get("vector")
    return StoredPair(
        id=row["id"],
        dataset=row["dataset"],
        source=row["source"],
        shard=row["shard"],
        digest=row["shard_digest"],
        key=row["key"],
        caption=row["caption"],
        image=_location(row, root),
        sha256=row["image_sha256"],
        width=row["width"],
        height=row["height"],
        dhash=row.get("dhash"),  # a table of format 1 has none
        metadata=json.loads(row["metadata"]),
        vector=None if vector is None else np.asarray(vector, np.float32),
        thumbnail=row.get("thumbnail"),
    )


def pair_row(pair: StoredPair) -> dict[str, Any]:
    """The row of a pair; a copy of its image is where the image lies from then on."""
    image = pair.image
    if pair.image_bytes is not None:
        image = ImageLocation(uri=f"{TABLE}.lance#image/id={pair.id}", size=len(pair.image_bytes))
    return {
        "kind": "pair",
        "id": pair.id,
        "dataset": pair.dataset,
        "source": pair.source,
        "shard": pair.shard,
        "shard_digest": pair.digest,
        "key": pair.key,
        "caption": pair.caption,
        "image_uri": image.uri,
        "image_offset": image.offset,
        "image_size": image.size,
        "image_sha256": pair.sha256,
        "width": pair.width,
        "height": pair.height,
        "dhash": pair.dhash,
        "metadata": json.dumps(dict(pair.metadata), ensure_ascii=False),
        "vector": pair.vector,
        "image": pair.image_bytes,
        "thumbnail": pair.thumbnail,
    }


def removed_row(pair: StoredPair | Mapping[str, Any], *, with_image: bool) -> dict[str, Any]:
    """What stays of a pair, or of its row, that is taken down: its id; `with_image`, its image's digest and address."""
    row = pair_row(pair) if isinstance(pair, StoredPair) else pair
    kept = {name: row[name] for name in ("id", "dataset", "shard")}
    if not with_image:
        return {"kind": "removed", **kept}
    url = address(json.loads(row["metadata"]))
    named = {"metadata": json.dumps({"url": url})} if url else {}
    return {"kind": "removed", **kept, "image_sha256": row["image_sha256"], **named}


def address(metadata: Mapping[str, Any]) -> str:
    """Where an image was downloaded from, as img2dataset writes it; empty when that is not known."""
    url = metadata.get("url")
    return url if isinstance(url, str) else ""


def shard_record(row: dict[str, Any]) -> ShardRecord:
    """What `ledger_row` made."""
    return ShardRecord(
        dataset=row["dataset"],
        source=row["source"],
        shard=row["shard"],
        digest=row["shard_digest"],
        **json.loads(row["metadata"]),
    )


def ledger_row(record: ShardRecord) -> dict[str, Any]:
    """The ledger entry of a shard."""
    counts: dict[str, Any] = {"stamp": record.stamp, "pairs": record.pairs, "bad": record.bad, "bytes": record.bytes}
    if record.layout:
        counts["layout"] = record.layout
    if record.foreign_dim:
        counts["foreign_dim"] = record.foreign_dim
    return {
        "kind": "shard",
        "dataset": record.dataset,
        "source": record.source,
        "shard": record.shard,
        "shard_digest": record.digest,
        "metadata": json.dumps(counts),
    }


def bad_row(record: ShardRecord, sample: BadSample) -> dict[str, Any]:
    """A sample in quarantine; it comes and goes with its shard."""
    return {
        "kind": "bad",
        "dataset": record.dataset,
        "source": record.source,
        "shard": record.shard,
        "shard_digest": record.digest,
        "key": sample.key,
        "image_offset": sample.offset,
        "reason": sample.reason,
    }


def _location(row: dict[str, Any], root: str) -> ImageLocation:
    uri = _resolve(row["image_uri"], root)
    origin = row["source"] if uri == row["image_uri"] else root
    return ImageLocation(uri=uri, offset=row["image_offset"], size=row["image_size"], origin=origin or "")


def _resolve(uri: str, root: str) -> str:
    """An image kept inside the knowledge base has a relative uri, so that the folder can be moved."""
    return uri if not uri or "://" in uri or os.path.isabs(uri) else f"{root}/{uri}"
