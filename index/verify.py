"""Verify: whether id, vector, caption and image of a pair still belong together, and whether searches find it.

Rows are drawn at random. Each is read again from its source as if it were new: the image by its location, hashed and
embedded; the caption from the shard. Nothing is written. What cannot be read (any more) is counted apart: an original
that its owner deleted is no fault of the knowledge base.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float32

from index.embedder import Embedder, Prepared, decode_scaled
from index.errors import CorpusError, ImageError, KnowledgeBaseError
from index.images import try_read_images
from index.knowledge_base import ADDED_SHARD
from index.records import Pair, ShardRecord, StoredPair, pair_id, shard_title
from index.search.ids import contains
from index.search.lexical import LanceBM25, has_fts
from index.search.searcher import Searcher
from index.search.words import Tokenizer
from index.text import one_line

if TYPE_CHECKING:
    from index.ingest.shards import Shard
    from index.knowledge_base import KnowledgeBase

Link = Literal["id", "vector", "image", "embedding", "caption", "searcher", "words", "ledger"]

LINKS: dict[Link, str] = {
    "id": "the id is that of dataset, shard and key, and no other row has it",
    "vector": "the vector is finite and of length one",
    "image": "the image is the one that was read in (SHA-256)",
    "embedding": "the image, embedded again, gives the stored vector",
    "caption": "the source has this caption under this key",
    "searcher": "the searcher gives the ids that the vectors belong to",
    "words": "the rarest words of the caption find it, with the score that it deserves",
    "ledger": "every shard has the rows and the bad samples that its ledger entry says",
}

SAMPLE = 256
LEAST_COSINE = 0.999  # between the stored vector and the same image embedded now, perhaps on another machine
LEAST_FOUND = 0.8  # share of rows that an approximate searcher must find by their own vector; it promises about 0.95
SOURCE_BYTES = 2 << 30  # of shards are read for their captions, unless every row is checked
_ROWS = 256  # at once
_NEAREST = 10
_SCORE_ERROR = 0.02  # a searcher that stores vectors in few bits returns scores that are a little off
_RAREST = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """One link that broke. `id` is None when it is not one row's."""

    link: Link
    id: int | None
    what: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object; the id is a decimal string."""
        return {"link": self.link, "id": None if self.id is None else str(self.id), "what": self.what}


@dataclass(kw_only=True, slots=True)
class Verification:
    """What was checked, what is wrong, and what could not be seen."""

    kb: str
    snapshot: int
    rows: int  # in the knowledge base
    sampled: int
    checked: Counter[str] = field(default_factory=Counter)  # by link
    failures: list[Failure] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)  # images and sources, and why
    notes: dict[Link, str] = field(default_factory=dict)  # why a link was not checked, or not for all rows

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.failures

    def check(self, link: Link, row: int | None, wrong: str | None) -> bool:
        """Count a check and note what is wrong, if anything; whether it is right."""
        self.checked[link] += 1
        if wrong is not None:
            self.failures.append(Failure(link=link, id=row, what=wrong))
        return wrong is None

    def failed(self, link: Link) -> int:
        """How many checks of a link failed."""
        return sum(failure.link == link for failure in self.failures)

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "kb": self.kb,
            "snapshot": self.snapshot,
            "rows": self.rows,
            "sampled": self.sampled,
            "sound": self.is_sound,
            "checks": {link: self._outcome(link) for link in LINKS},
            "failures": [failure.to_json() for failure in self.failures],
            "unreadable": self.unreadable,
        }

    def _outcome(self, link: Link) -> dict[str, Any]:
        note = {"note": self.notes[link]} if link in self.notes else {}
        return {"checked": self.checked[link], "failed": self.failed(link), **note}


def verify(
    kb: "KnowledgeBase",
    *,
    sample: int | None = SAMPLE,
    seed: int = 0,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Verification:
    """Check `sample` rows drawn by `seed`, or all of them (None), and the ledger. `on_rows` hears of rows done."""
    kb.store.refresh()
    ids = kb.store.matching_ids()
    report = Verification(kb=kb.name, snapshot=kb.store.version, rows=len(ids), sampled=0)
    unique, first, counts = np.unique(ids, return_index=True, return_counts=True)
    for twice in np.nonzero(counts > 1)[0].tolist():
        report.check("id", int(unique[twice]), f"{counts[twice]} rows have this id")
    positions = np.sort(first)  # in stored order the rows of a shard follow each other
    if sample is not None and sample < len(positions):
        positions = np.sort(np.random.default_rng(seed).choice(positions, size=sample, replace=False))
    chosen = ids[positions]
    report.sampled = len(chosen)
    _check_ledger(kb, report)
    sources = _Sources(kb.store.shards(), report, budget=None if sample is None else SOURCE_BYTES)
    searcher, words = _SearcherCheck(kb, report), _WordsCheck(kb, report)
    for start in range(0, len(chosen), _ROWS):
        rows = kb.store.get(chosen[start : start + _ROWS], vectors=True)
        sound = [row for row in rows if _check_row(row, report)]
        _check_images(rows, {row.id for row in sound}, kb.embedder, report)
        sources.check(rows)
        searcher.check(sound)
        words.check(rows)
        on_rows(len(rows))
    sources.finish()
    searcher.finish()
    return report


def _check_row(row: StoredPair, report: Verification) -> bool:
    """What the row says of itself; whether its vector can be compared."""
    expected = pair_id(row.dataset, row.shard, row.key)
    wrong = f"the id of {row.key!r} in shard {shard_title(row.shard)!r} of dataset {row.dataset!r} is {expected}"
    report.check("id", row.id, None if expected == row.id else wrong)
    if row.vector is None or not np.isfinite(row.vector).all():
        return report.check("vector", row.id, "its vector is not finite")
    length = float(np.linalg.norm(row.vector))
    return report.check("vector", row.id, None if abs(length - 1) < 1e-3 else f"its vector has length {length:.4f}")


def _check_images(rows: Sequence[StoredPair], comparable: set[int], embedder: Embedder, report: Verification) -> None:
    """Location to bytes, bytes to digest, pixels to vector."""
    whole: list[tuple[StoredPair, bytes]] = []
    for row, outcome in zip(rows, try_read_images([row.image for row in rows]), strict=True):
        if isinstance(outcome, ImageError):
            report.unreadable.append(f"{row.id}: {outcome}")
        elif row.sha256 is None or report.check("image", row.id, _changed(row, outcome)):
            whole.append((row, outcome))
    _check_embeddings([(row, content) for row, content in whole if row.id in comparable], embedder, report)


def _changed(row: StoredPair, content: bytes) -> str | None:
    if sha256(content).hexdigest() == row.sha256:
        return None
    at = "" if row.image.offset is None else f" at byte {row.image.offset}"
    return f"{row.image.uri}{at} holds other bytes than were read in"


def _check_embeddings(rows: Sequence[tuple[StoredPair, bytes]], embedder: Embedder, report: Verification) -> None:
    side = embedder.image_side()
    cosines = _cosines(rows, embedder, side)
    unlike = np.nonzero(cosines <= LEAST_COSINE)[0].tolist() if side is not None else []
    if unlike:  # perhaps decoded at another scale, as a build with thumbnails and `add` do
        cosines[unlike] = np.maximum(cosines[unlike], _cosines([rows[i] for i in unlike], embedder, None))
    for (row, _), cosine in zip(rows, cosines.tolist(), strict=True):
        wrong = f"the cosine between its vector and its image, embedded again, is {cosine:.4f}"
        report.check("embedding", row.id, None if cosine > LEAST_COSINE else wrong)


def _cosines(
    rows: Sequence[tuple[StoredPair, bytes]], embedder: Embedder, side: int | None
) -> Float32[np.ndarray, " n"]:
    """Between each stored vector and the image embedded now; -1 for what does not decode (any more)."""

    def prepare(content: bytes) -> Prepared | None:
        try:
            return embedder.prepare(decode_scaled(content, side=side)[0])
        except CorpusError:
            return None

    with ThreadPoolExecutor() as threads:  # each holds one decoded image, which may be large, and lets it go
        prepared = list(threads.map(prepare, [content for _, content in rows]))
    cosines = np.full(len(rows), -1, dtype=np.float32)
    good = [i for i, one in enumerate(prepared) if one is not None]
    if good:
        again = embedder.embed([one for one in prepared if one is not None])
        stored = np.stack([np.asarray(rows[i][0].vector) for i in good])
        cosines[good] = np.einsum("nd,nd->n", again, stored)
    return cosines


class _Sources:
    """Captions as the sources have them. A shard is read once for all of its rows, which follow each other."""

    def __init__(self, records: Sequence[ShardRecord], report: Verification, *, budget: int | None):
        self._records = {(record.dataset, record.shard): record for record in records}
        self._report = report
        self._budget = budget  # bytes
        self._wanted: dict[tuple[str, str], dict[str, StoredPair]] = {}
        self._found: dict[str, dict[str, Shard]] = {}  # source -> its shards by name

    def check(self, rows: Sequence[StoredPair]) -> None:
        """Take rows in; check those of shards that are complete, that is those before the last one's."""
        for row in rows:
            self._wanted.setdefault((row.dataset, row.shard), {})[row.key] = row
        current = (rows[-1].dataset, rows[-1].shard) if rows else None
        for name in [name for name in self._wanted if name != current]:
            self._check_shard(name, self._wanted.pop(name))

    def finish(self) -> None:
        """Check what is left."""
        for name in list(self._wanted):
            self._check_shard(name, self._wanted.pop(name))

    def _check_shard(self, name: tuple[str, str], rows: dict[str, StoredPair]) -> None:
        record = self._records.get(name)
        if record is None:  # added by hand, or the ledger check has said so
            return
        if self._budget is not None:
            if record.bytes > self._budget:
                self._report.notes["caption"] = "not read for all rows: the shards are large; --all reads them"
                return
            self._budget -= record.bytes
        try:
            shard = self._shard(record)
            is_same = shard.stamp == record.stamp or shard.digest() == record.digest
            captions = dict(_captions(shard, set(rows))) if is_same else {}
        except (CorpusError, OSError) as error:
            self._report.unreadable.append(f"{_named(record.dataset, record.shard)}: {error}")
            return
        if not is_same:
            where = _named(record.dataset, record.shard)
            self._report.unreadable.append(f"{where}: it has changed since it was read in; build again to take it in")
            return
        for key, row in rows.items():
            self._report.check("caption", row.id, _unlike(row, captions.get(key)))

    def _shard(self, record: ShardRecord) -> "Shard":
        from index.ingest.readers import SkippedShard, read

        if record.source not in self._found:
            shards = read(record.source, dataset=record.dataset, allow_partial=True)
            self._found[record.source] = {s.name: s for s in shards if not isinstance(s, SkippedShard)}
        try:
            return self._found[record.source][record.shard]
        except KeyError:
            raise CorpusError(f"it is no longer in {record.source}") from None


