"""Faults in the middle of a build: killed, interrupted, a full disk. What was there stays whole; the rest follows."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from index.errors import KnowledgeBaseError, damage
from index.ingest.build import BuildConfig, BuildReport, build
from index.ingest.ledger import Ledger
from index.knowledge_base import KnowledgeBase
from index.store import PairStore
from tests.fakes import HashEmbedder, draw, sample, write_img2dataset, write_tar

ROOT = Path(__file__).parents[2]

SLOW_BUILD = """
import sys, time
import fsspec, lance, lancedb, PIL.Image  # so that what follows `ready` is the build
sys.path.insert(0, {root!r})
import index.ingest.build
from index.cli import run
from index.ingest.build import BuildConfig, build
from index.knowledge_base import KnowledgeBase
from tests.fakes import HashEmbedder

class Slow(HashEmbedder):
    def embed(self, prepared):
        time.sleep(0.1)
        return super().embed(prepared)

index.ingest.build.GROUP_ROWS = 1  # a commit for every shard

def command(args):
    kb = KnowledgeBase.create({kb!r}, Slow())
    print("ready", flush=True)
    build(kb, [{source!r}], BuildConfig(), on_shard=lambda record: print("landed", flush=True))
    print("done", flush=True)

run(command, [])
"""


def start(kb: Path, source: Path, *, landed: int = 0) -> "subprocess.Popen[str]":
    """A build in another process, with this many shards in the table already."""
    script = SLOW_BUILD.format(root=str(ROOT), kb=str(kb), source=str(source))
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for _ in range(landed):
        assert process.stdout.readline() == "landed\n"
    return process


def build_at(kb: Path, source: Path) -> BuildReport:
    return build(KnowledgeBase.create(kb, HashEmbedder()), [str(source)], BuildConfig())


def contents(kb: Path) -> list[tuple[str, ...]]:
    rows = PairStore(kb).dataset.to_table().to_pylist()
    return sorted(tuple(map(str, row.values())) for row in rows)


@pytest.fixture(autouse=True)
def a_commit_for_every_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.ingest.build.GROUP_ROWS", 1)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Twelve shards, each with a bad sample: a quarantine that a resume could double."""
    for shard in range(12):
        members = [item for i in range(20) for item in sample(shard * 20 + i).items()]
        members += [(f"bad{shard}.png", b"nonsense"), (f"bad{shard}.txt", b"nothing")]
        write_tar(tmp_path / "pets" / f"{shard:05d}.tar", members)
    return tmp_path / "pets"


def die_at(monkeypatch: pytest.MonkeyPatch, owner: type, step: str, count: int) -> None:
    """Make the `count`-th call of a step the end of the build."""
    original = getattr(owner, step)
    calls = 0

    def dies(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            raise RuntimeError("power cut")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, step, dies)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("owner", "step", "lands"),
    [
        (PairStore, "stage", False),
        (PairStore, "_commit", False),
        (Ledger, "enter", True),
        (KnowledgeBase, "build_search", True),
    ],
)
def test_a_build_that_dies_at_any_step_is_finished_by_the_next(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, step: str, lands: bool, count: int
) -> None:
    count = 1 if owner is KnowledgeBase else count  # it is called once
    with monkeypatch.context() as patch:
        die_at(patch, owner, step, count)
        with pytest.raises(RuntimeError, match="power cut"):
            build_at(tmp_path / "kb", corpus)
    landed, left = divmod(PairStore(tmp_path / "kb").count(), 20)
    assert left == 0
    before = 12 if owner is KnowledgeBase else count - 1 + lands
    if step == "stage":  # shards behind the one that failed may be staged already: they are whole, and land
        assert before <= landed < 12
    else:
        assert landed == before
    assert build_at(tmp_path / "kb", corpus).shards_done == 12 - landed
    build_at(tmp_path / "whole", corpus)
    assert contents(tmp_path / "kb") == contents(tmp_path / "whole")


