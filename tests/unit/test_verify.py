"""Verify finds each link that is broken on purpose, names it, and finds nothing in what is whole."""

import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lance
import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from index.cli import make_app
from index.embedder import decode_scaled
from index.ingest.build import BuildConfig, build
from index.knowledge_base import KnowledgeBase
from index.search.lexical import _fts_segments
from index.search.searcher import ExactSearcher, SearcherManifest
from index.verify import LINKS, Verification, verify
from tests.fakes import HashEmbedder, caption_of, draw, encode, write_img2dataset, write_tar

PAIRS = 40


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source and a knowledge base of it, the searcher approximate."""
    folder = tmp_path_factory.mktemp("made")
    write_img2dataset(folder / "data", shards=2, per_shard=PAIRS // 2)
    build(KnowledgeBase.create(folder / "kb", HashEmbedder()), [str(folder / "data")], BuildConfig(searcher="lance"))
    return folder


@pytest.fixture
def base(made: Path, tmp_path: Path) -> KnowledgeBase:
    """A copy to be broken. The source stays where it is, as the rows say."""
    shutil.copytree(made / "kb", tmp_path / "kb")
    return KnowledgeBase.open(tmp_path / "kb", HashEmbedder())


def broken(report: Verification) -> dict[str, set[int | None]]:
    found: dict[str, set[int | None]] = {}
    for failure in report.failures:
        found.setdefault(failure.link, set()).add(failure.id)
    return found


def two(base: KnowledgeBase) -> tuple[int, int]:
    ids = base.store.matching_ids()
    return int(ids[3]), int(ids[11])


def rewrite(base: KnowledgeBase, ids: tuple[int, ...], change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Change rows behind the store's back."""
    dataset = lance.dataset(base.store.dataset.uri)
    where = f"kind = 'pair' AND id IN ({', '.join(map(str, ids))})"
    rows = dataset.to_table(filter=where).to_pylist()
    change(rows)
    dataset.delete(where)
    lance.write_dataset(pa.Table.from_pylist(rows, schema=dataset.schema), dataset.uri, mode="append")


def swap(column: str) -> Callable[[list[dict[str, Any]]], None]:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[0][column], rows[1][column] = rows[1][column], rows[0][column]

    return change


