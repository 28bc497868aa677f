"""Vectors that a source brings: those of another model are told by their captions or pictures, and no others are."""

from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet, table

from index.ingest.brought import ASKED, FEWEST
from index.ingest.build import BuildConfig, BuildReport, build
from index.knowledge_base import KnowledgeBase
from tests.fakes import HashEmbedder, caption_of, draw, encode

SENTENCE = "the vectors that the source brings do not look like those of the model hash-32"


def built(folder: Path, vectors: np.ndarray, captions: list[str], *, with_images: bool = False) -> BuildReport:
    """A knowledge base of clip-retrieval's output."""
    for part in ("img_emb", "metadata", "images"):
        (folder / "out" / part).mkdir(parents=True)
    paths = [str(folder / "out" / "images" / f"{i}.png") for i in range(len(captions))]
    for i, path in enumerate(paths if with_images else []):
        Path(path).write_bytes(encode(draw(i)))
    np.save(folder / "out" / "img_emb" / "img_emb_0.npy", vectors)
    columns = {"caption": captions, **({"image_path": paths} if with_images else {})}
    parquet.write_table(table(columns), folder / "out" / "metadata" / "metadata_0.parquet")
    kb = KnowledgeBase.create(folder / "kb", HashEmbedder())
    return build(kb, [str(folder / "out")], BuildConfig(duplicates=False))


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
