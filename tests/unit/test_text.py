"""Control characters in what others wrote: gone from captions and from terminals, kept in JSON."""

import json
import os
import unicodedata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from index.cli import make_app
from index.ingest.samples import make_sample
from index.knowledge_base import KnowledgeBase
from index.records import ImageLocation, Pair, StoredPair, pair_id
from index.text import escaped_json, one_line, printable, writable
from tests.fakes import HashEmbedder, shard_of

EVERY = "".join(map(chr, range(0x250)))
HOSTILE = "a red\x1b]0;title\x07 dog \x1b[2J\x9b31m\u202f🐕\u200d🦺"


def test_no_control_character_is_left_and_nothing_else_goes() -> None:
    kept = [letter for letter in EVERY if unicodedata.category(letter) != "Cc"]
    assert printable("".join(kept)) == "".join(kept)
    assert set(printable(EVERY)) == set(kept)
    assert printable("one\ttwo\nthree\r\nfour") == "one two three  four"
    assert one_line(" a \x00\x1b[0m\n\n b ") == "a [0m b"
    assert one_line("🐕\u200d🦺") == "🐕\u200d🦺"  # what joins the two is no control character


def test_json_is_harmless_and_lossless() -> None:
    document = escaped_json(json.dumps({EVERY: [EVERY, HOSTILE]}, ensure_ascii=False))
    assert not any(unicodedata.category(letter) == "Cc" for letter in document)
    assert json.loads(document) == {EVERY: [EVERY, HOSTILE]}


def test_what_is_writable_is_left_as_it_is_and_the_rest_has_escapes() -> None:
    assert writable(EVERY) == EVERY
    assert writable(HOSTILE) == HOSTILE
    assert writable(os.fsdecode(b"\xe4.png")) == r"\udce4.png"


def test_captions_come_in_without_them() -> None:
    shard = shard_of("s", [])
    place = ImageLocation(uri="/x.png")
    sample = make_sample(shard, "k", text=HOSTILE.encode(), metadata={}, image=place, encoded=b"x")
    assert isinstance(sample, Pair)
    assert sample.caption == "a red]0;title dog [2J31m 🐕\u200d🦺"
    nothing = make_sample(shard, "k", text=b"\x1b\x07 \x00", metadata={}, image=place, encoded=b"x")
    assert "no caption" in getattr(nothing, "reason", "")


@pytest.fixture
def old(tmp_path: Path) -> tuple[Path, int]:
    """A knowledge base of before, with what came in then, and the id of a pair."""
    kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
    pair = StoredPair(
        id=pair_id("d\x1b[1m", "s", "k"),
        dataset="d\x1b[1m",
        source="/data",
        shard="s",
        digest="",
        key="k\x1b[5m",
        caption=HOSTILE,
        image=ImageLocation(uri="/data/x\x1b[7m.png"),
        sha256=None,
        width=8,
        height=8,
        metadata={"license\x9b": "\x1b[8m"},
        vector=kb.embedder.texts(["dog"])[0],
    )
    kb.store.add([pair])
    return tmp_path / "kb", pair.id


def test_no_command_hands_them_to_a_terminal(old: tuple[Path, int], tmp_path: Path) -> None:
    kb, pair = old
    (tmp_path / "q.txt").write_text("red\ndog\n")
    asked = ["--by", "bm25", "--queries", str(tmp_path / "q.txt")]
    for command in (
        ["query", "red dog", "--kb", kb, "--by", "bm25", "--explain"],
        ["query", "--kb", kb, *asked],
        ["compare", kb, kb, *asked, "--by-b", "tfidf"],
        ["show", pair, "--kb", kb],
        ["stats", "--kb", kb],
        ["query", "red", "--kb", kb, "--by", "bm25", "--json"],
        ["show", pair, "--kb", kb, "--json"],
    ):
        shown = CliRunner().invoke(make_app(), [str(word) for word in command])
        assert shown.exit_code == 0, (command, shown.output, shown.exception)
        assert "\x1b" not in shown.output.replace("\n", ""), command
        assert not any(unicodedata.category(letter) == "Cc" for letter in shown.output.replace("\n", "")), command
    assert json.loads(shown.output)["caption"] == HOSTILE
