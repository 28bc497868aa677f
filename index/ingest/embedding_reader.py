"""clip-retrieval's output: `img_emb/img_emb_N.npy`, the vectors, and `metadata/metadata_N.parquet`, their captions.

A row of one belongs to the row of the same number in the other, within files of the same N and never across them.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from posixpath import basename, dirname, join
from typing import Any

import numpy as np
from jaxtyping import Float32

from index.embedder import unit_rows
from index.errors import CorpusError
from index.ingest.columns import find_columns, row_samples
from index.ingest.parquet_reader import DamagedTableError, open_table, table_rows
from index.ingest.shards import Listing, Sample, Shard, SkippedShard, open_anywhere

VECTOR_FILE = re.compile(r"^img_emb_(\d+)\.npy$")
TABLE_FILE = re.compile(r"^metadata_(\d+)\.parquet$")
FOLDERS = ("img_emb", "text_emb", "metadata")


def find_embeddings(listing: Listing) -> Iterator[Shard | SkippedShard]:
    """A file of vectors with the table of the same number is a shard."""
    folders = listing.folders()
    for top in sorted({dirname(folder) for folder in folders if basename(folder) == "img_emb"}):
        vectors = _numbered(folders.get(join(top, "img_emb"), []), VECTOR_FILE)
        tables = _numbered(folders.get(join(top, "metadata"), []), TABLE_FILE)
        for number, path in vectors.items():
            if number in tables:
                files = listing.take([path, tables[number]])
                yield listing.shard(path, "clip-retrieval", files, EmbeddingContents(path, tables[number]))
            else:
                reason = f"there is no metadata_{number}.parquet with its captions; run clip inference with metadata"
                yield listing.skipped(path, reason)
        for number in tables.keys() - vectors.keys():
            yield listing.skipped(tables[number], f"there is no img_emb_{number}.npy with its vectors")
        for folder in FOLDERS:
            listing.take(folders.get(join(top, folder), []))


def _numbered(paths: list[str], name: re.Pattern[str]) -> dict[str, str]:
    matches = ((name.match(basename(path)), path) for path in paths)
    return {match[1]: path for match, path in matches if match}


@dataclass(frozen=True, slots=True)
class EmbeddingContents:
    """A file of vectors and its table."""

    vectors: str
    table: str

    def samples(self, shard: Shard) -> Iterator[Sample]:
        """Pairs that bring their vectors, keyed by row number; the image itself when its path is one we can read."""
        with open_table(shard.fs, self.table) as table, open_anywhere(shard.fs, self.vectors) as file:
            vectors = _VectorFile(file, basename(self.vectors), int(shard.files[self.vectors]["size"]))
            if table.metadata.num_rows != vectors.count:
                raise CorpusError(
                    f"{basename(self.vectors)} has {vectors.count} vectors and {basename(self.table)} has "
                    f"{table.metadata.num_rows} rows: they do not belong together; make both again"
                )
            columns = replace(find_columns(table.schema_arrow, basename(self.table), needs_image=False), key=None)
            for rows in table_rows(table, columns):
                if isinstance(rows, DamagedTableError):
                    yield shard.bad("", None, str(rows))
                else:
                    own = list(vectors.read(rows.first, len(rows.rows)))
                    yield from row_samples(shard, self.table, columns, replace(rows, vectors=own))


class _VectorFile:
    """A `.npy` file of float rows, read where they are needed. CorpusError when it is anything else."""

    def __init__(self, file: Any, name: str, size: int):
        try:
            version = np.lib.format.read_magic(file)
            is_old = version == (1, 0)
            read_header = np.lib.format.read_array_header_1_0 if is_old else np.lib.format.read_array_header_2_0
            shape, is_fortran, dtype = read_header(file)
        except Exception as error:  # numpy parses the header as Python: it may raise anything
            raise CorpusError(f"{name} is damaged or not a .npy file ({type(error).__name__})") from error
        is_plain = len(shape) == 2 and shape[1] > 0 and not is_fortran and dtype.kind == "f"
        if not is_plain:
            raise CorpusError(f"{name} holds {dtype} of shape {shape}, where rows of floats were expected")
        self._file, self._start, self._dtype = file, file.tell(), dtype
        self.count, self._width = shape
        if size != self._start + math.prod(shape) * dtype.itemsize:
            raise CorpusError(f"{name} is cut short or too long for its {self.count} vectors of {self._width} numbers")

    def read(self, first: int, count: int) -> Float32[np.ndarray, "n d"]:
        """Some rows, as unit vectors; NaN for those that are zero or not finite."""
        row_bytes = self._width * self._dtype.itemsize
        self._file.seek(self._start + first * row_bytes)
        rows = np.frombuffer(self._file.read(count * row_bytes), self._dtype)
        return unit_rows(rows.reshape(count, self._width).astype(np.float64))
