"""KnowledgeBase: a folder of pairs and vectors that can be searched, and added to or taken from at any time.

START HERE. The folder holds `kb.json` (which model made the vectors, which searcher serves them), the table
(`index/store.py`), the searchers, and the images that were added one by one. `index/ingest/build.py` fills it.
"""

import json
import secrets
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from index.atomic import one_sentence, write_bytes
from index.config import from_dict, to_dict
from index.embedder import DeferredEmbedder, Embedder, Prepared, check_fingerprint, decode_image
from index.errors import ConfigError, CorpusError, DiskError, KnowledgeBaseError, QueryError
from index.images import difference_hash
from index.lock import writer_lock
from index.records import BadSample, Hit, ImageLocation, StoredPair, pair_id
from index.remote import RemoteFolder, remote_url
from index.rows import TABLE
from index.search.duplicates import FOLDER as DUPLICATES
from index.search.duplicates import Duplicates, build_duplicates, groups_stamp
from index.search.retriever import Retriever, SearchResult
from index.search.searcher import (
    DEFAULT_RECALL,
    Searcher,
    SearcherManifest,
    StreamSearcher,
    build_searcher,
    is_as_planned,
    open_searcher,
)
from index.search.sizes import choose_structure
from index.snapshots import Snapshot, snapshots, tag_build
from index.store import CREATE_SECONDS, PairStore
from index.text import one_line

if TYPE_CHECKING:
    import PIL.Image

FORMAT = 2
MANIFEST = "kb.json"
ADDED = "added"  # the folder of images that were added one by one, and the dataset they are in unless told
ADDED_SHARD = "(added)"  # no path: cannot be the name of a shard that a build makes
CALIBRATION_CAPTIONS = 512  # half choose the settings, half measure: their recall is then known to about 0.005
LAGGING_ROWS = 20_000  # rows that a build may leave to be compared one by one; they cost a query some milliseconds
LAGGING_SHARE = 0.05  # of the searcher's rows, where that is less

