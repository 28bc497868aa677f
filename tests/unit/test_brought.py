"""Vectors that a source brings: those of another model are told by their captions or pictures, and no others are."""

from collections.abc import Sequence
from pathlib import Path

import lance
import numpy as np
import pytest
from pyarrow import parquet, table

from index.embedder import DeferredEmbedder, Embedder
from index.errors import KnowledgeBaseError
from index.ingest.brought import ASKED, FEWEST
from index.ingest.build import BuildConfig, BuildReport, build
from index.ingest.decode import KeepImages
from index.knowledge_base import KnowledgeBase
from index.lock import writer_lock
from index.store import PairStore
from tests.fakes import HashEmbedder, caption_of, draw, encode

SENTENCE = "the vectors that the source brings do not look like those of the model hash-32"


def built(
    folder: Path,
    vectors: np.ndarray,
    captions: list[str],
    *,
    with_images: bool = False,
    embedder: Embedder | None = None,
) -> BuildReport:
    """A knowledge base of clip-retrieval's output."""
    write_output(folder, vectors, captions, with_images=with_images)
    kb = KnowledgeBase.create(folder / "kb", embedder or HashEmbedder())
    return build(kb, [str(folder / "out")], BuildConfig(duplicates=False))


def write_output(
    folder: Path, vectors: np.ndarray, captions: list[str], *, with_images: bool = False, part: int = 0
) -> None:
    for name in ("img_emb", "metadata", "images"):
        (folder / "out" / name).mkdir(parents=True, exist_ok=True)
    paths = [str(folder / "out" / "images" / f"{i}.png") for i in range(len(captions))]
    for i, path in enumerate(paths if with_images else []):
        Path(path).write_bytes(encode(draw(i)))
    np.save(folder / "out" / "img_emb" / f"img_emb_{part}.npy", vectors)
    columns = {"caption": captions, **({"image_path": paths} if with_images else {})}
    parquet.write_table(table(columns), folder / "out" / "metadata" / f"metadata_{part}.parquet")


def near(captions: list[str], *, salt: str = "", noise: float = 0.9) -> np.ndarray:
    """Vectors as a trained model has them for the pictures of these captions: a cosine of about 0.4 to their own."""
    own = HashEmbedder(salt=salt).texts([salt + caption.replace(" ", f" {salt}") for caption in captions])
    rows = own + noise * np.random.default_rng(0).normal(size=own.shape).astype(np.float32) / 32**0.5 * 2
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("count", [FEWEST, ASKED, 300])
def test_captions_tell_the_vectors_of_another_model(tmp_path: Path, count: int) -> None:
    captions = [caption_of(number) for number in range(count)]
    for name, salt in (("own", ""), ("other", "x")):
        notes = built(tmp_path / name, near(captions, salt=salt), captions).notes
        assert [note.startswith(SENTENCE) for note in notes] == [True] * bool(salt)
    assert "captions are no nearer" in notes[0]


def test_pictures_decide_where_they_can_be_read(tmp_path: Path) -> None:
    """This model knows nothing of captions, as one with random weights; its own vectors raise no doubt all the same."""
    captions = [caption_of(number) for number in range(30)]
    own = HashEmbedder().images([draw(number) for number in range(30)])
    assert built(tmp_path / "own", own, captions, with_images=True).notes == ()
    (note,) = built(tmp_path / "other", np.roll(own, 1, axis=0), captions, with_images=True).notes
    assert note.startswith(SENTENCE)
    assert "pictures embedded again have a cosine of" in note


@pytest.mark.parametrize("captions", [["a picture"] * 100, [caption_of(i) for i in range(FEWEST - 1)]])
def test_few_captions_say_nothing(tmp_path: Path, captions: list[str]) -> None:
    vectors = np.random.default_rng(0).normal(size=(len(captions), 32)).astype(np.float32)
    assert built(tmp_path, vectors, captions).notes == ()


def test_the_largest_shard_is_looked_at(tmp_path: Path) -> None:
    captions = [caption_of(number) for number in range(100)]
    write_output(tmp_path, near(captions[:3], salt="x"), captions[:3])  # too few of them to say anything
    write_output(tmp_path, near(captions, salt="x"), captions, part=1)
    kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
    (note,) = build(kb, [str(tmp_path / "out")], BuildConfig(duplicates=False)).notes
    assert note.startswith(SENTENCE)


def test_a_model_that_is_another_by_now_does_not_fail_a_build_that_needs_none(tmp_path: Path) -> None:
    captions = [caption_of(number) for number in range(100)]
    KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
    changed = DeferredEmbedder(
        ["hash-32"], dim=32, fingerprint=HashEmbedder().fingerprint, load=lambda name: HashEmbedder(salt="new")
    )
    assert built(tmp_path, near(captions), captions, embedder=changed).notes == ()


@pytest.mark.parametrize("thumbnail", [None, 16])
def test_pictures_that_were_embedded_now_are_not_embedded_again(tmp_path: Path, thumbnail: int | None) -> None:
    """A Lance table may bring vectors, and this one does not."""

    class Counting(HashEmbedder):
        embedded = 0

        def embed(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
            Counting.embedded += len(prepared)
            return super().embed(prepared)

    rows = table({"caption": [caption_of(i) for i in range(30)], "image": [encode(draw(i)) for i in range(30)]})
    lance.write_dataset(rows, str(tmp_path / "t.lance"))
    kb = KnowledgeBase.create(tmp_path / "kb", Counting())
    config = BuildConfig(duplicates=False, keep=KeepImages(thumbnail=thumbnail))
    report = build(kb, [str(tmp_path / "t.lance")], config)
    assert (report.layouts, report.pairs_added, Counting.embedded) == ({"lance table": 1}, 30, 30)


def test_the_report_is_made_while_nobody_may_delete_what_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_locked(store: PairStore, *args: object) -> str:
        with pytest.raises(KnowledgeBaseError, match="is being written"), writer_lock(store.directory):
            pass
        return "looked"

    monkeypatch.setattr("index.ingest.build.doubt", is_locked)
    captions = [caption_of(number) for number in range(3)]
    assert built(tmp_path, near(captions), captions).notes == ("looked",)
