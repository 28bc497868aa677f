"""The layout that img2dataset writes: numbered tar shards, a parquet table beside each, and its stats, written last."""

import io
import json
import math
import re
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from index.atomic import new_file
from index.errors import CorpusError


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One picture with its caption and what is known about it."""

    pixels: UInt8[np.ndarray, "h w 3"]
    caption: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What a folder now holds: pairs and shards in all, and how many shards were already there."""

    out: Path
    pairs: int
    shards: int
    shards_kept: int


def write_shards(
    out: Path,
    sample: Callable[[int], Sample],
    *,
    num: int,
    shard_size: int,
    recipe: Mapping[str, Any],
    on_item: Callable[[int, int], None] | None = None,
) -> Written:
    """Write samples 0 to num - 1; whole shards of the same recipe are kept. `on_item` is told (done, total).

    Killed at any moment, the folder holds only whole files, and a shard counts once its stats exist. Raises
    CorpusError when the folder holds something made by another recipe, or cannot be written.
    """
    if num < 1 or shard_size < 1:
        raise CorpusError(f"a corpus needs at least one pair, and one pair a shard; got {num} and {shard_size}")
    recipe = {**recipe, "num": num, "shard_size": shard_size}
    try:
        out.mkdir(parents=True, exist_ok=True)
        done = _finished_shards(out, recipe)
        num_shards = math.ceil(num / shard_size)
        for shard in range(num_shards):
            rows = range(shard * shard_size, min((shard + 1) * shard_size, num))
            if shard not in done:
                _write_shard(out, shard, recipe, _numbered(rows, sample, num, on_item))
            elif on_item:
                on_item(rows.stop, num)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CorpusError(
            f"cannot write the corpus to {out} ({reason}): mend that and run the command again"
        ) from error
    return Written(out=out, pairs=num, shards=num_shards, shards_kept=len(done))


def _numbered(
    rows: range, sample: Callable[[int], Sample], num: int, on_item: Callable[[int, int], None] | None
) -> Iterator[tuple[int, Sample]]:
    for i in rows:
        yield i - rows.start, sample(i)
        if on_item:
            on_item(i + 1, num)


def _finished_shards(out: Path, recipe: Mapping[str, Any]) -> set[int]:
    """The shards already whole. Files of another corpus are refused: the mixture would be nobody's corpus."""
    finished = set()
    for path in sorted(out.glob("*.tar")) + sorted(out.glob("*.json")):
        name = re.fullmatch(r"(\d{5})(\.tar|_stats\.json)", path.name)
        if name is None or (path.suffix == ".json" and _recipe_in(path) != recipe):
            raise CorpusError(
                f"{out} holds {path.name}, made by something else or with other settings: choose an empty folder"
            )
        if path.suffix == ".json":
            finished.add(int(name[1]))
    return finished


def _recipe_in(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("recipe")
    except (ValueError, AttributeError):  # not JSON, or not an object: not ours
        return None


def _write_shard(out: Path, shard: int, recipe: Mapping[str, Any], samples: Iterable[tuple[int, Sample]]) -> None:
    """One shard: tar, then parquet, then stats, each under a temporary name first."""
    start = time.time()
    digits = max(4, len(str(recipe["shard_size"] - 1)))
    rows: list[dict[str, Any]] = []
    with (
        new_file(out / f"{shard:05d}.tar") as partial,
        tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for i, sample in samples:
            encoded = _png(sample.pixels)
            row = _record(f"{shard:05d}{i:0{digits}d}", sample, encoded)
            for suffix, content in (("png", encoded), ("txt", row["caption"].encode()), ("json", _json(row))):
                _add(tar, f"{row['key']}.{suffix}", content)
            rows.append(row)
    _write_parquet(out / f"{shard:05d}.parquet", rows)
    stats = {
        "count": len(rows),
        "successes": len(rows),
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "duration": time.time() - start,
        "start_time": start,
        "end_time": time.time(),
        "status_dict": {"success": len(rows)},
        "recipe": dict(recipe),
    }
    with new_file(out / f"{shard:05d}_stats.json") as partial:
        partial.write_bytes(_json(stats))


def _record(key: str, sample: Sample, encoded: bytes) -> dict[str, Any]:
    """The columns img2dataset writes, then ours. There is no address: the pictures were never downloaded."""
    height, width, _ = sample.pixels.shape
    return {
        "key": key,
        "caption": sample.caption,
        "url": "",
        "status": "success",
        "error_message": None,
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
        "sha256": sha256(encoded).hexdigest(),
        **sample.metadata,
    }


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """The records as a table; nested values become JSON text, as img2dataset does with exif."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = [{k: _json(v).decode() if isinstance(v, (list, dict)) else v for k, v in row.items()} for row in rows]
    table = pa.Table.from_pylist(flat)
    # A column with no value at all would otherwise have the null type, which other readers trip over.
    fields = [pa.field(f.name, pa.string()) if pa.types.is_null(f.type) else f for f in table.schema]
    with new_file(path) as partial:
        pq.write_table(table.cast(pa.schema(fields)), partial)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a member without time or owner, so that the same corpus is the same bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _png(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