def _captions(shard: "Shard", keys: set[str]) -> Iterator[tuple[str, str]]:
    """Key and caption of those samples, reading no further than the last of them."""
    for sample in shard.samples():
        if sample.key in keys and isinstance(sample, Pair):
            keys.discard(sample.key)
            yield sample.key, sample.caption
            if not keys:
                return


def _named(dataset: str, shard: str) -> str:
    return f"shard {shard_title(shard)!r} of dataset {dataset!r}"


def _unlike(row: StoredPair, caption: str | None) -> str | None:
    if caption is None:
        return f"shard {shard_title(row.shard)!r} has no sample {row.key!r}"
    is_same = caption in (row.caption, one_line(row.caption))  # as it comes in now, and as it did before
    return None if is_same else f"it is {row.caption!r} here and {caption!r} in shard {shard_title(row.shard)!r}"


class _SearcherCheck:
    """Searches by the rows' own vectors. Every id that comes back must belong to a vector that deserves the score."""

    def __init__(self, kb: "KnowledgeBase", report: Verification):
        self._store, self._report = kb.store, report
        self._searcher: Searcher | None = None
        self._asked, self._found, self._wrong = 0, 0, set[int]()
        self._least = LEAST_FOUND
        manifest = kb.searcher_manifest()
        if manifest is None or manifest.kind == "exact":
            built = "no searcher yet" if manifest is None else "exact search"
            report.notes["searcher"] = f"{built}: the vectors above are compared themselves, nothing else can be wrong"
            return
        try:
            self._searcher = kb.open_searcher()
        except KnowledgeBaseError as error:
            report.check("searcher", None, str(error))
            return
        self._least = min(LEAST_FOUND, manifest.target_recall, manifest.recall_at_10)  # of one that is to find less
        covers = max(manifest.snapshot or 0, kb.manifest.covers or 0)
        self._newer = np.sort(kb.store.rows_after(covers)[0])

    def check(self, rows: Sequence[StoredPair]) -> None:
        """Search for each of them that the searcher should know."""
        if self._searcher is None:
            return
        ids = np.array([row.id for row in rows], dtype=np.int64)
        is_known = contains(self._searcher.ids, ids) & ~contains(self._newer, ids)
        known = [row for row, here in zip(rows, is_known, strict=True) if here]
        if not known:
            return
        queries = np.stack([np.asarray(row.vector) for row in known])
        ids, scores = self._searcher.search(queries, top_k=_NEAREST)
        vectors = {row.id: row.vector for row in self._store.get(np.unique(ids[ids >= 0]), vectors=True)}
        for row, near, score in zip(known, ids, scores, strict=True):
            self._check_answers(row, dict(zip(near.tolist(), score.tolist(), strict=True)), vectors)

    def finish(self) -> None:
        """An approximate searcher may miss a few, but not many."""
        if self._asked and self._found < self._least * self._asked:
            wrong = f"it finds {self._found} of {self._asked} rows by their own vectors; build the searcher again"
            self._report.check("searcher", None, wrong)

    def _check_answers(self, row: StoredPair, answers: dict[int, float], vectors: dict[int, Any]) -> None:
        self._asked += 1
        least = min(answers.values())
        self._found += row.id in answers or least > 1 - _SCORE_ERROR  # so many others have the same vector
        for pair, score in answers.items():
            vector = vectors.get(pair)
            if vector is None or pair in self._wrong or pair in self._newer:  # gone, told already, or replaced since
                continue
            true = float(vector @ row.vector)
            is_right = abs(true - score) < _SCORE_ERROR
            if not is_right:
                self._wrong.add(pair)
            wrong = f"its cosine with {row.id} is {true:.4f}, and the searcher says {score:.4f}: the id is another's"
            self._report.check("searcher", pair, None if is_right else wrong)