SearcherChoice = Literal["auto", "exact", "scann", "lance"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """`kb.json`."""

    format: int
    model: str
    fingerprint: str
    dim: int
    created: str  # ISO 8601, UTC
    searcher: str | None = None  # its folder, relative to the knowledge base
    covers: int | None = None  # the store's `high_water` up to which the searcher knows the rows; None: as it says
    moved_files: tuple[str, ...] = ()  # data files of a compaction that may be landing just now: no new rows
    builds: int = 0  # that left a snapshot

    def write(self, directory: Path) -> None:
        """Replace the file whole: a reader sees the old one or the new one."""
        write_bytes(directory / MANIFEST, (json.dumps(to_dict(self), indent=2) + "\n").encode())

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """KnowledgeBaseError when there is none, or it was made by a newer radt. An older format is read as it is."""
        path = directory / MANIFEST
        if not path.is_file():
            raise KnowledgeBaseError(
                f"{directory} is not a knowledge base (it has no {MANIFEST}); make one with "
                f"`radt index build SOURCE --kb {directory}`"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.get("format") not in range(1, FORMAT + 1):
                raise KnowledgeBaseError(
                    f"{path} is of format {values.get('format')!r} and this radt reads formats up to {FORMAT}; use the "
                    "radt that made it, or a newer one"
                )
            return from_dict(cls, values)
        except (OSError, ValueError, AttributeError, ConfigError) as error:
            raise KnowledgeBaseError(f"{path} cannot be read ({error}); build the knowledge base again") from error


class KnowledgeBase:
    """Pairs that can be searched. `open` one, or `create` an empty one; a query needs the model that made it."""

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        embedder: Embedder,
        *,
        snapshot: str | None = None,
        remote: RemoteFolder | None = None,
    ):
        self.directory = directory
        self.remote = remote  # where it lies, if not on this machine; `directory` is then a copy of a part of it
        self.embedder = embedder
        self.store = _store_at(directory, snapshot, remote)
        self.manifest = manifest
        if manifest.format != FORMAT:  # read as it is, and upgraded when it is first written
            self.store.before_writing = self._upgrade
        self._searcher: tuple[str | None, Searcher] | None = None  # with its name in `kb.json`
        self._groups: object = None  # which duplicate groups lie beside the searcher
        self._retriever: tuple[object, Retriever] | None = None  # with what it was made for
        self._opening = threading.Lock()  # two threads that ask first open the searcher once
        self._is_held = False

    @classmethod
    def create(cls, directory: str | Path, embedder: Embedder) -> "KnowledgeBase":
        """Make an empty knowledge base for the vectors of `embedder`, or open the one that is there."""
        if url := remote_url(directory):
            raise RemoteFolder(url).refuse()
        folder = Path(directory)
        if (folder / MANIFEST).exists():
            return cls.open(folder, embedder)
        manifest = Manifest(
            format=FORMAT,
            model=embedder.name,
            fingerprint=embedder.fingerprint,
            dim=embedder.dim,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        with one_sentence(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with writer_lock(folder, wait=CREATE_SECONDS):
                if not (folder / MANIFEST).exists():  # another process may have begun at the same moment
                    _make_table(folder, manifest.dim)
                    manifest.write(folder)  # last: where it is, a table that is not there has been lost
        return cls.open(folder, embedder)

    @classmethod
    def open(
        cls,
        directory: str | Path,
        embedder: Embedder | None = None,
        *,
        models: Sequence[str] = (),
        snapshot: str | None = None,
    ) -> "KnowledgeBase":
        """Open a knowledge base. Without `embedder`, the model it was made with is loaded when it is first needed.

        A URL (`s3://bucket/kb`) is read where it lies, and cannot be changed (see `index/remote.py`).
        `models` are tried after that one, in case it has moved. KnowledgeBaseError when `embedder` is another model.
        `snapshot` names a state that a build has left, such as "build-2": it is read as it was then, but for what has
        been taken down since, and cannot be changed. Its vectors are compared one by one.
        """
        url = remote_url(directory)
        remote = RemoteFolder(url) if url else None
        folder = remote.refresh() if remote else Path(directory)
        manifest = Manifest.read(folder)
        if embedder is None:
            names = [manifest.model, *(name for name in models if name != manifest.model)]
            embedder = DeferredEmbedder(names, dim=manifest.dim, fingerprint=manifest.fingerprint)
        check_fingerprint(embedder, manifest.fingerprint)
        return cls(folder, manifest, embedder, snapshot=snapshot, remote=remote)

    @property
    def name(self) -> str:
        """Its folder or URL, for people."""
        return self.store.root

    def __len__(self) -> int:
        """Number of pairs."""
        return self.store.count()

    # Asking

    def search(self, text: str | None = None, **asked: Any) -> list[Hit]:
        """The best pairs for a text, an image or both; the arguments are those of `Retriever.search`."""
        return self.query(text, **asked).hits

    def query(self, text: str | None = None, **asked: Any) -> SearchResult:
        """`search`, with where the time went."""
        try:
            return self.retriever.search(text, **asked)
        except (OSError, ValueError, KnowledgeBaseError):  # Lance has no error of its own for a missing file
            if not self.is_outdated():
                raise
            self.refresh()
            return self.retriever.search(text, **asked)  # a compaction has deleted a file that was being read

    @property
    def retriever(self) -> Retriever:
        """The retriever over the store, the searcher that `kb.json` names and its duplicate groups, as they are now."""
        with self._opening:
            return self._present_retriever() if self.store.snapshot is None else self._past_retriever()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside it all queries are of one state, that of now; of a later one if a compaction deletes files of it."""
        _ = self.retriever  # sees what is there now
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    def refresh(self) -> None:
        """See table and `kb.json` of one moment: a searcher younger than the table could miss rows of it."""
        while True:
            if self.remote is not None:
                self.remote.refresh()
            self.manifest = Manifest.read(self.directory)
            self.store.moved_files = self.manifest.moved_files
            self.store.refresh()
            self._groups = groups_stamp(self._searcher_folder)
            if Manifest.read(self.directory) == self.manifest:
                return

    def is_outdated(self) -> bool:
        """Whether others have changed it since it was read, so that what has failed may be tried again."""
        return self.store.refresh() or Manifest.read(self.directory) != self.manifest

    @property
    def note(self) -> str:
        """What is to be known of the searches so far: that ScaNN is missing here, say. Empty: nothing."""
        return "" if self._searcher is None else str(getattr(self._searcher[1], "note", ""))

    def show(self, pair: int) -> StoredPair:
        """One pair, its vector included. QueryError when it is not there."""
        self.store.refresh()
        rows = self.store.get([pair], vectors=True)
        if not rows:
            raise QueryError(f"there is no pair {pair} in {self.name}; `radt index query` lists ids")
        return rows[0]

    def stats(self) -> dict[str, Any]:
        """Sizes, model, searcher and history, ready for JSON."""
        from index.stats import describe

        return describe(self)

    def quarantine(self, where: str | None = None, *, limit: int | None = None) -> list[BadSample]:
        """The samples that could not be used, and why; for `where` see `PairStore.bad_samples`."""
        self.store.refresh()
        return self.store.bad_samples(where, limit=limit)

    def snapshots(self) -> list[Snapshot]:
        """The states that builds have left and no `compact` has let go, oldest first."""
        return snapshots(self.store)

    def searcher_manifest(self) -> SearcherManifest | None:
        """What `kb.json` names as the searcher, if any."""
        folder = self._searcher_folder
        return SearcherManifest.read(folder) if folder.exists() else None

    def searcher_choice(self) -> SearcherChoice:
        """What to ask for to keep the kind of the searcher; one that compares every row may have been outgrown."""
        manifest = self.searcher_manifest()
        return "auto" if manifest is None or manifest.kind == "exact" else manifest.kind

    def open_searcher(self) -> Searcher:
        """The searcher that `kb.json` names, as it was built; every row is compared where it names none."""
        folder = self._searcher_folder
        return open_searcher(folder, self.store, url=self.remote.url_of(folder) if self.remote else None)

    # Changing

    def add(
        self,
        images: "str | Path | PIL.Image.Image | Sequence[str | Path | PIL.Image.Image]",
        caption: str,
        *,
        dataset: str = ADDED,
        metadata: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Add one image or several under a caption; they can be found at once. Their ids.

        The images are copied into the knowledge base. The same picture with the same caption has the same id, so
        adding it again changes nothing. CorpusError for a file that is no image, or for an empty caption.
        """
        caption = one_line(caption)
        if not caption:
            raise CorpusError("the caption is empty; say what the image shows")
        several = images if isinstance(images, Sequence) and not isinstance(images, str) else [images]
        pictures = [_picture(image, self.embedder) for image in several]
        vectors = self.embedder.embed([picture.prepared for picture in pictures])
        if not np.isfinite(vectors).all():
            raise CorpusError("the model gives no finite vector for the image; try another picture")
        pairs: dict[int, StoredPair] = {}
        with self.store.lock(), one_sentence(self.directory):
            for picture, vector in zip(pictures, vectors, strict=True):
                pair = self._added_pair(picture, vector, caption=caption, dataset=dataset, metadata=metadata or {})
                pairs[pair.id] = pair
            self.store.add(list(pairs.values()))
        return list(pairs)

    def remove(
        self, ids: Collection[int] | None = None, *, where: str | None = None, same_image: bool = False
    ) -> list[int]:
        """Take pairs down, by ids or by an SQL filter: the next query obeys. The ids that were there.

        `same_image` takes every pair that shows the very image of one of them, too, or that comes from where it lies.
        The bytes go with `compact`.
        """
        with self.store.lock():
            gone = self.store.remove(ids, where=where, same_image=same_image)
            if gone:
                self.sweep_added_images()
        return gone

    def sweep_added_images(self) -> None:
        """Delete the images of ours that no pair shows (any more)."""
        paths = list((self.directory / ADDED).glob("*"))
        shown = {Path(uri).name for uri in self.store.image_uris(f"source = '{ADDED}'")} if paths else set()
        for path in paths:
            if path.name not in shown:
                path.unlink()

    def build_search(
        self,
        kind: SearcherChoice = "auto",
        *,
        seed: int = 0,
        may_lag: bool = False,
        duplicates: bool | None = None,
        recall: float | None = None,
        ram: int | None = None,
    ) -> SearcherManifest:
        """Make searcher, word index and id index fit the pairs that are there; nothing is done when they do.

        What `may_lag` is kept when few rows have changed since: queries compare new ones one by one.
        `duplicates` has the groups of equal pictures found too (see `build_duplicates`), unless they lie beside it;
        None: if they were before, and at first.
        `recall` and `ram` (bytes) are those of `build_searcher`; not given, they are what they were the last time.
        """
        from index.search.lexical import FTS_NAME, build_fts

        with self.store.lock(), one_sentence(self.directory):
            self.refresh()
            current = self._readable_searcher()
            if duplicates is None:
                duplicates = current is None or self._has_groups()
            if current is not None:
                recall, ram = recall or current.target_recall, ram or current.ram
            recall = recall or DEFAULT_RECALL
            structure = choose_structure(self.store.count(), self.store.dim, ram=ram, kind=kind)
            is_good = current is not None and is_as_planned(current, structure, target_recall=recall)
            if current is None or not is_good or self._changed_rows(current) > _spare(current, may_lag=may_lag):
                current = self._replace_searcher(structure.kind, seed, recall=recall, ram=ram, duplicates=duplicates)
            elif duplicates and not self._has_groups():
                build_duplicates(self.store, self.open_searcher(), self._searcher_folder)
            spare = _spare(current, may_lag=may_lag)
            if not spare or self.store.count_unindexed(FTS_NAME) > spare:
                build_fts(self.store)
            self.store.index_ids()
        return current

    def _readable_searcher(self) -> SearcherManifest | None:
        """None also for a damaged one: to build it again is the remedy."""
        try:
            return self.searcher_manifest()
        except KnowledgeBaseError:
            return None

    def tag_build(self) -> None:
        """Leave the present state as a snapshot, `build-1` for the first build and so on."""
        with self.store.lock(), one_sentence(self.directory):
            self.refresh()
            lagging = self.unsearched()
            tag_build(self.store, self.manifest.builds + 1, in_searcher=self.store.count() - lagging)
            self.manifest = replace(self.manifest, builds=self.manifest.builds + 1)
            self.manifest.write(self.directory)

    def unsearched(self) -> int:
        """Rows that the searcher does not know yet: they are compared one by one."""
        searcher = self.searcher_manifest()
        covers = self.manifest.covers if self.manifest.covers is not None or searcher is None else searcher.snapshot
        return self.store.count_after(covers) if covers is not None else self.store.count()

    # Inside

    def _upgrade(self) -> None:
        """Bring a knowledge base of an older format up to date, in place; killed half-way, it is done again."""
        try:
            with one_sentence(self.directory):
                self.store.add_missing_columns()
                self.manifest = replace(Manifest.read(self.directory), format=FORMAT)
                self.manifest.write(self.directory)
        except (KnowledgeBaseError, DiskError) as error:
            raise KnowledgeBaseError(
                f"{self.directory} is of an older format and has to be upgraded in place before it is written: {error}"
            ) from error

    def _present_retriever(self) -> Retriever:
        if not self._is_held:
            self.refresh()
        name = self.manifest.searcher
        if self._searcher is None or self._searcher[0] != name:
            self._searcher = (name, self.open_searcher())
        searcher, covers, folder = self._searcher[1], self.manifest.covers, self._searcher_folder
        if covers is not None and searcher.snapshot is not None:
            searcher.snapshot = max(searcher.snapshot, covers)  # a compaction has moved the rows that it knows
        return self._kept_retriever(
            (name, self._groups),  # groups may land beside a searcher that has long been named
            lambda: Retriever(self.store, searcher, self.embedder, duplicates=Duplicates.open(folder)),
        )

    def _past_retriever(self) -> Retriever:
        if not self._is_held:
            self.store.refresh()
        return self._kept_retriever(
            self.store.hidden, lambda: Retriever(self.store, StreamSearcher(self.store), self.embedder)
        )

    def _kept_retriever(self, made_for: object, make: Callable[[], Retriever]) -> Retriever:
        """The one that was made before, if it was for the same."""
        if self._retriever is None or self._retriever[0] != made_for:
            self._retriever = (made_for, make())
        return self._retriever[1]

    def _changed_rows(self, searcher: SearcherManifest) -> int:
        """Rows that were written or went since the searcher was built."""
        new = self.unsearched()
        known = self.store.count() - new
        return new + max(searcher.rows - known, 0)

    def _replace_searcher(
        self, kind: Literal["exact", "scann", "lance"], seed: int, *, recall: float, ram: int | None, duplicates: bool
    ) -> SearcherManifest:
        """Build beside the old one, then let `kb.json` name it: whoever reads meanwhile has one or the other."""
        high_water = self.store.high_water
        # No name comes twice, for readers look at nothing else: the same rows may be built from for another recall.
        name = f"searchers/{high_water}-{kind}-{secrets.token_hex(4)}"
        built = build_searcher(
            kind,
            self.store,
            self.directory / name,
            seed=seed,
            queries=self._calibration_queries(seed) if kind != "exact" and self.store.count() else None,
            snapshot=high_water,
            target_recall=recall,
            ram=ram,
        )
        if duplicates:
            folder = self.directory / name
            build_duplicates(self.store, open_searcher(folder, self.store), folder)
        previous = self.manifest.searcher
        self.manifest = replace(self.manifest, searcher=name, covers=high_water, moved_files=())
        self.manifest.write(self.directory)
        for folder in (self.directory / "searchers").iterdir():
            if f"searchers/{folder.name}" not in (name, previous):  # a reader may still have the previous one open
                shutil.rmtree(folder)
        return built

    @property
    def _searcher_folder(self) -> Path:
        """That of the searcher that `kb.json` names; where it names none, one that is never there."""
        return self.directory / (self.manifest.searcher or "searchers/none")

    def _has_groups(self) -> bool:
        return (self._searcher_folder / DUPLICATES).exists()

    def _calibration_queries(self, seed: int) -> np.ndarray:
        """Captions as queries: text vectors lie elsewhere than image vectors, and those flatter the recall."""
        ids = np.sort(self.store.matching_ids())
        chosen = np.random.default_rng(seed).choice(ids, size=min(CALIBRATION_CAPTIONS, len(ids)), replace=False)
        vectors = self.embedder.texts([row.caption for row in self.store.get(chosen)])
        return vectors[np.isfinite(vectors).all(axis=1)]

    def _added_pair(
        self, picture: "_Picture", vector: np.ndarray, *, caption: str, dataset: str, metadata: Mapping[str, Any]
    ) -> StoredPair:
        digest = sha256(picture.encoded).hexdigest()
        key = sha256(f"{digest} {caption}".encode()).hexdigest()[:32]
        name = f"{ADDED}/{digest[:32]}{_extension(picture.encoded)}"
        path = self.directory / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_bytes(path, picture.encoded)
        return StoredPair(
            id=pair_id(dataset, ADDED_SHARD, key),
            dataset=dataset,
            source=ADDED,
            shard=ADDED_SHARD,
            digest=digest,
            key=key,
            caption=caption,
            image=ImageLocation(uri=name),
            sha256=digest,
            width=picture.width,
            height=picture.height,
            dhash=picture.dhash,
            metadata=metadata,
            vector=vector,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Picture:
    """An image that is being added: its file, and what was made of its pixels before they were let go."""

    encoded: bytes
    prepared: Prepared
    width: int
    height: int
    dhash: int


def _spare(searcher: SearcherManifest, *, may_lag: bool) -> int:
    """How many rows may lag behind a searcher, if any may; exact search has nothing to rebuild, so none there."""
    if not may_lag or searcher.kind == "exact":
        return 0
    return min(LAGGING_ROWS, int(LAGGING_SHARE * searcher.rows))


def _make_table(directory: Path, dim: int) -> None:
    """An empty table. The one of a `create` that was killed gives way; KnowledgeBaseError for one that has rows."""
    if PairStore.exists(directory):
        if PairStore(directory).has_rows():
            raise KnowledgeBaseError(
                f"{directory} has the table of a knowledge base and no {MANIFEST}, which says which model made its "
                f"vectors; put {MANIFEST} back from a copy, or build in another folder"
            )
        shutil.rmtree(directory / f"{TABLE}.lance")
    PairStore.make(directory, dim=dim)


def _store_at(directory: Path, snapshot: str | None, remote: RemoteFolder | None) -> PairStore:
    """The table. KnowledgeBaseError when it has been lost: an empty one in its place would look like the truth."""
    if remote is None and not PairStore.exists(directory):
        raise KnowledgeBaseError(
            f"the table of the knowledge base is missing: {directory / TABLE}.lance is not there or has no version in "
            "it; put it back from a copy, or build again in another folder"
        )
    return PairStore(directory, snapshot=snapshot, remote=remote)


def _picture(image: "str | Path | PIL.Image.Image", embedder: Embedder) -> _Picture:
    encoded = _encoded(image)
    decoded = _decoded(encoded, image)
    return _Picture(
        encoded=encoded,
        prepared=embedder.prepare(decoded),
        width=decoded.width,
        height=decoded.height,
        dhash=difference_hash(decoded),
    )


def _encoded(image: "str | Path | PIL.Image.Image") -> bytes:
    """The bytes of a file, local or in a bucket; a picture in memory becomes a PNG."""
    import io

    if not isinstance(image, str | Path):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return buffer.getvalue()
    return ImageLocation(uri=str(image), origin=str(image)).read()


def _decoded(content: bytes, image: "str | Path | PIL.Image.Image") -> "PIL.Image.Image":
    try:
        return decode_image(content)
    except CorpusError as error:
        name = repr(str(image)) if isinstance(image, str | Path) else "the picture"
        raise CorpusError(f"{name} cannot be added: {error}") from error


def _extension(content: bytes) -> str:
    import io

    import PIL.Image

    with PIL.Image.open(io.BytesIO(content)) as image:
        return f".{(image.format or 'png').lower()}"
