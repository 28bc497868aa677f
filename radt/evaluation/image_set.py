"""A set of pictures to be measured: where they lie, what they were meant to show, and their features, computed once.

A source is a folder of pictures with all below it, a knowledge base, or whatever `radt index build` reads.
"""

import csv
import io
import json
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b, sha256
from pathlib import Path
from posixpath import join
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from jaxtyping import Float32

from index.atomic import write_bytes
from index.errors import CorpusError, ModelError, QueryError, UserError
from index.text import writable
from radt.evaluation.extractors import Extracted, Extractor

if TYPE_CHECKING:
    from PIL.Image import Image

    from index.ingest.shards import Shard, SkippedShard
    from index.records import BadSample

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})
PLOT = "plot.png"  # that an evaluation writes
RECORD_CHUNK = "radt"  # of a PNG (radt/provenance.py)
BY_CLIP = ("clip", "hybrid")  # ways of searching that compare CLIP vectors (index/search/request.py)
DECODING = 1  # to be raised when `decode` gives other pixels: features that are kept are known by it
BATCH_ROWS = 32  # pictures decoded at once
FLUSH_ROWS = 256  # pictures, or seconds, that a kill may cost
FLUSH_SECONDS = 20
FILE_KEYS = ("file", "file_name", "picture", "image", "path")
CAPTION_KEYS = ("caption", "prompt", "text")
OnStep = Callable[[int, int], None]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureFile:
    """One picture: its name within the source, how its bytes are read, and what it should show, where that is known.

    A name that is not UTF-8 has escapes in it. `read` raises a CorpusError for what cannot be read. `label` names the
    class that it should show. From the record that `radt generate` leaves: `encoder` is the digest of the CLIP that its
    neighbours were found by, None where they were found by words alone or not at all; `model` that of the bundle that
    drew it; `copy_similarity` how like its neighbours it is.
    """

    name: str
    read: Callable[[], bytes]
    caption: str | None = None
    label: str | None = None
    encoder: str | None = None
    model: str | None = None
    copy_similarity: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """A picture that cannot be measured, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MeasuredSet:
    """The pictures of a set that can be decoded, with the digests of their files, and those left out."""

    pictures: tuple[PictureFile, ...]
    digests: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    features: Float32[np.ndarray, "n d"]
    logits: Float32[np.ndarray, "n c"] | None


# Finding


def find_pictures(
    source: str,
    *,
    captions: Path | None = None,
    out: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[PictureFile]:
    """The pictures of a source, by name; nothing that an evaluation wrote to `out`. CorpusError where there is none.

    At most `limit` of them, by lot. What a picture of a folder should show is told by `captions`, else by its own
    record, else by a `.txt` beside it.
    """
    folder = Path(source)
    is_base = (folder / "kb.json").is_file()
    files = sorted(_files(folder, out)) if folder.is_dir() and not is_base else []
    if captions is not None and not files:
        raise QueryError(f"captions of a file go to a folder of pictures, and {source!r} is none: leave --captions out")
    if is_base:
        return _of_knowledge_base(source, limit, seed)
    if not files:
        return choose(_of_corpus(source), limit, seed=seed)
    found = [_of_file(path, writable(path.relative_to(folder).as_posix())) for path in choose(files, limit, seed=seed)]
    return found if captions is None else _captioned(found, captions)


def choose(items: Sequence[T], limit: int | None, *, seed: int) -> list[T]:
    """At most `limit` of them, by lot, in their order."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i] for i in sorted(np.random.default_rng(seed).permutation(len(items))[:limit].tolist())]


def _files(folder: Path, out: Path | None) -> Iterator[Path]:
    """Pictures below a folder, hidden files and what an earlier run wrote to `out` left aside."""
    root, own = folder.resolve(), None if out is None else out.resolve()
    for path in folder.rglob("*"):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith(".") or not path.is_file():
            continue
        place = path.resolve()
        is_own = own is not None and (place == own / PLOT or (root in own.parents and own in place.parents))
        if not is_own:
            yield path


