"""What those who fill a knowledge base are told: of mistakes, and of what was done otherwise than they may think."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from tests.fakes import caption_of, draw, encode, sample, write_img2dataset, write_tar
from tests.shell import Shell


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_img2dataset(tmp_path / "pets", shards=2, per_shard=6)
    return tmp_path / "pets"


@pytest.fixture
def kb(shell: Shell, corpus: Path, tmp_path: Path) -> Path:
    assert shell("build", corpus, "--kb", tmp_path / "kb", "--no-duplicates")[0] == 0
    return tmp_path / "kb"


def write_clip_retrieval(folder: Path, *, dim: int, count: int = 4) -> Path:
    """Its output, with the images that its table names beside it."""
    for part in ("img_emb", "metadata", "images"):
        (folder / part).mkdir(parents=True)
    paths = [str(folder / "images" / f"{i}.png") for i in range(count)]
    for i, path in enumerate(paths):
        Path(path).write_bytes(encode(draw(i)))
    vectors = np.random.default_rng(0).normal(size=(count, dim)).astype(np.float16)
    np.save(folder / "img_emb" / "img_emb_0.npy", vectors)
    table = pa.table({"image_path": paths, "caption": [caption_of(i) for i in range(count)]})
    parquet.write_table(table, folder / "metadata" / "metadata_0.parquet")
    return folder


def test_vectors_of_another_width_are_told_by_plan_build_and_json(shell: Shell, tmp_path: Path) -> None:
    source = write_clip_retrieval(tmp_path / "out", dim=24)
    told = "have 24 numbers, and those of the model"
    assert told in shell.json("plan", source)["plan"]["warnings"][0]
    report = shell.json("build", source, "--kb", tmp_path / "kb")
    assert report["pairs_added"] == 4
    assert told in report["notes"][0]
    assert "--model NAME" in report["notes"][0]
    assert told in shell("build", source, "--kb", tmp_path / "kb")[2], "they still are, when nothing is read"
    assert told in shell.json("add", source, "--kb", tmp_path / "kb")["notes"][0]


def test_vectors_of_the_models_width_are_kept_without_a_word(shell: Shell, tmp_path: Path) -> None:
    source = write_clip_retrieval(tmp_path / "out", dim=16)
    assert shell.json("plan", source)["plan"]["warnings"] == []
    assert shell.json("build", source, "--kb", tmp_path / "kb")["notes"] == []


def test_copies_of_what_is_not_read_again_are_told_to_scripts_too(shell: Shell, kb: Path, corpus: Path) -> None:
    (note,) = shell.json("build", corpus, "--kb", kb, "--copy-images")["notes"]
    assert note.startswith("2 unchanged shards keep what they have")
    assert shell.json("build", corpus, "--kb", kb)["notes"] == []


def test_the_same_shards_under_two_names_are_told(shell: Shell, kb: Path, corpus: Path) -> None:
    (note,) = shell.json("build", corpus, "--kb", kb, "--dataset", "animals")["notes"]
    assert "dataset 'pets' has 2 of these shards too" in note
    assert shell.json("remove", "--dataset", "animals", "--kb", kb)["removed"] == 12
    assert shell.json("build", corpus, "--kb", kb)["notes"] == []  # the entries of the ledger outlive the pairs


def test_added_pairs_are_those_that_were_not_there(shell: Shell, kb: Path, corpus: Path) -> None:
    gone = shell.json("remove", "--where", "key = '000000001'", "--kb", kb)["ids"]
    assert len(gone) == 1
    members = {name: content for i in (0, 1, 2, 3, 20) for name, content in sample(i).items()}
    write_tar(corpus / "00000.tar", members)
    report = shell.json("build", corpus, "--kb", kb)
    assert (report["pairs_added"], report["pairs_replaced"], report["pairs_total"]) == (1, 3, 10)
    write_tar(corpus / "00000.tar", {**members, **sample(21)})
    assert "(1 added, 4 read again," in shell("build", corpus, "--kb", kb)[1]


@pytest.mark.parametrize(
    "words",
    [
        ["build", "x", "--kb", "kb", "--part", "4/3"],
        ["build", "x", "--kb", "kb", "--part", "one"],
        ["build", "x", "--kb", "kb", "--ram", "much"],
        ["build", "x", "--kb", "kb", "--prune", "--part", "1/2"],
        ["build", "x", "--kb", "kb", "--ray-address", "a:1"],
        ["plan", "x", "--ram", "0"],
        ["stats", "--kb", "kb", "--limit", "3"],
        ["verify", "--kb", "kb", "--all", "--sample", "3"],
        ["stats", "--kb", "kb", "--where", "key = 'a'"],
        ["stats", "--kb", "kb", "--quarantine", "--words"],
        ["remove", "--kb", "kb", "--id", "3", "--dataset", "pets"],
    ],
)
def test_wrong_usage_exits_2(shell: Shell, words: list[str]) -> None:
    code, out, err = shell(*words)
    assert (code, out) == (2, "")
    assert "Error" in err
    assert "Traceback" not in err


def test_removing_what_is_not_there_names_the_datasets(shell: Shell, kb: Path) -> None:
    assert "no dataset 'pest' (did you mean 'pets'?)" in shell.error("remove", "--dataset", "pest", "--kb", kb)
    assert shell.json("remove", "--dataset", "pets", "--where", "key = 'x'", "--kb", kb)["removed"] == 0
    code, out, err = shell("remove", "--where", "dataset = 'pest'", "--kb", kb)
    assert (code, out) == (0, "removed 0\n")
    assert "the datasets here are pets (12 pairs)" in err
    assert shell.json("remove", "--dataset", "pets", "--where", "key = '000000001'", "--kb", kb)["removed"] == 1


def test_what_is_added_tells_its_bad_samples_and_that_nothing_is_new(shell: Shell, kb: Path, tmp_path: Path) -> None:
    good = {name: content for i in range(30, 50) for name, content in sample(i).items()}
    write_tar(tmp_path / "more" / "a.tar", {**good, "x.png": b"?"})
    code, out, err = shell("add", tmp_path / "more", "--kb", kb)
    assert (code, len(out.split())) == (0, 20)
    assert "1 samples are in quarantine" in err
    document = shell.json("add", tmp_path / "more", "--kb", kb)
    assert (document["ids"], document["quarantined"]) == ([], 1)
    code, out, err = shell("add", tmp_path / "more", "--kb", kb)
    assert (code, out) == (0, "")
    assert "nothing is new" in err


def test_verify_says_why_a_link_is_not_checked(shell: Shell, kb: Path) -> None:
    checks = shell.json("verify", "--kb", kb)["checks"]
    assert checks["searcher"]["note"].startswith("exact search: the vectors above are compared themselves")
    assert "note" not in checks["vector"]
    out = shell("verify", "--kb", kb)[1]
    (line,) = [line for line in out.splitlines() if "searcher" in line and "|" not in line and "│" in line]
    assert line.split("│")[-3].strip() == "-"


def test_a_lost_table_is_one_sentence_for_every_command(shell: Shell, kb: Path, corpus: Path) -> None:
    import shutil

    shutil.rmtree(kb / "pairs.lance")
    for words in (["stats"], ["query", "red"], ["build", corpus], ["compact"], ["verify"], ["remove", "--id", 1]):
        assert "the table of the knowledge base is missing" in shell.error(*words, "--kb", kb)


def test_the_images_at_the_top_of_a_source_have_a_name_for_people(shell: Shell, tmp_path: Path) -> None:
    source, kb = tmp_path / "photos", tmp_path / "kb"
    source.mkdir()
    for i in range(12):
        (source / f"{i}.png").write_bytes(encode(draw(i)))
        (source / f"{i}.txt").write_text(caption_of(i))
    (source / "silent.png").write_bytes(encode(draw(99)))
    shell.json("build", source, "--kb", kb)
    assert "(top folder)" in shell("stats", "--quarantine", "--kb", kb)[1]
    assert shell.json("stats", "--quarantine", "--kb", kb)["samples"][0]["shard"] == "."  # as filters have it
    pair = shell.json("query", "red", "--by", "bm25", "--kb", kb)["hits"][0]["id"]
    assert "(top folder)" in shell("show", pair, "--kb", kb)[1]
    assert shell.json("show", pair, "--kb", kb)["shard"] == "."
    (source / "0.png").write_bytes(encode(draw(7)))
    assert "shard '(top folder)' of dataset 'photos'" in shell("verify", "--kb", kb)[1].replace("\n", " ")


def test_weights_of_another_activation_are_refused_with_the_name_that_fits(
    shell: Shell, corpus: Path, tmp_path: Path
) -> None:
    """open_clip would load them, warn, and make vectors that are nobody's."""
    told = shell.error("build", corpus, "--kb", tmp_path / "kb", "--model", "ViT-B-32/openai")
    assert "ask for ViT-B-32-quickgelu/openai" in told
