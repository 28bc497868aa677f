"""`radt index query` as a user meets it: mistakes that are told what there is, answers that explain themselves."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import caption_of, write_img2dataset, write_tar
from tests.shell import Shell

NUM_PAIRS = 30


@pytest.fixture(scope="module")
def kb(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pairs and a bad sample; a knowledge base that no test changes."""
    from index.embedder import ClipEmbedder
    from index.ingest.build import BuildConfig, build
    from index.knowledge_base import KnowledgeBase

    folder = tmp_path_factory.mktemp("query")
    write_img2dataset(folder / "pets", shards=2, per_shard=NUM_PAIRS // 2)
    (folder / "broken").mkdir()
    write_tar(folder / "broken" / "0.tar", [("000.jpg", b"no picture"), ("000.txt", b"a bad one")])
    base = KnowledgeBase.create(folder / "kb", ClipEmbedder.load(str(tiny_clip)))
    build(base, [str(folder / "pets"), str(folder / "broken")], BuildConfig(max_bad_fraction=1.0))
    return folder / "kb"


def test_a_snapshot_goes_by_its_name_and_by_its_number(shell: Shell, kb: Path) -> None:
    (snapshot,) = shell.json("stats", "--kb", kb)["snapshots"]
    assert snapshot["tag"] == "build-1"
    words = ["query", "yellow", "--kb", kb, "--by", "bm25"]
    by_name, by_number = (shell.json(*words, "--snapshot", name) for name in ("build-1", snapshot["version"]))
    assert by_name["hits"] == by_number["hits"] != []
    assert by_name["snapshot"] == by_number["snapshot"] == snapshot["version"]
    there = f"has no snapshot 'build-7': it has build-1 (number {snapshot['version']})"
    assert there in shell.error(*words, "--snapshot", "build-7")
    assert there in shell.error("compare", kb, kb, "--queries", __file__, "--snapshot-b", "build-7")


@pytest.mark.parametrize("option", ["--min-score", "--min-clip", "--min-bm25", "--diversity"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_bound_that_is_no_number_is_wrong_usage(shell: Shell, kb: Path, option: str, value: str) -> None:
    code, out, err = shell("query", "red", "--kb", kb, option, value)
    assert (code, out) == (2, "")
    assert option in err


def test_an_unknown_dataset_or_field_is_told_those_there_are(shell: Shell, kb: Path) -> None:
    error = shell.error("query", "red", "--kb", kb, "--dataset", "pets", "--dataset", "pet")
    assert "there is no dataset 'pet' (did you mean 'pets'?); the datasets here are pets (30 pairs)" in error
    error = shell.error("query", "red", "--kb", kb, "--where", "widht > 3")
    assert "cannot filter by 'widht > 3'" in error
    assert "did you mean width?); the fields are id, dataset, source" in error
    assert shell.json("query", "red", "--kb", kb, "--dataset", "pets", "--where", "width > 3")["hits"]


def test_a_pair_that_never_came_in_may_be_in_quarantine(shell: Shell, kb: Path) -> None:
    why = shell.json("query", "red", "--kb", kb, "--why-not", 5)["why_not"]
    assert why["stage"] == "store"
    assert why["sentence"].endswith("What could not be used, 1 so far, is listed by `radt index stats --quarantine`.")


def test_every_field_of_the_documents_is_in_the_help(shell: Shell, kb: Path, tmp_path: Path) -> None:
    words = re.findall("[a-z0-9_]+", shell("query", "--help")[1].partition("--json prints")[2])
    asked = ["--explain", "--exact", "--why-not", 5, "-k", 31, "--decompose", "phrases"]
    document = shell.json("query", "a red circle left of a yellow square", "--kb", kb, *asked)
    (tmp_path / "q.txt").write_text("red")
    hit = document["hits"][0]
    several = shell.json("query", "--queries", tmp_path / "q.txt", "--kb", kb)
    for name in {
        *document,
        *hit,
        *hit["image"],
        *document["exact"],
        *document["asked"],
        "stage",
        "sentence",
        *several,
        "kb",
        "note",
    }:
        assert name in words, name


def test_the_answer_says_how_common_its_words_are(shell: Shell, kb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    document = shell.json("query", "a yellow zeppelin", "--kb", kb, "--explain")
    yellow = sum("yellow" in caption_of(i) for i in range(NUM_PAIRS))
    assert document["words"] == {"yellow": yellow, "zeppelin": 0}
    out = shell("query", "a yellow zeppelin", "--kb", kb, "--explain")[1]
    assert f"words of the query in captions: yellow in {yellow}, zeppelin in none" in out
    assert shell.json("query", "a yellow zeppelin", "--kb", kb, "--explain", "--by", "clip")["words"] == {}


def test_a_query_without_a_word_is_told_so(shell: Shell, kb: Path) -> None:
    assert "no word of the query is searched for" in shell("query", "of the !", "--kb", kb)[1]
    assert "no word of the query" not in shell("query", "zeppelin", "--kb", kb)[1]


def test_a_slow_query_says_what_is_outside_the_searcher(
    shell: Shell, kb: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, hint = ["query", "yellow", "--kb", kb, "--by", "bm25"], "`radt index compact` folds them in"
    monkeypatch.setattr("index.knowledge_base.KnowledgeBase.unsearched", lambda self: 50_000)
    assert hint not in shell(*words)[1]
    monkeypatch.setattr("index.commands.query._SLOW_MS", 0.0)
    assert hint in " ".join(shell(*words)[1].split())


def test_a_column_that_says_nothing_is_left_out(shell: Shell, kb: Path) -> None:
    assert "bm25" in shell("query", "yellow", "--kb", kb)[1]
    assert "bm25" not in shell("query", "yellow", "--kb", kb, "--by", "clip")[1]
    assert "clip" not in shell("query", "yellow", "--kb", kb, "--by", "bm25")[1].partition("caption")[0]


def test_many_queries_are_written_as_they_are_answered(
    shell: Shell, kb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [caption_of(i) for i in range(3)]
    (tmp_path / "q.txt").write_text("\n".join(lines))
    words = ["query", "--queries", tmp_path / "q.txt", "--kb", kb, "--by", "bm25", "--explain"]
    whole = shell.json(*words)
    assert list(whole) == ["kb", "snapshot", "asked", "queries", "searcher"]
    for line, told in zip(lines, whole["queries"], strict=True):
        alone = shell.json("query", line, "--kb", kb, "--by", "bm25", "--explain")
        assert told["hits"] == alone["hits"]
        assert told.keys() == alone.keys() - {"kb", "snapshot", "asked", "searcher"}
    from index.search.retriever import Retriever

    search, asked = Retriever.search, []

    def stop_at_the_third(self: Retriever, text: str | None = None, **more: Any) -> Any:
        asked.append(text)
        if text == lines[2]:
            raise KeyboardInterrupt
        return search(self, text, **more)

    monkeypatch.setattr(Retriever, "search", stop_at_the_third)
    code, out, err = shell(*words, "--json")
    assert (code, err) == (130, "error: stopped; the same command begins anew\n")
    assert [answer["query"] for answer in json.loads(out + "]}")["queries"]] == lines[:2]  # and as it is, no document
    assert "cannot filter by" in shell.error(*words, "--json", "--where", "colour = 3")


def test_rows_for_people_are_printed_as_they_come(
    shell: Shell, kb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each before the next is asked, under one head, and no earlier answer is kept."""
    import gc

    from index.search import answer

    lines = [f"a {color} number {n}" for n, color in enumerate(("red", "green", "blue", "yellow"))]
    (tmp_path / "q.txt").write_text("\n".join(lines))
    ask, seen, warm = answer.ask, [], []

    def watched(*args: Any, **more: Any) -> Any:
        gc.collect()
        seen.append(shell.capsys.readouterr().out)
        warm.append(more["is_warm"])
        assert sum(type(one) is answer.Answer for one in gc.get_objects()) <= 1
        return ask(*args, **more)

    monkeypatch.setattr(answer, "ask", watched)
    monkeypatch.setenv("COLUMNS", "120")
    out = shell("query", "--queries", tmp_path / "q.txt", "--kb", kb, "--by", "bm25", "--exact")[1]
    assert warm == [False, True, True, True]
    for line, before in zip(lines, [*seen[1:], out], strict=True):
        assert line in " ".join(before.split())
    assert [("best hit" in each, "recall" in each) for each in [*seen[1:], out]] == [(True, True)] + [
        (False, False)
    ] * 3


def test_the_head_of_many_answers_is_true_of_all(
    shell: Shell, kb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_clip: Path
) -> None:
    """Also where others write meanwhile; and the depth is that of the lists that were fused."""
    import shutil

    from index.embedder import ClipEmbedder
    from index.knowledge_base import KnowledgeBase
    from index.search import answer
    from tests.fakes import draw

    shutil.copytree(kb, tmp_path / "kb")
    writer = KnowledgeBase.open(tmp_path / "kb", ClipEmbedder.load(str(tiny_clip)))
    ask, asked = answer.ask, iter([None, "a zeppelin"])

    def interrupted(*args: Any, **more: Any) -> Any:
        if caption := next(asked, None):
            writer.add([draw(99)], caption)
        return ask(*args, **more)

    (tmp_path / "q.txt").write_text("zeppelin\n" * 2)
    monkeypatch.setattr(answer, "ask", interrupted)
    words = ["query", "--kb", tmp_path / "kb", "--by", "bm25"]
    document = shell.json(*words, "--queries", tmp_path / "q.txt")
    first, second = document["queries"]
    assert first["hits"] == second["hits"] == []
    assert "snapshot" not in second
    later = shell.json(*words, "zeppelin")
    assert (len(later["hits"]), later["snapshot"] > document["snapshot"]) == (1, True)
    exact = ["query", "--kb", kb, "yellow", "--exact"]
    assert shell.json(*exact)["asked"]["depth"] == NUM_PAIRS  # every pair has a rank in both lists
    assert shell.json(*exact, "--where", "caption LIKE '%circle%'")["asked"]["depth"] < NUM_PAIRS
    assert shell.json(*exact, "--by", "clip")["asked"]["depth"] == 100


@pytest.mark.slow
def test_answers_in_a_pipe_are_there_when_they_are_made(kb: Path, tmp_path: Path) -> None:
    """Nobody flushes a pipe for us: a reader has the first answers long before the last."""
    import os

    (tmp_path / "q.txt").write_text("a red circle\n" * 20_000)
    command = [sys.executable, "-m", "radt.cli", "index", "query", "--queries", str(tmp_path / "q.txt")]
    command += ["--kb", str(kb), "--by", "bm25", "--json", "-k", "1"]
    quiet = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=quiet) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1 << 16)  # what was flushed first: a buffer would be 8 KiB and cut
        process.kill()
    assert first.startswith(b'{"kb"')
    assert len(first) < 4096
    assert len(json.loads(first + b"]}")["queries"]) >= 1


@pytest.mark.parametrize("where", [[], ["--where", "width > 3"]])
def test_an_interrupt_that_lance_makes_an_error_of_is_one_all_the_same(
    shell: Shell, kb: Path, monkeypatch: pytest.MonkeyPatch, where: list[str]
) -> None:
    import lance

    def interrupted(self: Any, *args: Any, **more: Any) -> None:
        raise ValueError("External error: KeyboardInterrupt: ")  # what ArrowInvalid is, and says

    monkeypatch.setattr(lance.LanceDataset, "to_table", interrupted)
    code, out, err = shell("query", "yellow", "--kb", kb, "--by", "bm25", *where)
    assert (code, out, err) == (130, "", "error: stopped; the same command begins anew\n")


def test_the_page_carries_the_command_that_asks_it_again(
    shell: Shell, kb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from html import unescape

    monkeypatch.chdir(kb.parent)
    asked = [
        "-k",
        3,
        "--by",
        "bm25",
        "--where",
        "caption <> 'it''s'",
        "--min-bm25",
        "0",
        "--exact",
        "--dataset",
        "pets",
    ]
    page = tmp_path / "page.html"
    document = shell.json("query", "a red circle", "--kb", "kb", *asked, "--html", page)
    text = page.read_text()
    start = '<div class="command repeat"><code>'
    words = shlex.split(unescape(text.partition(start)[2].partition("</code>")[0]))
    monkeypatch.chdir("/")
    assert words[:3] == ["radt", "index", "query"]
    again = shell.json(*words[2:])
    assert again["hits"] == document["hits"]
    for fact in ("by bm25", "where <b>caption &lt;&gt;", "min-bm25 <b>0.0</b>", "30 pairs by exact", "<b>red</b> in "):
        assert fact in text, fact


def test_a_random_page_can_be_drawn_again(shell: Shell, kb: Path, tmp_path: Path) -> None:
    drawn = shell.json("query", "--random", "--kb", kb, "--html", tmp_path / "page.html")
    seed = drawn["query"].rpartition(" ")[2].rstrip(")")
    assert f"--random --seed {seed}</code>" in (tmp_path / "page.html").read_text()


def test_a_long_caption_leaves_room_for_the_other_hits(
    shell: Shell, tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from index.embedder import ClipEmbedder
    from index.knowledge_base import KnowledgeBase
    from tests.fakes import draw

    base = KnowledgeBase.create(tmp_path / "kb", ClipEmbedder.load(str(tiny_clip)))
    long = "a red fox " + "standing still " * 100
    base.add([draw(1)], long)
    monkeypatch.setenv("COLUMNS", "100")
    out = shell("query", "fox", "--kb", tmp_path / "kb", "--by", "bm25")[1]
    assert out.count("\n") < 15
    assert shell.json("query", "fox", "--kb", tmp_path / "kb", "--by", "bm25")["hits"][0]["caption"] == long.strip()


def test_a_comparison_says_how_both_sides_were_asked(shell: Shell, kb: Path, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("yellow")
    words = ["compare", kb, kb, "--queries", tmp_path / "q.txt", "--by", "bm25", "-k", 3, "--where", "width > 3"]
    out = " ".join(shell(*words, "--html", tmp_path / "sheet.html")[1].split())
    assert "by bm25, k 3, where width > 3" in out
    sheet = (tmp_path / "sheet.html").read_text()
    assert "k 3, where width &gt; 3" in sheet
    (one,) = shell.json(*words)["queries"]
    assert f'title="{one["shared"][0]["id_a"]}: ' in sheet


@pytest.mark.slow
def test_a_closed_pipe_and_an_interrupt_end_quietly(kb: Path, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("a red circle\n" * 20_000)
    command = [sys.executable, "-m", "radt.cli", "index", "query", "--queries", str(tmp_path / "q.txt")]
    command += ["--kb", str(kb), "--by", "bm25", "--json"]
    for end in ("close", "interrupt"):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.read(1000).startswith('{"kb"')
            if end == "close":
                process.stdout.close()
            else:
                time.sleep(0.1)
                process.send_signal(signal.SIGINT)
                process.stdout.read()
            err = process.stderr.read()
        assert process.returncode == (1 if end == "close" else 130), err
        assert err == ("" if end == "close" else "error: stopped; the same command begins anew\n")
