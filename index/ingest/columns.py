"""Which column of a table is what, by well-known names; and its rows as samples. For Parquet files and Lance tables."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from posixpath import dirname
from typing import TYPE_CHECKING, Any

import numpy as np

from index.errors import CorpusError
from index.ingest.samples import CAPTION_NAMES, as_json, make_sample
from index.ingest.shards import (
    IMAGE_SUFFIXES,
    MAX_IMAGE_BYTES,
    Sample,
    Shard,
    path_in,
    read_files,
    suffix_of,
    uri_of,
)
from index.records import ImageLocation

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_NAMES = ("image", "jpg", "jpeg", "png", "webp", "gif", "bmp", "image_bytes", "img", "bytes")
PATH_NAMES = ("image_path", "path", "file_name", "filename", "filepath", "file", "uri", "image")
VECTOR_NAMES = ("vector", "img_emb", "image_embedding", "embedding")
KEY_NAMES = ("key", "__key__", "id", "uid")
URL_NAMES = ("url", "image_url")
BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "file")  # what a table may name, besides its own kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """The columns of a table by what they are for; None where there is no such column."""

    caption: str
    image: str | None  # encoded bytes, or a struct of `bytes` and `path` as Hugging Face has it
    is_struct: bool
    path: str | None
    vector: str | None
    key: str | None
    others: tuple[str, ...]  # metadata

    @property
    def scalars(self) -> list[str]:
        """All but the vector."""
        named = (self.caption, self.image, self.path, self.key)
        return [name for name in dict.fromkeys((*named, *self.others)) if name is not None]

    @property
    def cell(self) -> str:
        """How an image's location names the column."""
        return f"{self.image}.bytes" if self.is_struct else str(self.image)


def find_columns(schema: "pa.Schema", where: str, *, with_vectors: bool = False, needs_image: bool = True) -> Columns:
    """The columns of `where`. CorpusError, with the names looked for, when there is no image or no caption.

    Vectors count for an image, `with_vectors`; without `needs_image` they come from elsewhere.
    """
    fields = {field.name.lower(): field for field in reversed(list(schema))}

    def find(names: Sequence[str], fits: Callable[[Any], bool]) -> str | None:
        found = (fields[name] for name in names if name in fields)
        return next((field.name for field in found if fits(field.type)), None)

    image = find(IMAGE_NAMES, lambda kind: _is_binary(kind) or _is_image_struct(kind))
    path = find(PATH_NAMES, _is_text)
    vector = find(VECTOR_NAMES, _is_vector) if with_vectors else None
    caption = find(CAPTION_NAMES, _is_text)
    if needs_image and image is None and path is None and vector is None:
        raise CorpusError(_no_image(schema, where, has_urls=find(URL_NAMES, _is_text) is not None))
    if caption is None:
        names = ", ".join(schema.names)
        raise CorpusError(f"{where} has no text column named {' or '.join(CAPTION_NAMES)}; its columns are {names}")
    return Columns(
        caption=caption,
        image=image,
        is_struct=image is not None and _is_image_struct(fields[image.lower()].type),
        path=path,
        vector=vector,
        key=find(KEY_NAMES, lambda kind: _is_text(kind) or _is_integer(kind)),
        others=tuple(field.name for field in schema if field.name not in {image, caption} and _is_metadata(field)),
    )


