"""A knowledge base whose table or whose kb.json is gone: never taken for an empty one."""

import shutil
from pathlib import Path

import pytest

from index.errors import KnowledgeBaseError
from index.knowledge_base import MANIFEST, KnowledgeBase
from index.store import PairStore
from tests.fakes import HashEmbedder, draw


@pytest.fixture
def kb(tmp_path: Path) -> Path:
    KnowledgeBase.create(tmp_path / "kb", HashEmbedder()).add(draw(1), "a circle")
    return tmp_path / "kb"


@pytest.mark.parametrize("lost", ["pairs.lance", "pairs.lance/_versions"])
def test_a_table_that_was_deleted_is_missing_and_not_empty(kb: Path, lost: str) -> None:
    shutil.rmtree(kb / lost)
    before = sorted(kb.rglob("*"))
    for open_it in (KnowledgeBase.open, KnowledgeBase.create):
        with pytest.raises(KnowledgeBaseError, match=r"the table of the knowledge base is missing: .*pairs\.lance"):
            open_it(kb, HashEmbedder())
    assert sorted(kb.rglob("*")) == before, "nothing is put in its place"


def test_a_table_without_kb_json_is_not_filled_with_vectors_of_another_model(kb: Path) -> None:
    (kb / MANIFEST).unlink()
    with pytest.raises(KnowledgeBaseError, match=r"has the table of a knowledge base and no kb\.json"):
        KnowledgeBase.create(kb, HashEmbedder(dim=16))
    assert PairStore(kb).count() == 1


def test_a_creation_that_was_killed_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("index.knowledge_base.Manifest.write", die)
        with pytest.raises(KeyboardInterrupt):
            KnowledgeBase.create(tmp_path / "kb", HashEmbedder(dim=16))
    assert PairStore.exists(tmp_path / "kb")
    kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder(dim=32))
    assert kb.store.dim == 32
    kb.add(draw(1), "a circle")
    assert kb.search("circle", k=1)