class _WordsCheck:
    """Searches by the rarest words of captions, kept to the row they are from."""

    def __init__(self, kb: "KnowledgeBase", report: Verification):
        self._report = report
        self._lexical = LanceBM25(kb.store) if has_fts(kb.store) else None
        self._tokenizer = Tokenizer()
        if self._lexical is None:
            report.notes["words"] = "there is no word index yet; a build makes it"

    def check(self, rows: Sequence[StoredPair]) -> None:
        """Each caption that has a word."""
        for row in rows if self._lexical is not None else ():
            query = " ".join(self._rarest(row.caption))
            if query:
                self._check_row(row, query)

    def _rarest(self, caption: str) -> list[str]:
        assert self._lexical is not None
        terms = [term for term in dict.fromkeys(self._tokenizer(caption)) if self._tokenizer(term) == [term]]
        frequencies = self._lexical.statistics(" ".join(terms)).frequencies
        return sorted(terms, key=lambda term: frequencies.get(term, 0))[:_RAREST]

    def _check_row(self, row: StoredPair, query: str) -> None:
        assert self._lexical is not None
        score = float(self._lexical.scores(query, np.array([row.id]))[0])
        corpus = self._lexical.statistics(query)
        deserved = sum(corpus.contributions(self._tokenizer(query), self._tokenizer(row.caption)).values())
        is_right = score > 0 and abs(score - deserved) <= _SCORE_ERROR * deserved
        wrong = f"searched by {query!r}, its own words, it scores {score:.4f} and should have {deserved:.4f}"
        self._report.check("words", row.id, None if is_right else wrong)


