"""Parts: processes that fill one knowledge base side by side, and keep out of the way of what they cannot share."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest

from index.errors import ConfigError, KnowledgeBaseError
from index.ingest import parts
from index.ingest.build import BuildConfig, BuildReport, build
from index.ingest.parts import Part, without_parts
from index.knowledge_base import KnowledgeBase
from index.store import PairStore
from tests.fakes import HashEmbedder, caption_of, sample, write_tar

ROOT = Path(__file__).parents[2]
SHARDS = 12
PER_SHARD = 10

PART = """
import sys, time
sys.path.insert(0, {root!r})
from index.cli import run
import index.ingest.build as building
from tests.fakes import HashEmbedder

building.GROUP_SECONDS = 0  # commit each shard by itself: many turns

class Slow(HashEmbedder):
    def embed(self, prepared):
        time.sleep({pause})
        return super().embed(prepared)

def command(args):
    kb = building.KnowledgeBase.create({kb!r}, Slow())
    config = building.BuildConfig(part=building.Part.parse({part!r}))
    building.build(kb, [{source!r}], config, on_shard=lambda record: print("landed", flush=True))
    print("done", flush=True)

run(command, [])
"""


def start(kb: Path, source: Path, part: str, *, pause: float = 0.05) -> "subprocess.Popen[str]":
    script = PART.format(root=str(ROOT), kb=str(kb), source=str(source), part=part, pause=pause)
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_landing(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "landed\n"


def build_at(kb: Path, source: Path, *, part: Part | None = None, wait: float = 0) -> BuildReport:
    return build(KnowledgeBase.create(kb, HashEmbedder()), [str(source)], BuildConfig(part=part, wait=wait))


def contents(kb: Path) -> list[tuple[str, ...]]:
    return sorted(tuple(map(str, row.values())) for row in PairStore(kb).dataset.to_table().to_pylist())


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for shard in range(SHARDS):
        members = [item for i in range(PER_SHARD) for item in sample(shard * PER_SHARD + i).items()]
        members += [(f"bad{shard}.png", b"nonsense"), (f"bad{shard}.txt", b"nothing")]
        write_tar(tmp_path / "pets" / f"{shard:05d}.tar", members)
    return tmp_path / "pets"


@contextmanager
def held(part: Part, kb: Path) -> Iterator[None]:
    with parts.admitted(PairStore(kb), part):
        yield


def owner(shard: str, *, parts: int) -> int:
    """The one part that a shard falls to."""
    (part,) = [part for part in range(1, parts + 1) if Part(part, parts).has(shard)]
    return part


@pytest.mark.parametrize("text", ["", "1", "0/3", "4/3", "1/0", "a/b", "1/3/5", "-1/3", "1 / 3"])
def test_what_is_no_part(text: str) -> None:
    with pytest.raises(ConfigError, match="part"):
        Part.parse(text)


@pytest.mark.parametrize("name", ["{:05d}.tar", "train-{:05d}-of-00700.parquet", "b/{}", "x.lance#{}"])
def test_numbered_shards_are_spread_evenly(name: str) -> None:
    owners = [owner(name.format(shard), parts=7) for shard in range(700)]
    assert all(95 <= owners.count(part) <= 105 for part in range(1, 8))
    assert all(set(owners[i : i + 14]) == set(range(1, 8)) for i in range(686))


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ([f"{i}0000-{i}9999.tar" for i in range(1, 65)], 16),
        ([f"{20_000 * i:07d}-{20_000 * i + 19_999:07d}.tar" for i in range(64)], 16),
        *(([f"shard_{step * i}" for i in range(32)], 8) for step in (1, 2, 8, 10, 16, 100, 256, 1000, 4096, 10_000)),
    ],
)
def test_whatever_step_the_numbers_go_by_no_part_gets_all(names: list[str], parts: int) -> None:
    """By the remainder of the sum of their numbers, all these fell to one part, or to every second."""
    owners = [owner(name, parts=parts) for name in names]
    assert max(owners.count(part) for part in range(1, parts + 1)) <= 2.5 * len(names) / parts
    assert len(set(owners)) >= 0.75 * parts


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_few_shards_are_spread_too(step: int) -> None:
    assert len({owner(f"{step * i:05d}.tar", parts=3) for i in range(4)}) == 3


def test_other_shards_fall_to_one_part_each_and_about_evenly() -> None:
    names = ["".join(letters) for letters in product("abcdefghij", repeat=3)]
    owners = [owner(name, parts=7) for name in names]
    assert all(100 < owners.count(part) < 190 for part in range(1, 8))


@pytest.mark.slow
def test_three_processes_at_once_one_of_them_killed_make_the_table_of_one_build(corpus: Path, tmp_path: Path) -> None:
    kb = tmp_path / "kb"
    running = [start(kb, corpus, f"{part}/3") for part in (1, 2, 3)]
    wait_for_landing(running[2])  # it has four of the twelve
    running[2].kill()
    running[2].communicate()
    ended = [process.communicate(timeout=200) for process in running[:2]]
    assert [(out[-5:], err) for out, err in ended] == [("done\n", "")] * 2
    assert 0 < PairStore(kb).count() < SHARDS * PER_SHARD
    again = start(kb, corpus, "3/3", pause=0)
    assert again.communicate(timeout=200)[1] == ""
    assert KnowledgeBase.open(kb, HashEmbedder()).manifest.searcher is None, "no part makes a searcher"
    last = build_at(kb, corpus)
    assert (last.pairs_added, last.pairs_total, last.shards_unchanged) == (0, SHARDS * PER_SHARD, SHARDS)
    assert last.searcher == "exact"
    build_at(tmp_path / "whole", corpus)
    assert contents(kb) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_part_a_whole_build_and_the_same_part_keep_out_of_each_others_way(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kb = tmp_path / "kb"
    build_at(tmp_path / "first", corpus)  # whatever is slow the first time must not let the other process end
    process = start(kb, corpus, "1/3", pause=1.5)
    wait_for_landing(process)
    who = rf"process {process.pid} on \S+"
    with pytest.raises(KnowledgeBaseError, match=rf"part 1/3 of .* is being made by {who}"):
        build_at(kb, corpus, part=Part(1, 3))
    with pytest.raises(KnowledgeBaseError, match=rf"is being (filled by part 1/3 \({who}\)|written by)"):
        build_at(kb, corpus)  # written, if it has just taken its turn to commit
    assert build_at(kb, corpus, part=Part(3, 3)).searcher is None  # another part may
    assert build_at(kb, corpus, wait=200).pairs_total == SHARDS * PER_SHARD  # and a whole build may wait
    assert process.communicate(timeout=200)[1] == ""
    assert not list((kb / parts.FOLDER).iterdir()), "what parts left behind is swept"
    monkeypatch.setattr(parts, "START_SECONDS", 0.0)
    with (
        PairStore(kb).lock(),
        pytest.raises(KnowledgeBaseError, match="is being written by process"),
    ):
        build_at(kb, corpus, part=Part(1, 3))


def test_what_would_sweep_up_the_work_of_parts_waits_for_them(corpus: Path, tmp_path: Path) -> None:
    build_at(tmp_path / "kb", corpus)
    store = PairStore(tmp_path / "kb")
    with (
        held(Part(2, 8), tmp_path / "kb"),
        pytest.raises(KnowledgeBaseError, match="part 2/8"),
        without_parts(store),
    ):
        pass
    with without_parts(store):
        assert store.version


def test_a_pair_taken_down_while_a_part_has_its_shard_in_hand_stays_down(corpus: Path, tmp_path: Path) -> None:
    """The shard is left to the next build, which stages it without that pair."""
    build_at(tmp_path / "whole", corpus)
    rows = PairStore(tmp_path / "whole").get(PairStore(tmp_path / "whole").matching_ids()[:2], vectors=True)
    shard = rows[0].shard
    kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
    batches: list[int] = []

    def take_down(images: int) -> None:
        if not batches:
            other = PairStore(kb.directory)
            other.add(rows)  # as an earlier form of the shard would have brought them
            other.remove([row.id for row in rows])
        batches.append(images)

    staged_first = build(kb, [str(corpus)], BuildConfig(part=Part(1, 1)), on_batch=take_down)
    assert staged_first.pairs_total in {SHARDS * PER_SHARD - PER_SHARD, SHARDS * PER_SHARD - 2}
    assert kb.store.count(f"shard = '{shard}'") in {0, PER_SHARD - 2}
    assert build_at(kb.directory, corpus).pairs_total == SHARDS * PER_SHARD - 2


@pytest.mark.parametrize("is_early", [True, False])
def test_an_image_taken_down_while_a_part_has_its_shard_in_hand_stays_down(
    corpus: Path, tmp_path: Path, *, is_early: bool
) -> None:
    """Here the pair taken down has another id and key than that of the same image in the shard."""
    write_tar(tmp_path / "other" / "0.tar", sample(0, key="x"))
    build_at(tmp_path / "kb", tmp_path / "other")
    kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder())

    def take_down() -> None:
        other = PairStore(kb.directory)
        assert len(other.remove(other.matching_ids().tolist(), same_image=True)) == 1

    def once(images: int) -> None:
        if kb.store.count_removed() == 0 and PairStore(kb.directory).count("dataset = 'other'"):
            take_down()

    if is_early:
        take_down()
    report = build(kb, [str(corpus)], BuildConfig(part=Part(1, 1)), on_batch=once)
    assert report.shards_done == (SHARDS if is_early else 0), "what was staged before is left to the next build"
    assert kb.store.count(f"caption = '{caption_of(0)}'") == 0
    assert build_at(kb.directory, corpus).pairs_total == SHARDS * PER_SHARD - 1


def test_a_shard_that_another_process_has_stored_meanwhile_is_not_stored_twice(corpus: Path, tmp_path: Path) -> None:
    """Two tasks with different counts, 1/1 and 1/2 here, have shards in common."""
    kb = tmp_path / "kb"
    others: list[int] = []

    def build_beside(images: int) -> None:
        if not others:
            others.append(build_at(kb, corpus, part=Part(1, 2)).shards_done)

    base = KnowledgeBase.create(kb, HashEmbedder())
    report = build(base, [str(corpus)], BuildConfig(part=Part(1, 1)), on_batch=build_beside)
    assert others[0] > 0
    assert report.shards_done == SHARDS - others[0]
    build_at(kb, corpus)
    build_at(tmp_path / "whole", corpus)
    assert contents(kb) == contents(tmp_path / "whole")


def test_pruning_is_for_whole_builds() -> None:
    with pytest.raises(ConfigError, match="without --part"):
        BuildConfig(part=Part(1, 2), prune=True)