def test_a_shard_that_is_being_replaced_keeps_its_old_rows_until_the_new_ones_are_there(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_at(tmp_path / "kb", corpus)
    for shard in range(12):
        write_tar(
            corpus / f"{shard:05d}.tar", [item for i in range(20) for item in sample(1000 + shard * 20 + i).items()]
        )
    with monkeypatch.context() as patch:
        die_at(patch, PairStore, "_delete_from_fragments", 2)
        with pytest.raises(RuntimeError, match="power cut"):
            build_at(tmp_path / "kb", corpus)
    store = PairStore(tmp_path / "kb")
    assert store.count() == 240
    assert store.count("key >= '000001000'") == 20
    build_at(tmp_path / "kb", corpus)
    build_at(tmp_path / "whole", corpus)
    assert contents(tmp_path / "kb") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_interrupt_is_one_sentence_and_the_build_goes_on_from_there(corpus: Path, tmp_path: Path) -> None:
    process = start(tmp_path / "kb", corpus, landed=2)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "done" not in out
    assert err == "error: stopped; what was finished is kept, and the same command goes on from there\n"
    landed = PairStore(tmp_path / "kb").count()
    assert 0 < landed < 240
    assert build_at(tmp_path / "kb", corpus).pairs_added == 240 - landed


@pytest.mark.slow
def test_a_second_build_is_told_of_the_first(corpus: Path, tmp_path: Path) -> None:
    process = start(tmp_path / "kb", corpus, landed=1)
    with pytest.raises(KnowledgeBaseError, match=f"being written by process {process.pid}"):
        build_at(tmp_path / "kb", corpus)
    out, err = process.communicate(timeout=30)
    assert (out.splitlines()[-1], err, process.returncode) == ("done", "", 0)  # lines read ahead are not in `out`
    assert len(PairStore(tmp_path / "kb").shards()) == 12


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("lance.fragment.write_fragments", OSError("LanceError(IO): No space left on device (os error 28), disk.rs:1")),
        ("lance.LanceDataset.commit", OSError("LanceError(IO): No space left on device (os error 28), disk.rs:1")),
        ("index.ingest.build.new_file", OSError(errno.ENOSPC, "No space left on device")),
        ("index.knowledge_base.build_searcher", OSError(errno.ENOSPC, "No space left on device")),
    ],
)
def test_a_full_disk_is_one_sentence_and_harms_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: OSError
) -> None:
    write_img2dataset(tmp_path / "first", shards=1, per_shard=3)
    build_at(tmp_path / "kb", tmp_path / "first")
    before = set(contents(tmp_path / "kb"))

    def full(*args: Any, **kwargs: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        with pytest.raises(KnowledgeBaseError, match="no space is left on the disk") as told:
            build_at(tmp_path / "kb", corpus)
    assert "\n" not in str(told.value)
    assert before <= set(contents(tmp_path / "kb"))
    kb = KnowledgeBase.open(tmp_path / "kb", HashEmbedder())
    assert kb.search("a red circle", k=1)[0].caption.startswith("a red")
    assert not list((tmp_path / "kb").glob(".*"))  # no temporary file is left
    assert build_at(tmp_path / "kb", corpus).pairs_total == 243


def test_a_full_disk_while_adding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
    kb.add(draw(1), "a dot")

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(KnowledgeBaseError, match="no space is left"):
            kb.add(draw(2), "another")
    assert [path.name.startswith(".") for path in (tmp_path / "kb" / "added").iterdir()] == [False]
    assert [hit.caption for hit in kb.search("dot", k=5)] == ["a dot"]


def test_a_source_that_cannot_be_read_is_one_sentence(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from index.errors import CorpusError
    from index.ingest.readers import Shard

    def broken(self: Shard) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", self.name)

    with monkeypatch.context() as patch:
        patch.setattr(Shard, "digest", broken)
        with pytest.raises(CorpusError, match=r"cannot be read .*00000\.tar"):
            build_at(tmp_path / "kb", corpus)
    assert build_at(tmp_path / "kb", corpus).pairs_total == 240


def test_damage_of_the_table_is_not_put_down_to_a_source(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(self: PairStore) -> None:
        raise OSError("External error: Not found: kb/pairs.lance/data/1.lance, /root/rust/lance-io/src/lib.rs:1")

    monkeypatch.setattr(PairStore, "shards", lost)
    with pytest.raises(OSError, match=r"pairs\.lance") as told:
        build_at(tmp_path / "kb", corpus)
    assert damage(told.value)