def _of_file(path: Path, name: str) -> PictureFile:
    picture = PictureFile(name=name, read=partial(_read_file, path))
    record = read_record(path)
    if record is not None:
        return replace(picture, **record)
    beside = path.with_suffix(".txt")
    with suppress(OSError, UnicodeDecodeError):
        return replace(picture, caption=beside.read_text(encoding="utf-8-sig").strip() or None)
    return picture


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorpusError(f"it cannot be read ({error.strerror})") from error


def read_record(path: Path) -> dict[str, Any] | None:
    """Of the record inside a PNG of `radt generate` what is measured here; None where there is none."""
    from PIL import Image

    if path.suffix.lower() != ".png":
        return None
    with suppress(Exception):  # a broken file is named when it is decoded, and a foreign record is none
        with Image.open(path, formats=["PNG"]) as image:
            values = json.loads(image.info[RECORD_CHUNK])
        by_clip = values.get("settings", {}).get("by") in BY_CLIP
        is_found = any(not str(each["id"]).startswith("reference:") for each in values.get("neighbors", ()))
        return {
            "caption": str(values["prompt"]) or None,
            "encoder": values["origin"].get("knowledge_base") if by_clip and is_found else None,
            "model": values["origin"].get("model_digest"),
            "copy_similarity": values.get("copy_similarity"),
        }
    return None


def _of_knowledge_base(source: str, limit: int | None, seed: int) -> list[PictureFile]:
    from index.knowledge_base import KnowledgeBase

    store = KnowledgeBase.open(source).store
    pairs = store.get(choose(sorted(store.matching_ids().tolist()), limit, seed=seed))
    if not pairs:
        raise CorpusError(f"the knowledge base {source!r} is empty: add pairs, or name a folder of pictures")
    return [PictureFile(name=str(pair.id), read=pair.image.read, caption=pair.caption) for pair in pairs]


def _of_corpus(source: str) -> list[PictureFile]:
    """What `radt index build` reads, whether it has captions or not. What cannot be used says so when it is read."""
    from index.ingest.readers import read

    try:
        samples = [sample for shard in read(source) for sample in _of_shard(shard)]
    except CorpusError as error:
        raise CorpusError(
            f"there are no pictures in {source!r}: name a folder of PNG, JPEG, WebP, GIF or BMP files, a knowledge "
            f"base, or a source that `radt index build` reads ({error})"
        ) from error
    bad = [sample for sample in samples if isinstance(sample, LeftOut)]
    if len(bad) == len(samples):
        first = f": the first is {bad[0].name!r}, {bad[0].reason}" if bad else ""
        raise CorpusError(
            f"none of the {len(samples)} samples of {source!r} is a picture that can be used{first}; name a folder of "
            "the pictures themselves, such as its tars unpacked"
        )
    return [_unusable(sample) if isinstance(sample, LeftOut) else sample for sample in samples]


def _of_shard(shard: "Shard | SkippedShard") -> Iterator[PictureFile | LeftOut]:
    from index.ingest.shards import SkippedShard
    from index.records import Pair

    if isinstance(shard, SkippedShard):
        yield LeftOut(name=writable(shard.name), reason=writable(shard.reason))
        return
    for sample in shard.samples():
        name = f"{shard.name}/{sample.key}" if sample.key else shard.name
        if isinstance(sample, Pair):
            yield PictureFile(name=name, read=sample.image.read, caption=sample.caption)
        elif read := _uncaptioned(shard, sample):
            yield PictureFile(name=name, read=read)
        else:
            yield LeftOut(name=name, reason=sample.reason)


def _uncaptioned(shard: "Shard", sample: "BadSample") -> Callable[[], bytes] | None:
    """Reads a picture of a tar or a folder that lacks nothing but a caption; None for other samples."""
    from index.ingest.folder_reader import FolderContents
    from index.ingest.samples import NO_CAPTION
    from index.ingest.shards import uri_of
    from index.ingest.tar_reader import TarContents
    from index.records import ImageLocation

    contents = shard.contents
    if sample.reason != NO_CAPTION:
        return None
    if isinstance(contents, FolderContents) and not shard.is_img2dataset:  # whose keys have no suffix
        return ImageLocation(uri=uri_of(shard.fs, join(contents.folder, sample.key))).read
    if isinstance(contents, TarContents) and sample.offset is not None:
        return partial(_read_member, shard.fs, contents.path, sample.offset)
    return None