def _no_image(schema: "pa.Schema", where: str, *, has_urls: bool) -> str:
    if has_urls:
        return (
            f"{where} lists web addresses, and nothing is downloaded here: make a data set of it with img2dataset "
            "first, and build from that"
        )
    return (
        f"{where} has no images: no column of bytes named {', '.join(IMAGE_NAMES)}, and none of paths named "
        f"{', '.join(PATH_NAMES)}; its columns are {', '.join(schema.names)}"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Some rows that follow each other in a table."""

    rows: Sequence[Mapping[str, Any] | None]  # None for one that cannot be read
    first: int  # number of the first one in the table
    vectors: Sequence[np.ndarray | None]  # float32 [d] of unit norm, not finite when it is of no use, None when absent


def row_samples(shard: Shard, table: str, columns: Columns, some: Rows) -> Iterator[Sample]:
    """Rows as samples; `table` is the path of the table.

    Rows that img2dataset lists only to say that their download failed are passed over: its stats have them.
    """
    images = _find_images(shard, table, columns, some)
    for number, (row, image, vector) in enumerate(zip(some.rows, images, some.vectors, strict=True), some.first):
        if row is None:
            yield shard.bad(str(number), None, "the row cannot be read")
            continue
        if shard.is_img2dataset and row.get("status", "success") != "success" and not image.encoded:
            continue
        key = str(number) if columns.key is None or row[columns.key] in {None, ""} else str(row[columns.key])
        problem = image.problem if vector is None else _vector_problem(vector)
        if problem:
            yield shard.bad(key, None, problem)
            continue
        metadata = as_json({name: row[name] for name in columns.others} | {"caption": row[columns.caption]})
        location = ImageLocation(uri=image.uri if image.encoded else "", size=image.size)
        yield make_sample(shard, key, metadata=metadata, image=location, encoded=image.encoded, vector=vector)


def _vector_problem(vector: np.ndarray) -> str:
    return "" if np.isfinite(vector).all() else "the vector is zero or not finite"


# Images of rows


@dataclass(slots=True)
class _Image:
    """The image of a row: where it is, and its content or what is wrong with it."""

    uri: str = ""
    size: int | None = None  # of a cell; a file says its own
    encoded: bytes | None = None
    problem: str = ""
    place: tuple[Any, str] | None = None  # the file system and the path that it is to be read from


def _find_images(shard: Shard, table: str, columns: Columns, some: Rows) -> list[_Image]:
    images = []
    for number, row in enumerate(some.rows, some.first):
        image, path = (None, None) if row is None else _cell(row, columns)
        if image:
            uri = f"{uri_of(shard.fs, table)}#{columns.cell}/{number}"
            images.append(_checked_cell(uri, image))
        else:
            images.append(_named_file(shard, table, path) if path else _Image(problem="no image"))
    _read_places(images)
    return images


def _cell(row: Mapping[str, Any], columns: Columns) -> tuple[bytes | None, str | None]:
    """(bytes, path) of the image of a row, as far as it has them."""
    image = row[columns.image] if columns.image else None
    path = row[columns.path] if columns.path else None
    if columns.is_struct:
        image, path = (image["bytes"], image.get("path") or path) if image else (None, path)
    return image, path


def _checked_cell(uri: str, image: bytes) -> _Image:
    if len(image) > MAX_IMAGE_BYTES:
        return _Image(problem=f"the image is larger than {MAX_IMAGE_BYTES} bytes")
    return _Image(uri=uri, size=len(image), encoded=image)


def _named_file(shard: Shard, table: str, name: str) -> _Image:
    """An image that a table names by its path: relative to the table, absolute, or the URL of an object in a bucket."""
    from fsspec.core import url_to_fs

    fs, path = shard.fs, path_in(dirname(table), name)
    if "://" in name:
        kind = name.partition("://")[0]
        if kind not in BUCKETS and not uri_of(fs, table).startswith(kind + "://"):
            return _Image(problem=f"the image is at {kind}://, and nothing is downloaded from there")
        fs, path = url_to_fs(name)
    if suffix_of(path) not in IMAGE_SUFFIXES:
        return _Image(problem=f"{name!r} is not the name of an image file")
    return _Image(uri=uri_of(fs, path), place=(fs, path))


def _read_places(images: Sequence[_Image]) -> None:
    """Read the files, those of one file system together."""
    waiting = [image for image in images if image.place]
    for fs in {image.place[0] for image in waiting if image.place}:
        of_this = [image for image in waiting if image.place and image.place[0] == fs]
        contents = read_files(fs, [image.place[1] for image in of_this if image.place])
        for image, content in zip(of_this, contents, strict=True):
            if isinstance(content, bytes):
                image.encoded = content
            else:
                image.problem = f"the image file cannot be read: {content}"


# Types


def _is_text(kind: Any) -> bool:
    import pyarrow.types as kinds

    inner = kind.value_type if kinds.is_dictionary(kind) else kind
    return bool(kinds.is_string(inner) or kinds.is_large_string(inner) or kinds.is_string_view(inner))


def _is_binary(kind: Any) -> bool:
    import pyarrow.types as kinds

    is_blob = getattr(kind, "extension_name", "") == "lance.blob.v2"
    return bool(is_blob or kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_binary_view(kind))


def _is_integer(kind: Any) -> bool:
    import pyarrow.types as kinds

    return bool(kinds.is_integer(kind))


def _is_image_struct(kind: Any) -> bool:
    import pyarrow.types as kinds

    return bool(kinds.is_struct(kind)) and kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)


def _is_vector(kind: Any) -> bool:
    import pyarrow.types as kinds

    is_list = kinds.is_fixed_size_list(kind) or kinds.is_list(kind) or kinds.is_large_list(kind)
    return bool(is_list and kinds.is_floating(kind.value_type))


def _is_metadata(field: Any) -> bool:
    """Not bytes, and not one of the long rows of numbers that people keep beside their images."""
    import pyarrow.types as kinds

    kind = field.type
    is_vector = _is_vector(kind) and (kinds.is_fixed_size_list(kind) or "emb" in field.name or "vec" in field.name)
    return not (_is_binary(kind) or _is_image_struct(kind) or is_vector)