def _check_ledger(kb: "KnowledgeBase", report: Verification) -> None:
    """Rows and bad samples of every shard against its entry. Pairs that were taken down may be missing."""
    counts = _rows_by_shard(kb)
    names = {(record.dataset, record.shard): record for record in kb.store.shards()}
    for name, record in names.items():
        pairs, removed, bad = (counts.pop((kind, *name), 0) for kind in ("pair", "removed", "bad"))
        wrong = None
        if not pairs <= record.pairs <= pairs + removed:
            wrong = f"{pairs} rows, {removed} taken down, and the ledger says {record.pairs}"
        elif bad != record.bad:
            wrong = f"{bad} bad samples, and the ledger says {record.bad}"
        report.check("ledger", None, wrong and f"{_named(name[0], name[1])}: {wrong}")
    for (kind, dataset, shard), rows in counts.items():
        if kind in ("pair", "bad") and shard != ADDED_SHARD:
            what = "rows" if kind == "pair" else "bad samples"
            report.check(
                "ledger",
                None,
                f"{rows} {what} of {_named(dataset, shard)}, which has no entry",
            )


def _rows_by_shard(kb: "KnowledgeBase") -> dict[tuple[str, str, str], int]:
    """(kind, dataset, shard) -> number of rows."""
    import pyarrow

    columns = ["kind", "dataset", "shard"]
    counts: Counter[tuple[str, str, str]] = Counter()
    for batch in kb.store.dataset.to_batches(columns=columns):
        table = pyarrow.Table.from_batches([batch]).group_by(columns).aggregate([([], "count_all")])
        for row in table.to_pylist():
            counts[row["kind"], row["dataset"], row["shard"]] += row["count_all"]
    return dict(counts)