def _read_member(fs: Any, tar: str, offset: int) -> bytes:
    """A file of a tar by where its content begins: the header before it says how long it is."""
    from index.ingest.shards import storage_errors, uri_of
    from index.records import ImageLocation

    try:
        with storage_errors():
            header = fs.cat_file(tar, start=offset - tarfile.BLOCKSIZE, end=offset)
        size = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size
    except (OSError, tarfile.TarError) as error:
        raise CorpusError(f"it cannot be read ({error})") from error
    return ImageLocation(uri=uri_of(fs, tar), offset=offset, size=size).read()


def _unusable(sample: LeftOut) -> PictureFile:
    """Stands for it among pictures, so that it is named and counted with those that do not decode."""
    return PictureFile(name=sample.name, read=partial(_refuse, sample.reason))


def _refuse(reason: str) -> bytes:
    raise CorpusError(reason)


# What pictures should show


def _captioned(pictures: Sequence[PictureFile], file: Path) -> list[PictureFile]:
    """With captions and labels of a file. QueryError when it speaks of none of the pictures."""
    rows = {name: row for row in _rows(file) if (name := _of(row, FILE_KEYS))}
    found, named = [], 0
    for picture in pictures:
        path = Path(picture.name)
        row = next((rows[name] for name in (picture.name, path.name, path.stem) if name in rows), {})
        named += bool(row)
        found.append(replace(picture, caption=_of(row, CAPTION_KEYS) or picture.caption, label=_of(row, ("label",))))
    if not named:
        raise QueryError(
            f"{str(file)!r} names none of the pictures: give each a row with `file`, its name, and `caption` or `label`"
        )
    return found


def _rows(file: Path) -> list[dict[str, Any]]:
    """Of a `.jsonl` file an object a line, of any other a table with commas, or tabs in a `.tsv`."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() in (".jsonl", ".ndjson"):
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = list(csv.DictReader(io.StringIO(text), delimiter="\t" if file.suffix.lower() == ".tsv" else ","))
    except OSError as error:
        raise QueryError(f"cannot read the captions in {str(file)!r}: {error.strerror}") from error
    except ValueError as error:
        raise QueryError(f"{str(file)!r} is no csv, tsv or jsonl file of captions ({error})") from error
    if not all(isinstance(row, dict) for row in rows):
        raise QueryError(f"a line of {str(file)!r} is no object, such as " + '{"file": "0.png", "caption": "a wolf"}')
    return rows


def _of(row: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    return next((str(row[key]).strip() for key in keys if row.get(key) not in (None, "")), None)


# Features


class FeatureCache:
    """Features by digest of extractor and file, in a folder; None keeps nothing. A damaged file counts as absent.

    So do features of pictures that an earlier `decode` decoded.
    """

    def __init__(self, folder: Path | None, extractor: Extractor) -> None:
        self._folder = None if folder is None else folder / f"{extractor.digest[:16]}-{DECODING}"
        self._known: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
        self._fresh: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
        self._written = time.monotonic()
        for path in sorted(self._folder.glob("*.safetensors")) if self._folder else ():
            self._known.update(_read_features(path, extractor.width))

    def __contains__(self, digest: str) -> bool:
        return digest in self._known

    def __getitem__(self, digest: str) -> tuple[np.ndarray, np.ndarray | None]:
        return self._known[digest]

    def put(self, digests: Sequence[str], extracted: Extracted) -> None:
        """Take in some; they are written once there are enough of them."""
        for place, digest in enumerate(digests):
            row = extracted.features[place], None if extracted.logits is None else extracted.logits[place]
            self._known[digest] = self._fresh[digest] = row
        if len(self._fresh) >= FLUSH_ROWS or time.monotonic() - self._written > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is new."""
        if self._folder is None or not self._fresh:
            return
        from safetensors.numpy import save

        keys = list(self._fresh)
        tensors = {"features": np.stack([features for features, _ in self._fresh.values()])}
        logits = [each for _, each in self._fresh.values() if each is not None]
        if logits:
            tensors["logits"] = np.stack(logits)
        name = blake2b(",".join(keys).encode(), digest_size=8).hexdigest()
        write_bytes(self._folder / f"{name}.safetensors", save(tensors, metadata={"digests": ",".join(keys)}))
        self._fresh.clear()
        self._written = time.monotonic()


