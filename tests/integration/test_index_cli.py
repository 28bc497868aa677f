"""`radt index` from the command line: the documents it prints, its exit codes, its one sentence for a mistake."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index.cli import run
from index.knowledge_base import KnowledgeBase
from index.search.calibration import Calibration
from index.search.duplicates import build_duplicates
from tests.fakes import caption_of, draw, encode, needs_scann, sample, write_img2dataset, write_tar
from tests.shell import Shell

ROOT = Path(__file__).parents[2]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_img2dataset(tmp_path / "pets", shards=2, per_shard=15)
    return tmp_path / "pets"


@pytest.fixture
def kb(shell: Shell, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # To a network with random weights all circles are near-duplicates; only equal bytes are one picture here.
    monkeypatch.setattr("index.knowledge_base.build_duplicates", partial(build_duplicates, near=None))
    assert shell("build", corpus, "--kb", tmp_path / "kb")[0] == 0
    return tmp_path / "kb"


def test_build_prints_what_it_did(shell: Shell, corpus: Path, tmp_path: Path) -> None:
    (corpus / "00001_stats.json").unlink()
    first = shell.json("build", corpus, "--kb", tmp_path / "kb")
    names = {"pairs_total", "pairs_added", "quarantined", "shards_skipped", "seconds", "pairs_per_second", "bytes"}
    assert names | {"searcher", "recall_at_10", "snapshot"} <= first.keys()
    assert (first["pairs_total"], first["pairs_added"], first["shards_skipped"]) == (15, 15, 1)
    assert first["skipped"][0]["name"] == "00001.tar"
    assert (first["searcher"], first["recall_at_10"]) == ("exact", 1.0)
    again = shell.json("build", corpus, "--kb", tmp_path / "kb")
    assert (again["pairs_total"], again["pairs_added"]) == (15, 0)
    assert again["snapshot"] == first["snapshot"]
    partial = shell.json("build", corpus, "--kb", tmp_path / "kb", "--allow-partial")
    assert (partial["pairs_total"], partial["pairs_added"], partial["shards_skipped"]) == (30, 15, 0)


def test_query_prints_the_document_of_the_design(shell: Shell, kb: Path, corpus: Path) -> None:
    document = shell.json("query", "a red circle", "--kb", kb, "-k", 3)
    assert list(document) == ["query", "kb", "snapshot", "asked", "timings_ms", "hits"]
    assert document["asked"] == {"by": "hybrid", "fusion": "rrf", "rank_constant": 60, "k": 3, "depth": 100}
    assert (document["query"], document["kb"]) == ("a red circle", str(kb))
    assert {"embed", "vector", "lexical", "fuse", "fetch"} <= document["timings_ms"].keys()
    hits = document["hits"]
    assert [hit["rank"] for hit in hits] == [1, 2, 3]
    assert list(hits[0]) == ["id", "rank", "score", "clip", "bm25", "caption", "dataset", "image", "metadata"]
    assert hits[0]["image"]["uri"].startswith(str(corpus))
    content = Path(hits[0]["image"]["uri"]).read_bytes()
    start, size = hits[0]["image"]["offset"], hits[0]["image"]["size"]
    assert content[start : start + size] == encode(draw(int(hits[0]["metadata"]["key"])))


def test_query_by_words_by_image_and_by_pair(shell: Shell, kb: Path, tmp_path: Path) -> None:
    words = shell.json("query", "yellow", "--kb", kb, "--by", "bm25", "-k", 30)
    assert {hit["caption"] for hit in words["hits"]} == {caption_of(i) for i in (3, 13, 23)}
    assert all(hit["clip"] is None for hit in words["hits"])
    (tmp_path / "q.png").write_bytes(encode(draw(7)))
    by_image = shell.json("query", "--image", tmp_path / "q.png", "--kb", kb, "--by", "clip", "-k", 1)
    assert by_image["hits"][0]["caption"] == caption_of(7)
    assert by_image["asked"] == {"by": "clip", "fusion": None, "rank_constant": None, "k": 1, "depth": 100}
    assert by_image["hits"][0]["clip"] == pytest.approx(1, abs=1e-5)
    pair = by_image["hits"][0]["id"]
    by_pair = shell.json("query", "--id", pair, "--kb", kb, "-k", 100)
    assert pair not in {hit["id"] for hit in by_pair["hits"]}
    assert len(by_pair["hits"]) == 29
    assert (by_pair["asked"]["by"], by_pair["asked"]["depth"]) == ("clip", 1000)  # without words, hybrid means clip


def test_query_within_a_filter_and_above_a_score(shell: Shell, kb: Path) -> None:
    hits = shell.json("query", "red", "--kb", kb, "-k", 50, "--where", "caption LIKE '%square%'")["hits"]
    assert hits
    assert all("square" in hit["caption"] for hit in hits)
    assert "the datasets here are pets (30 pairs)" in shell.error("query", "red", "--kb", kb, "--dataset", "nobody")
    assert shell.json("query", "red", "--kb", kb, "--by", "clip", "--min-score", "2")["hits"] == []
    assert len(shell.json("query", "red", "--kb", kb, "-k", 50, "--exact")["hits"]) == 30


def test_query_leaves_a_page_and_says_why_not(shell: Shell, kb: Path, tmp_path: Path) -> None:
    hits = shell.json("query", "a red circle", "--kb", kb, "-k", 30)["hits"]
    page, last = tmp_path / "new" / "page.html", hits[-1]
    document = shell.json("query", "a red circle", "--kb", kb, "-k", 2, "--html", page, "--why-not", last["id"])
    text = page.read_text()
    assert all(hit["caption"] in text for hit in document["hits"])
    assert text.count("<article") == 2
    assert f"--kb {kb}" in text
    why = document["why_not"]
    assert (why["id"], why["stage"], why["place"], why["k"]) == (last["id"], "k", 30, 2)
    assert why["sentence"] in text
    (tmp_path / "taken").write_text("")
    assert "cannot write" in shell.error("query", "red", "--kb", kb, "--html", tmp_path / "taken" / "page.html")


def test_query_says_what_comparing_every_pair_changes(shell: Shell, kb: Path) -> None:
    document = shell.json("query", "a red circle", "--kb", kb, "-k", 4, "--exact")
    assert list(document) == ["query", "kb", "snapshot", "asked", "timings_ms", "hits", "exact"]
    exact = document["exact"]
    assert (exact["recall"], exact["missed"], exact["extra"]) == (1, [], [])
    assert "compared with every pair: recall 1.00" in shell("query", "a red circle", "--kb", kb, "--exact")[1]


def test_a_searcher_that_finds_too_little_fails_the_build(
    shell: Shell, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = ("build", corpus, "--kb", tmp_path / "kb", "--no-duplicates", "--searcher", "lance")
    measured = iter([0.9, 0.9])

    def measure(searcher: Any, queries: Any, truth: Any, *, target: float) -> Any:
        return Calibration(settings={}, recall_at_10=next(measured), curve=(), warning="too little")

    monkeypatch.setattr("index.search.calibration.calibrate", measure)
    sentence = shell.error(*build, "--min-recall", 0.92)
    assert "finds 0.900 of the true ten, below --min-recall 0.92" in sentence
    assert "too little" not in shell(*build, "--json", "--min-recall", 0.92)[1]  # nothing has changed: it fails again
    assert len(shell.json("query", "red", "--kb", tmp_path / "kb")["hits"]) == 5  # and all is there
    assert shell.json(*build, "--min-recall", 0.9)["recall_at_10"] == 0.9
    assert "is for the build without --part" in shell.error(*build, "--min-recall", 0.9, "--part", "1/2")
    assert "at most what recall aims at" in shell.error(*build, "--min-recall", 0.9, "--recall", 0.8)


@needs_scann
def test_a_knowledge_base_of_scann_is_asked_where_scann_is_not(
    shell: Shell, kb: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    exact = {by: shell.json("query", "a red circle", "--kb", kb, "--by", by) for by in ("bm25", "clip")}
    built = shell.json("build", corpus, "--kb", kb, "--searcher", "scann")
    assert built["searcher"] == "scann"
    monkeypatch.setitem(sys.modules, "scann", None)
    words = shell.json("query", "a red circle", "--kb", kb, "--by", "bm25")
    assert (words["hits"], "note" in words, caplog.records) == (exact["bm25"]["hits"], False, [])
    near = shell.json("query", "a red circle", "--kb", kb, "--by", "clip")
    assert near["hits"] == exact["clip"]["hits"]
    assert near["note"].startswith("ScaNN cannot be imported here")
    assert [record.message for record in caplog.records] == [near["note"]]  # which Python prints on stderr
    assert len(KnowledgeBase.open(kb).search("a red circle", by="clip")) == 5
    assert shell("verify", "--kb", kb, "--sample", 5)[0] == 0


def test_query_explains_itself(shell: Shell, kb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = shell.json("query", "a red circle", "--kb", kb, "-k", 3, "--explain")
    stages = {stage["stage"]: stage["kept"] for stage in document["stages"]}
    assert (stages["filter"], stages["k"]) == (30, 3)
    assert document["searcher"] == {"kind": "exact", "rows": 30, "recall_at_10": 1.0, "newer": 0, "pairs": 30}
    for hit in document["hits"]:
        assert sum(hit["terms"].values()) == pytest.approx(hit["bm25"], rel=1e-5)
        assert hit["ranks"]["vector"] in range(1, 31)
    monkeypatch.setenv("COLUMNS", "100")
    out = shell("query", "a red circle", "--kb", kb, "-k", 3, "--explain")[1]
    assert "red" in out
    assert "circle" in out
    assert "30 pairs by exact" in out
    assert all(stage in out for stage in stages)
    assert max(map(len, out.splitlines())) <= 100


def test_query_by_a_random_pair_and_by_a_vector(shell: Shell, kb: Path, tmp_path: Path) -> None:
    drawn = shell.json("query", "--random", "--seed", 3, "--kb", kb)
    assert drawn["hits"] == shell.json("query", "--random", "--seed", 3, "--kb", kb)["hits"]
    own, _, told = drawn["query"].partition(" ")
    assert told == "(--random --seed 3)"
    assert own not in {hit["id"] for hit in drawn["hits"]}
    again = shell.json("query", "--random", "--kb", kb)["query"].rpartition(" ")[2].rstrip(")")
    assert again.isdigit()
    from index.knowledge_base import KnowledgeBase

    vector = KnowledgeBase.open(kb).show(int(own)).vector
    np.save(tmp_path / "v.npy", vector)
    assert shell.json("query", "--vector", tmp_path / "v.npy", "--kb", kb, "-k", 1)["hits"][0]["id"] == own
    np.save(tmp_path / "short.npy", np.ones(3))
    assert "the vectors here are 16 numbers" in shell.error("query", "--vector", tmp_path / "short.npy", "--kb", kb)
    (tmp_path / "no.npy").write_bytes(b"?")
    assert "cannot search by" in shell.error("query", "--vector", tmp_path / "no.npy", "--kb", kb)


def test_query_every_line_of_a_file(shell: Shell, kb: Path, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("a red circle\n\nyellow\n")
    document = shell.json("query", "--queries", tmp_path / "q.txt", "--kb", kb, "-k", 2)
    assert [one["query"] for one in document["queries"]] == ["a red circle", "yellow"]
    assert document["queries"][1]["hits"] == shell.json("query", "yellow", "--kb", kb, "-k", 2)["hits"]
    assert "yellow" in shell("query", "--queries", tmp_path / "q.txt", "--kb", kb)[1]
    assert shell("query", "--queries", tmp_path / "q.txt", "--kb", kb, "--why-not", 3)[0] == 2
    (tmp_path / "q.txt").write_bytes(b"\xff\xfe\xfa")
    assert "UTF-8" in shell.error("query", "--queries", tmp_path / "q.txt", "--kb", kb)


def test_compare_two_ways_to_ask(shell: Shell, kb: Path, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("a red circle\nyellow\nnothing of this\n")
    words = ["compare", kb, kb, "--queries", tmp_path / "q.txt", "-k", 4]
    assert shell.json(*words)["summary"]["identical"] == 3
    document = shell.json(*words, "--by-b", "bm25", "--html", tmp_path / "sheet.html")
    assert document["queries"][0]["query"] == "nothing of this"  # the least alike
    assert document["queries"][0]["only_b"] == []
    assert "<section>" in (tmp_path / "sheet.html").read_text()
    assert "rbo" in shell(*words, "--fusion-b", "sum", "--exact-b")[1]
    assert "write one query on each line" in shell.error("compare", kb, kb, "--queries", "/dev/null")


def test_compare_before_and_after(shell: Shell, kb: Path, tmp_path: Path) -> None:
    (tmp_path / "z.png").write_bytes(encode(draw(500)))
    (new,) = shell.json("add", tmp_path / "z.png", "--caption", "a zeppelin", "--kb", kb)["ids"]
    (tmp_path / "q.txt").write_text("zeppelin")
    words = ["compare", kb, kb, "--queries", tmp_path / "q.txt", "--snapshot-a", "build-1", "--by", "bm25"]
    (only,) = shell.json(*words)["queries"][0]["only_b"]
    assert only["id"] == new


def test_add_remove_show_stats(shell: Shell, kb: Path, tmp_path: Path) -> None:
    (tmp_path / "z.png").write_bytes(encode(draw(500)))
    (new,) = shell.json("add", tmp_path / "z.png", "--caption", "a zeppelin", "--kb", kb)["ids"]
    assert isinstance(new, str)
    assert shell.json("query", "zeppelin", "--kb", kb, "-k", 1)["hits"][0]["id"] == new
    shown = shell.json("show", new, "--kb", kb)
    assert (shown["id"], shown["caption"], shown["width"]) == (new, "a zeppelin", 32)
    stats = shell.json("stats", "--kb", kb)
    assert (stats["pairs"], stats["datasets"]) == (31, {"added": 1, "pets": 30})
    removed = shell.json("remove", "--id", new, "--id", "12345", "--kb", kb)
    assert (removed["removed"], removed["ids"], removed["missing"]) == (1, [new], ["12345"])
    assert new not in {h["id"] for h in shell.json("query", "zeppelin", "--kb", kb, "-k", 99)["hits"]}
    assert "there is no pair" in shell.error("show", new, "--kb", kb)
    assert shell.json("remove", "--where", "caption LIKE '%circle%'", "--kb", kb)["removed"] == 10
    ids = [h["id"] for h in shell.json("query", "red", "--kb", kb, "-k", 2)["hits"]]
    (tmp_path / "ids").write_text("\n".join(ids))
    assert shell.json("remove", "--ids-file", tmp_path / "ids", "--kb", kb)["removed"] == 2
    assert shell.json("stats", "--kb", kb)["pairs"] == 18


def test_add_a_source_or_a_folder_under_one_caption(shell: Shell, kb: Path, tmp_path: Path) -> None:
    write_img2dataset(tmp_path / "more", shards=1, per_shard=4)
    assert len(shell.json("add", tmp_path / "more", "--kb", kb)["ids"]) == 4
    (tmp_path / "dog").mkdir()
    for i in range(3):
        (tmp_path / "dog" / f"{i}.jpg").write_bytes(encode(draw(600 + i), "JPEG"))
    assert (
        len(shell.json("add", tmp_path / "dog", "--caption", "my dog rex", "--dataset", "mine", "--kb", kb)["ids"]) == 3
    )
    assert shell.json("stats", "--kb", kb)["datasets"] == {"mine": 3, "more": 4, "pets": 30}
    assert {h["caption"] for h in shell.json("query", "rex", "--kb", kb, "-k", 3)["hits"]} == {"my dog rex"}


def test_adding_keeps_the_searcher_that_was_chosen(shell: Shell, corpus: Path, tmp_path: Path, tiny_clip: Path) -> None:
    kb = tmp_path / "kb"
    shell.json("build", corpus, "--kb", kb, "--model", tiny_clip, "--searcher", "lance")
    write_img2dataset(tmp_path / "more", shards=1, per_shard=2)
    shell.json("add", tmp_path / "more", "--kb", kb)
    assert shell.json("stats", "--kb", kb)["searcher"] == "lance"


def test_people_get_tables(shell: Shell, kb: Path, corpus: Path) -> None:
    assert "a red circle" in shell("query", "a red circle", "--kb", kb)[1]
    assert "pets" in shell("stats", "--kb", kb)[1]
    assert "unchanged" in shell("build", corpus, "--kb", kb)[1]
    pair = shell.json("query", "red", "--kb", kb)["hits"][0]["id"]
    assert "sha256" in shell("show", pair, "--kb", kb)[1]


def test_people_are_told_what_comes_next(shell: Shell, corpus: Path, tmp_path: Path) -> None:
    kb = tmp_path / "my kb"
    assert f"radt index query TEXT --kb '{kb}'" in shell("build", corpus, "--kb", kb)[2]
    assert shell("build", corpus, "--kb", kb)[2] == ""  # nothing was added
    pair = shell.json("query", "red", "--by", "bm25", "--kb", kb)["hits"][0]["id"]
    assert f"radt index compact --kb '{kb}'" in shell("remove", "--id", pair, "--kb", kb)[2]
    assert shell("remove", "--id", pair, "--kb", kb, "--json")[2] == ""


def test_sizes_are_in_the_unit_that_fits(shell: Shell, kb: Path, corpus: Path) -> None:
    assert " kB" in shell("build", corpus, "--kb", kb)[1]
    out = shell("stats", "--kb", kb)[1]
    assert "pets 30" in out
    assert " kB" in out
    assert " kB after" in shell("compact", "--kb", kb)[1]


def test_mistakes_are_one_sentence(shell: Shell, kb: Path, corpus: Path, tmp_path: Path, other_clip: Path) -> None:
    assert "did you mean ViT-B-32" in shell.error("build", corpus, "--kb", tmp_path / "new", "--model", "ViT-B32")
    assert not (tmp_path / "new").exists()
    assert "there is nothing at" in shell.error("build", tmp_path / "gone", "--kb", kb)
    assert "there is nothing at" in shell.error("build", tmp_path / "gone", "--kb", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert "cannot be compared" in shell.error("query", "red", "--kb", kb, "--model", other_clip)
    assert "cannot be compared" in shell.error("build", corpus, "--kb", kb, "--model", other_clip)
    assert "is not a knowledge base" in shell.error("query", "red", "--kb", tmp_path)
    assert "cannot filter by" in shell.error("query", "red", "--kb", kb, "--where", "colour = 3")
    (tmp_path / "x.png").write_bytes(b"?")
    assert "does not decode" in shell.error("add", tmp_path / "x.png", "--caption", "x", "--kb", kb)
    assert "does not decode" in shell.error("query", "--image", tmp_path / "x.png", "--kb", kb)
    (tmp_path / "ids").write_text("one two")
    assert "where an id should be" in shell.error("remove", "--ids-file", tmp_path / "ids", "--kb", kb)
    (tmp_path / "ids").write_text("12\u00b2")
    assert "where an id should be" in shell.error("remove", "--ids-file", tmp_path / "ids", "--kb", kb)
    (tmp_path / "ids").write_text("\n")
    assert "write one id on each line" in shell.error("remove", "--ids-file", tmp_path / "ids", "--kb", kb)
    (tmp_path / "ids").write_bytes(b"\xff\xfe")
    assert "should be text in UTF-8" in shell.error("remove", "--ids-file", tmp_path / "ids", "--kb", kb)
    assert "there is no pair" in shell.error("show", 10**20, "--kb", kb)
    assert shell.json("remove", "--id", 10**20, "--kb", kb)["removed"] == 0


def test_an_empty_filter_is_a_mistake_and_not_every_pair(shell: Shell, kb: Path) -> None:
    for where in ("", " "):
        assert "the filter is empty" in shell.error("remove", "--where", where, "--kb", kb)
        assert "the filter is empty" in shell.error("query", "red", "--where", where, "--kb", kb)
    assert shell.json("stats", "--kb", kb)["pairs"] == 30


def test_nothing_found_says_why(shell: Shell, kb: Path) -> None:
    out = shell("query", "red", "--kb", kb, "--where", "width = 1")[1]
    assert "nothing found" in out
    assert "the filter leaves 0 pairs" in out


def test_a_file_without_queries_and_a_huge_k_are_mistakes(shell: Shell, kb: Path, tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("\n \n")
    assert "is empty" in shell.error("query", "--queries", tmp_path / "none.txt", "--kb", kb)
    assert "is empty" in shell.error("compare", kb, kb, "--queries", tmp_path / "none.txt")
    assert "k must be at most" in shell.error("query", "red", "--by", "bm25", "--kb", kb, "-k", 10**22)


def test_build_of_a_single_image_does_not_take_its_whole_folder(shell: Shell, tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encode(draw(i)))
        (tmp_path / f"{i}.txt").write_text(caption_of(i))
    for name in ("1.png", "*.png"):
        assert "names single images" in shell.error("build", tmp_path / name, "--kb", tmp_path / "kb")


def test_build_says_what_was_pruned_and_what_was_not_copied(shell: Shell, kb: Path, corpus: Path) -> None:
    assert "unchanged shards keep what they have" in shell("build", corpus, "--kb", kb, "--copy-images")[2]
    for file in corpus.glob("00001*"):
        file.unlink()
    assert "1 pruned" in shell("build", corpus, "--kb", kb, "--prune")[1]


def test_a_page_is_announced_to_people_only(shell: Shell, kb: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert str(page) in shell("query", "red", "--by", "bm25", "--kb", kb, "--html", page)[2]
    assert shell("query", "red", "--by", "bm25", "--kb", kb, "--html", page, "--json")[2] == ""


def test_bad_samples_pass_up_to_the_share_that_is_allowed(shell: Shell, tmp_path: Path) -> None:
    members = [item for i in range(8) for item in sample(i).items()]
    write_tar(tmp_path / "d" / "a.tar", [*members, ("x.png", b"?"), ("x.txt", b"x")])
    assert "--max-bad-fraction" in shell.error("build", tmp_path / "d", "--kb", tmp_path / "kb")
    report = shell.json("build", tmp_path / "d", "--kb", tmp_path / "kb", "--max-bad-fraction", "0.2")
    assert (report["pairs_total"], report["quarantined"]) == (8, 1)
    listed = shell("stats", "--quarantine", "--kb", tmp_path / "kb", "--where", "key = 'other'")[1]
    assert listed == "no sample in quarantine has key = 'other'\n"


def test_an_empty_knowledge_base_cannot_be_asked(shell: Shell, kb: Path) -> None:
    shell.json("remove", "--where", "id >= 0", "--kb", kb)
    assert "empty" in shell.error("query", "red", "--kb", kb)


def test_without_a_default_a_model_must_be_named(
    capsys: pytest.CaptureFixture[str], corpus: Path, tmp_path: Path
) -> None:
    assert "--model" in Shell(capsys, None).error("build", corpus, "--kb", tmp_path / "kb")


def test_the_model_is_found_again_when_it_has_moved(
    capsys: pytest.CaptureFixture[str], tiny_clip: Path, corpus: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(tiny_clip, tmp_path / "model")
    Shell(capsys, None).json("build", corpus, "--kb", tmp_path / "kb", "--model", tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    assert "neither a folder nor a model" in Shell(capsys, None).error("query", "red", "--kb", tmp_path / "kb")
    assert Shell(capsys, str(tiny_clip)).json("query", "red", "--kb", tmp_path / "kb")["hits"]
    assert Shell(capsys, None).json("query", "red", "--by", "bm25", "--kb", tmp_path / "kb")["hits"]


@pytest.mark.parametrize(
    "words",
    [
        ["build"],
        ["build", "x"],
        ["query", "--kb", "kb"],
        ["query", "x", "--kb", "kb", "-k", "0"],
        ["query", "x", "--kb", "kb", "--seed", "3"],
        ["query", "x", "--kb", "kb", "--by", "magic"],
        ["build", "x", "--kb", "kb", "--max-bad-fraction", "2"],
        ["build", "x", "--kb", "kb", "--searcher", "faiss"],
        ["remove", "--kb", "kb"],
        ["nonsense"],
    ],
)
def test_wrong_usage_exits_2(shell: Shell, words: list[str]) -> None:
    code, out, err = shell(*words)
    assert (code, out) == (2, "")
    assert "Traceback" not in err


def test_an_image_without_a_caption_is_wrong_usage(shell: Shell, kb: Path) -> None:
    assert shell("add", "x.png", "--kb", kb)[0] == 2


def test_debug_shows_where_an_error_comes_from(shell: Shell, tmp_path: Path) -> None:
    from index.errors import KnowledgeBaseError

    with pytest.raises(KnowledgeBaseError):
        run(shell.app, ["stats", "--kb", str(tmp_path), "--debug"])


def test_importing_the_commands_is_light() -> None:
    heavy = ("torch", "lancedb", "pyarrow", "lance", "numpy")
    code = f"import sys, index.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


def test_stats_and_words_need_no_torch(kb: Path) -> None:
    code = (
        "import sys; from index.knowledge_base import KnowledgeBase; kb = KnowledgeBase.open(sys.argv[1]);"
        "kb.stats(); kb.search('red', by='bm25'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(kb)], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "False\n"


def test_build_names_its_bottleneck(shell: Shell, corpus: Path, tmp_path: Path) -> None:
    report = shell.json("build", corpus, "--kb", tmp_path / "kb")
    assert set(report["stages"]) == {"read", "decode", "embed", "write"}
    assert sum(report["stages"].values()) == pytest.approx(1, abs=0.01)
    assert report["bottleneck"] == max(report["stages"], key=report["stages"].get)
    code, out, _ = shell("build", corpus, "--kb", tmp_path / "other")
    assert code == 0
    assert "bottleneck:" in out
    assert "nothing to do" in shell("build", corpus, "--kb", tmp_path / "other")[1]


def test_a_live_line_on_a_terminal(shell: Shell, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    code, _, err = shell("build", corpus, "--kb", tmp_path / "kb")
    assert code == 0
    assert "pairs/s" in err or "making it searchable" in err
    assert shell("build", corpus, "--kb", tmp_path / "other", "--json")[2] == ""


def test_copies_and_thumbnails_outlive_the_sources(shell: Shell, corpus: Path, tmp_path: Path) -> None:
    shell.json("build", corpus, "--kb", tmp_path / "copies", "--copy-images")
    shell.json("build", corpus, "--kb", tmp_path / "thumbnails", "--thumbnails", "16")
    for path in corpus.iterdir():
        path.unlink()
    for kb, shows in (("copies", True), ("thumbnails", False)):
        hits = shell.json("query", caption_of(3), "--kb", tmp_path / kb, "--by", "bm25", "-k", "3")["hits"]
        assert all((".lance#image/id=" in hit["image"]["uri"]) == shows for hit in hits)
        page = tmp_path / f"{kb}.html"
        assert shell("query", caption_of(3), "--kb", tmp_path / kb, "--by", "bm25", "-k", "3", "--html", page)[0] == 0
        assert page.read_text().count("data:image/") >= 3
