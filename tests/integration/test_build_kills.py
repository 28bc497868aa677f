"""kill -9 at twenty random moments of build and compaction: the final table is that of runs nobody disturbed."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from index.compaction import compact
from index.ingest.build import QUARANTINE, BuildConfig, build
from index.knowledge_base import MANIFEST, KnowledgeBase
from index.store import PairStore
from tests.fakes import HashEmbedder, sample, write_tar

ROOT = Path(__file__).parents[2]
SHARDS = 28
PER_SHARD = 12
STEPS = ("read", "stage", "commit", "index", "compact")  # of a run, in order
KILLS = [step for step in STEPS for _ in range(4)]

RUNS = """
import os, sys, time
sys.path.insert(0, {root!r})
import fsspec, lance, pyarrow.parquet, PIL.Image, PIL.PngImagePlugin  # once, for all runs
import index.ingest.build as building
from index import compaction
from index.ingest.shards import Shard
from index.knowledge_base import KnowledgeBase
from index.search import lexical
from index.store import PairStore
from tests.fakes import HashEmbedder

building.GROUP_SECONDS = 0  # a commit for each shard

def mark(owner, name, step):
    original = getattr(owner, name)
    def marked(*args, **kwargs):
        os.write(1, step.encode() + b"\\n")
        return original(*args, **kwargs)
    setattr(owner, name, marked)

mark(Shard, "samples", "read")
mark(PairStore, "stage", "stage")
mark(PairStore, "_commit", "commit")
mark(KnowledgeBase, "build_search", "index")
mark(lexical, "build_fts", "index")
mark(PairStore, "index_ids", "index")
for name in ("rewrite_fragments", "commit_rewrite", "forget_versions"):
    mark(PairStore, name, "compact")
mark(compaction, "_sweep", "compact")

def run():
    kb = KnowledgeBase.create({kb!r}, HashEmbedder())
    building.build(kb, [{source!r}], building.BuildConfig())
    compaction.compact(kb)

for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            run()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.write(1, f"{{child}}\\n".encode())
    _, status = os.waitpid(child, 0)
    os.write(1, f"ended {{os.waitstatus_to_exitcode(status)}}\\n".encode())
"""


@dataclass
class Runs:
    """Makes a run at each request: a process forked from one that has imported everything."""

    process: "subprocess.Popen[str]"
    killed: int = 0

    def run(self, *, kill_at: str = "", count: int = 1, delay: float = 0) -> list[str]:
        """The steps it took until it ended, or was killed so many seconds after the `count`-th step of a kind."""
        assert self.process.stdin is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        child, steps = 0, list[str]()
        while True:
            line = self._line()
            if line.startswith("ended"):
                break
            if line.isdigit():
                child = int(line)
                continue
            steps.append(line)
            if line == kill_at and steps.count(kill_at) == count:
                time.sleep(delay)
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(child, signal.SIGKILL)
        assert line in {"ended -9", "ended 0"}, steps
        self.killed += line == "ended -9"
        return steps

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, "the runs have ended"
        return line


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Shards with a bad sample each: a quarantine that a resume could double."""
    for shard in range(SHARDS):
        members = [item for i in range(PER_SHARD) for item in sample(shard * PER_SHARD + i).items()]
        members += [(f"bad{shard}.png", b"nonsense"), (f"bad{shard}.txt", b"nothing")]
        write_tar(tmp_path / "pets" / f"{shard:05d}.tar", members)
    return tmp_path / "pets"


@pytest.fixture
def runs(corpus: Path, tmp_path: Path) -> Iterator[Runs]:
    script = RUNS.format(root=str(ROOT), kb=str(tmp_path / "kb"), source=str(corpus))
    with (
        (tmp_path / "stderr").open("w") as stderr,  # Lance warns of forks; here its threads do not run yet
        subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as process,
    ):
        yield Runs(process)


def contents(kb: Path) -> list[tuple[str, ...]]:
    rows = PairStore(kb).dataset.to_table().to_pylist()
    return sorted(tuple(map(str, row.values())) for row in rows)


def pairs_that_are_there(kb: Path) -> int:
    """As a reader sees it, right after the writer was killed: whole shards, and a search that answers."""
    if not (kb / MANIFEST).exists() or not PairStore.exists(kb):
        return 0
    base = KnowledgeBase.open(kb, HashEmbedder())
    count = base.store.count()
    assert count % PER_SHARD == 0, "a shard is there whole or not at all"
    assert len(base.store.shards()) * PER_SHARD == count, "and so is its entry in the ledger"
    hits = base.search("a red circle number 0", k=3) if count else []
    assert len(hits) == min(3, count)
    return count


@pytest.mark.slow
def test_kills_at_twenty_random_moments_lose_nothing_and_double_nothing(
    runs: Runs, corpus: Path, tmp_path: Path
) -> None:
    chance = random.Random(0)
    kb = tmp_path / "kb"
    counts = []
    for step in KILLS:
        runs.run(kill_at=step, count=chance.choice([1, 2]), delay=chance.uniform(0, 0.02))
        counts.append(pairs_that_are_there(kb))
    assert counts == sorted(counts)
    assert runs.killed >= len(KILLS) - 3, "the last step may be over before it is killed"
    assert 0 < counts[KILLS.index("index") - 1] < SHARDS * PER_SHARD, "so long, kills fell into the building"
    last = runs.run()
    assert last.count("index") >= 3

    whole = KnowledgeBase.create(tmp_path / "whole", HashEmbedder())
    build(whole, [str(corpus)], BuildConfig())
    compact(whole)
    assert contents(kb) == contents(tmp_path / "whole")
    assert (kb / QUARANTINE).read_text() == (tmp_path / "whole" / QUARANTINE).read_text()
    base = KnowledgeBase.open(kb, HashEmbedder())
    for by in ("clip", "bm25", "hybrid"):
        for text in ("a red circle", "blue square number 12"):
            found, expected = (one.search(text, k=20, by=by) for one in (base, whole))
            assert [(hit.id, hit.clip, hit.bm25) for hit in found] == [(h.id, h.clip, h.bm25) for h in expected]
    assert not list(kb.glob(".*")), "no temporary file is left"
    files = {path.name for path in (kb / "pairs.lance" / "data").iterdir()}
    used = {file.path for fragment in base.store.dataset.get_fragments() for file in fragment.data_files()}
    held = {
        file.path
        for snapshot in base.snapshots()
        for fragment in PairStore(kb, snapshot=snapshot.tag).dataset.get_fragments()
        for file in fragment.data_files()
    }
    assert files == used | held, "what the killed runs had written and not committed is gone"