def other_knowledge_base(folder: Path, sample: Callable[[int], tuple[PIL.Image.Image, str]]) -> KnowledgeBase:
    """Rows of the same ids at the same places, of other images or captions."""
    for shard in range(2):
        members: dict[str, bytes] = {}
        for i in range(shard * PAIRS // 2, (shard + 1) * PAIRS // 2):
            image, caption = sample(i)
            members |= {f"{i:09d}.png": encode(image), f"{i:09d}.txt": caption.encode()}
        write_tar(folder / "data" / f"{shard:05d}.tar", members)
    other = KnowledgeBase.create(folder / "other", HashEmbedder())
    build(other, [str(folder / "data")], BuildConfig())
    return other


def test_what_is_whole_is_sound(base: KnowledgeBase) -> None:
    base.add(draw(900), "one added by hand")
    report = verify(base, sample=None)
    assert report.is_sound
    assert not report.unreadable
    assert (report.rows, report.sampled) == (PAIRS + 1, PAIRS + 1)
    assert {link: report.checked[link] for link in LINKS} == {
        **dict.fromkeys(LINKS, PAIRS + 1),
        "caption": PAIRS,  # nothing but the knowledge base knows of the one that was added
        "searcher": report.checked["searcher"],
        "ledger": 2,
    }
    assert report.checked["searcher"] >= 5 * PAIRS


def test_decoded_images_are_let_go_one_by_one(base: KnowledgeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakValueDictionary[int, PIL.Image.Image] = weakref.WeakValueDictionary()
    most = []

    def decode(content: bytes, *, side: int | None) -> tuple[PIL.Image.Image, tuple[int, int]]:
        image, size = decode_scaled(content, side=side)
        alive[id(image)] = image
        most.append(len(alive))
        return image, size

    monkeypatch.setattr("index.verify.decode_scaled", decode)
    assert verify(base).is_sound
    assert len(most) == PAIRS
    assert max(most) < PAIRS


def test_a_sample_is_drawn_by_its_seed(base: KnowledgeBase) -> None:
    assert verify(base, sample=7).checked["vector"] == 7
    assert verify(base, sample=1000).sampled == PAIRS


def test_swapped_vectors(base: KnowledgeBase) -> None:
    pair = two(base)
    rewrite(base, pair, swap("vector"))
    assert broken(verify(base)) == {"embedding": set(pair)}


def test_swapped_captions(base: KnowledgeBase) -> None:
    pair = two(base)
    rewrite(base, pair, swap("caption"))
    report = verify(base)
    assert broken(report) == {"caption": set(pair)}
    assert "in shard '00000.tar'" in report.failures[0].what


def test_swapped_locations(base: KnowledgeBase) -> None:
    pair = two(base)
    rewrite(base, pair, swap("image_offset"))
    assert broken(verify(base)) == {"image": set(pair)}


def test_swapped_images(base: KnowledgeBase) -> None:
    """The location and the digest agree with each other, and not with the vector."""
    pair = two(base)

    def change(rows: list[dict[str, Any]]) -> None:
        for column in ("image_offset", "image_size", "image_sha256"):
            swap(column)(rows)

    rewrite(base, pair, change)
    assert broken(verify(base)) == {"embedding": set(pair)}


def test_a_changed_key(base: KnowledgeBase) -> None:
    pair, _ = two(base)
    rewrite(base, (pair,), lambda rows: rows[0].update(key="other"))
    assert broken(verify(base)) == {"id": {pair}, "caption": {pair}}


@pytest.mark.parametrize("wrong", [np.nan, 0.0, 2.0])
def test_vectors_that_are_none(base: KnowledgeBase, wrong: float) -> None:
    pair, _ = two(base)
    rewrite(base, (pair,), lambda rows: rows[0].update(vector=(np.array(rows[0]["vector"]) * wrong).tolist()))
    assert broken(verify(base)) == {"vector": {pair}}


def test_a_row_that_is_there_twice(base: KnowledgeBase) -> None:
    pair, _ = two(base)
    rewrite(base, (pair,), lambda rows: rows.append(rows[0]))
    report = verify(base)
    assert broken(report) == {"id": {pair}, "ledger": {None}}
    assert any("2 rows have this id" in failure.what for failure in report.failures)


def test_an_image_overwritten_in_the_tar(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "data", tmp_path / "data")
    base = KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
    build(base, [str(tmp_path / "data")], BuildConfig())
    row = base.store.get(base.store.matching_ids()[:1])[0]
    assert row.image.size is not None
    with open(row.image.uri, "r+b") as tar:
        tar.seek(row.image.offset or 0)
        tar.write(encode(draw(901))[: row.image.size].ljust(row.image.size, b"\0"))
    report = verify(base)
    assert broken(report) == {"image": {row.id}}
    assert "holds other bytes than were read in" in report.failures[0].what
    assert ["has changed since it was read in" in line for line in report.unreadable] == [True]


def test_the_searchers_ids_permuted(base: KnowledgeBase) -> None:
    base.build_search("scann")
    (path,) = (base.directory / str(base.manifest.searcher)).rglob("ids.npy")
    ids = np.load(path)
    np.save(path, np.roll(ids, 1))
    report = verify(base)
    assert set(broken(report)) == {"searcher"}
    assert len(report.failures) == PAIRS + 1
    assert "the id is another's" in report.failures[0].what
    assert "by their own vectors" in report.failures[-1].what


def test_a_searcher_of_other_vectors(base: KnowledgeBase, tmp_path: Path) -> None:
    """As when the folder of another build is put in its place."""
    other = other_knowledge_base(tmp_path, lambda i: (draw(i + 500), caption_of(i)))
    other.build_search("lance")
    shutil.rmtree(base.directory / str(base.manifest.searcher))
    shutil.copytree(other.directory / str(other.manifest.searcher), base.directory / str(base.manifest.searcher))
    assert set(broken(verify(base))) == {"searcher"}


@pytest.mark.parametrize(("target", "is_sound"), [(0.6, True), (0.95, False)])
def test_a_searcher_is_held_to_what_was_asked_of_it(
    base: KnowledgeBase, monkeypatch: pytest.MonkeyPatch, *, target: float, is_sound: bool
) -> None:
    ids, vectors = base.store.ids_and_vectors()
    some = len(ids) * 7 // 10

    class Forgetful(ExactSearcher):
        def search(self, queries: Any, *, top_k: int, recall_at: Any = None, above: Any = None) -> Any:
            return ExactSearcher(ids[:some], vectors[:some]).search(queries, top_k=top_k)

    folder = base.directory / str(base.manifest.searcher)
    built = SearcherManifest.read(folder)
    replace(built, kind="lance", target_recall=target, recall_at_10=target).write(folder)
    monkeypatch.setattr(base, "open_searcher", lambda: Forgetful(ids, vectors, snapshot=base.store.high_water))
    report = verify(base)
    assert report.is_sound == is_sound
    assert "by their own vectors" in "".join(failure.what for failure in report.failures) or is_sound


def test_a_searcher_that_does_not_open(base: KnowledgeBase) -> None:
    (base.directory / str(base.manifest.searcher) / "ids.npy").write_bytes(b"no array")
    assert broken(verify(base)) == {"searcher": {None}}


def test_a_word_index_of_other_captions(base: KnowledgeBase, tmp_path: Path) -> None:
    other = other_knowledge_base(tmp_path, lambda i: (draw(i), caption_of(i + 1)))
    ours, theirs = (
        Path(store.dataset.uri) / "_indices" / str(_fts_segments(store)[0].uuid) for store in (base.store, other.store)
    )
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    assert set(broken(verify(base))) == {"words"}


def test_a_ledger_that_says_otherwise(base: KnowledgeBase) -> None:
    (record, _) = base.store.shards()
    rows = f"kind = 'pair' AND shard = '{record.shard}' AND key = '000000003'"
    lance.dataset(base.store.dataset.uri).delete(rows)
    report = verify(base)
    assert broken(report) == {"ledger": {None}}
    assert "19 rows, 0 taken down, and the ledger says 20" in report.failures[0].what
    lance.dataset(base.store.dataset.uri).delete(f"kind = 'shard' AND shard = '{record.shard}'")
    assert "which has no entry" in verify(base).failures[0].what


def test_bad_samples_without_a_shard(base: KnowledgeBase) -> None:
    dataset = lance.dataset(base.store.dataset.uri)
    bad = {"kind": "bad", "dataset": "data", "shard": "00001.tar", "key": "x", "reason": "for the test"}
    for shard in ("00001.tar", "gone.tar"):
        row = pa.Table.from_pylist([{**bad, "shard": shard}], schema=dataset.schema)
        lance.write_dataset(row, dataset.uri, mode="append")
    whats = sorted(failure.what for failure in verify(base).failures)
    assert whats == [
        "1 bad samples of shard 'gone.tar' of dataset 'data', which has no entry",
        "shard '00001.tar' of dataset 'data': 1 bad samples, and the ledger says 0",
    ]


def test_what_was_taken_down_is_not_missed(base: KnowledgeBase) -> None:
    base.remove(list(two(base)))
    assert verify(base).is_sound


def test_originals_that_are_gone_are_counted_apart(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "data", tmp_path / "data")
    base = KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
    build(base, [str(tmp_path / "data")], BuildConfig())
    (tmp_path / "data" / "00000.tar").unlink()
    report = verify(base)
    assert report.is_sound
    assert len(report.unreadable) == PAIRS // 2 + 1  # and the shard
    assert report.checked["embedding"] == PAIRS // 2
    assert "there is no such file" in report.unreadable[0]
    shutil.rmtree(tmp_path / "data")
    assert verify(base).is_sound


def test_what_is_said_is_json(base: KnowledgeBase) -> None:
    pair = two(base)
    rewrite(base, pair, swap("vector"))
    document = json.loads(json.dumps(verify(base).to_json(), allow_nan=False))
    assert document["sound"] is False
    assert document["checks"]["embedding"] == {"checked": PAIRS, "failed": 2}
    assert {failure["id"] for failure in document["failures"]} == set(map(str, pair))


def test_the_command_exits_1_and_says_which_row(base: KnowledgeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.commands.verify.open_for_query", lambda *_: base)
    run, args = CliRunner(), ["verify", "--kb", str(base.directory), "--all"]
    whole = run.invoke(make_app(), args)
    assert whole.exit_code == 0, whole.output
    assert whole.stdout.rstrip().endswith("sound")
    pair = two(base)
    rewrite(base, pair, swap("caption"))
    broken_ = run.invoke(make_app(), args)
    assert broken_.exit_code == 1
    assert f"caption: {pair[0]}" in broken_.stdout
    told = run.invoke(make_app(), [*args, "--json"])
    assert told.exit_code == 1
    assert json.loads(told.stdout)["checks"]["caption"]["failed"] == 2