def _read_features(path: Path, width: int) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    from safetensors import SafetensorError, safe_open

    with suppress(OSError, SafetensorError, KeyError, TypeError), safe_open(path, framework="numpy") as file:
        keys = file.metadata()["digests"].split(",")
        features = file.get_tensor("features")
        logits = file.get_tensor("logits") if "logits" in file.keys() else [None] * len(keys)  # noqa: SIM118
        if features.shape == (len(keys), width) and len(logits) == len(keys):
            return {key: (features[i], logits[i]) for i, key in enumerate(keys)}
    return {}


def measure_set(
    pictures: Sequence[PictureFile], extractor: Extractor, *, cache: Path | None = None, on_step: OnStep
) -> MeasuredSet:
    """Features of every picture that decodes. `cache` is a folder where they are found again, and kept.

    CorpusError when there is none or none decodes, ModelError naming a picture whose features are not finite.
    """
    if not pictures:
        raise CorpusError("there are no pictures to measure: name a source that has some")
    store = FeatureCache(cache, extractor)
    kept: list[tuple[PictureFile, str]] = []
    left_out: list[LeftOut] = []
    try:
        for start in range(0, len(pictures), BATCH_ROWS):
            batch = pictures[start : start + BATCH_ROWS]
            good, bad = _extract_batch(batch, extractor, store)
            kept += good
            left_out += bad
            on_step(start + len(batch), len(pictures))
    finally:
        store.flush()
    if not kept:
        first = left_out[0]
        raise CorpusError(f"none of {len(pictures)} pictures can be read; the first is {first.name!r}: {first.reason}")
    rows = [store[digest] for _, digest in kept]
    logits = [each for _, each in rows if each is not None]
    measured = MeasuredSet(
        pictures=tuple(picture for picture, _ in kept),
        digests=tuple(digest for _, digest in kept),
        left_out=tuple(left_out),
        features=np.stack([features for features, _ in rows]).astype(np.float32),
        logits=np.stack(logits).astype(np.float32) if logits else None,
    )
    _check_finite(measured, extractor)
    return measured


def _extract_batch(
    batch: Sequence[PictureFile], extractor: Extractor, store: FeatureCache
) -> tuple[list[tuple[PictureFile, str]], list[LeftOut]]:
    good: list[tuple[PictureFile, str]] = []
    bad: list[LeftOut] = []
    fresh: dict[str, Image] = {}
    for picture in batch:
        opened = _open(picture, lambda digest: digest in store or digest in fresh)
        if isinstance(opened, LeftOut):
            bad.append(opened)
            continue
        digest, image = opened
        if image is not None:
            fresh[digest] = image
        good.append((picture, digest))
    if fresh:
        store.put(list(fresh), extractor.extract(list(fresh.values())))
    return good, bad


def _open(picture: PictureFile, is_known: Callable[[str], bool]) -> "tuple[str, Image | None] | LeftOut":
    """The digest of its file, and the picture itself unless its features are known."""
    try:
        content = picture.read()
        digest = sha256(content).hexdigest()
        return digest, None if is_known(digest) else decode(content)
    except UserError as error:
        return LeftOut(name=picture.name, reason=str(error))


def decode(content: bytes) -> "Image":
    """A picture in RGB, upright, transparency over white. CorpusError for what is none."""
    from PIL import Image

    from index.embedder import MAX_ASPECT
    from radt.neighbors import decode_image

    image = decode_image(content, "it")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise CorpusError(f"it is {image.width} by {image.height}, too narrow to be looked at")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _check_finite(measured: MeasuredSet, extractor: Extractor) -> None:
    is_finite = np.isfinite(measured.features).all(axis=1)
    if measured.logits is not None:
        is_finite &= np.isfinite(measured.logits).all(axis=1)
    if not is_finite.all():
        bad = np.flatnonzero(~is_finite)
        raise ModelError(
            f"{extractor.name} gave no finite features for {len(bad)} of {len(is_finite)} pictures, the first is "
            f"{measured.pictures[bad[0]].name!r}: leave those out, or use another extractor"
        )
