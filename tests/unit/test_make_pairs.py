"""The generator of large corpora: what it writes is read whole, and is the same whenever and however it is made."""

import runpy
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from index.ingest.readers import Shard, read
from index.records import Pair

RECIPE = {"num": 130, "size": 32, "shard": 50, "seed": 0}


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parents[2] / "tools" / "make_pairs.py"))


def make(tool: dict[str, Any], out: Path) -> int:
    out.mkdir(exist_ok=True)
    return sum(tool["write_shard"](work) for work in tool["unfinished"](out, RECIPE))


def test_every_pair_is_read(tool: dict[str, Any], tmp_path: Path) -> None:
    assert make(tool, tmp_path) == 130
    shards = list(read(str(tmp_path)))
    assert [shard.name for shard in shards] == ["00000.tar", "00001.tar", "00002.tar"]
    pairs = [sample for shard in shards if isinstance(shard, Shard) for sample in shard.samples()]
    assert len(pairs) == 130
    for pair in pairs:
        assert isinstance(pair, Pair)
        assert 5 <= len(pair.caption.split()) <= 15
        assert pair.encoded is not None
        assert pair.metadata["sha256"] == sha256(pair.encoded).hexdigest()


def test_it_goes_on_where_it_stopped(tool: dict[str, Any], tmp_path: Path) -> None:
    make(tool, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")}
    (tmp_path / "00001_stats.json").unlink()
    (tmp_path / "00001.tar").write_bytes(b"half of it")
    assert make(tool, tmp_path) == 50
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")} == before
    with pytest.raises(SystemExit, match="other settings"):
        tool["unfinished"](tmp_path, {**RECIPE, "seed": 1})


def test_words_follow_zipf_and_one_picture_in_a_hundred_is_repeated(tool: dict[str, Any]) -> None:
    nouns = Counter(s.noun for number in range(3000) for s in tool["scene"](0, number).subjects)
    commonest = [count for _, count in nouns.most_common(8)]
    assert commonest[0] > 3 * commonest[7]  # 8 times by the law, out of some 350
    assert len(nouns) > 1000
    repeated = sum(tool["picture_number"](0, number) != number for number in range(3000))
    assert 15 <= repeated <= 45
