"""`radt evaluate references` and `radt report` from end to end, with a tiny model that draws nothing well."""

import io
import json

import pytest
from PIL import Image

from index.cli import run
from radt.cli import app
from radt.evaluation import references
from radt.evaluation.results import Result
from tests.fakes import draw


@pytest.fixture
def radt(capsys):
    def call(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run(app, [str(word) for word in words])
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return call


@pytest.fixture
def folder(tmp_path):
    """Three robots of three pictures each, by subfolder, and one that has a single picture."""
    things = tmp_path / "robots"
    for name, first in (("zorbo", 0), ("bimo", 3), ("tuki", 6)):
        (things / name).mkdir(parents=True)
        for number in range(3):
            draw(first + number).convert("RGB").resize((32, 32)).save(things / name / f"{number}.png")
    (things / "lonely").mkdir()
    Image.new("RGB", (8, 8)).save(things / "lonely" / "0.png")
    return things


def test_a_folder_is_measured_kept_and_put_on_a_page(radt, folder, tiny_bundle, tmp_path):
    out = tmp_path / "out"
    code, text, err = radt("evaluate", "references", folder, "--model", tiny_bundle, "-k", 1, "--out", out, "--json")
    assert code == 0, err
    told = json.loads(text)
    assert told["n"] == 3
    assert told["settings"]["k"] == 1
    for arm in ("with_retrieval", "without_retrieval", "left_out"):
        for measure in ("pixels_top1", "pixels_top5", "clip_top1", "clip_top5"):
            low, high = told[arm]["intervals"][measure]
            assert low <= told[arm][measure] <= high
        assert told[arm]["pixels_top5"] == 1.0  # of three things
    stored = Result.load(out / "references.result.json")
    assert json.loads(json.dumps(stored.data)) == told
    assert (out / stored.pictures[0].file).is_file()
    code, text, _ = radt("report", out, "--out", tmp_path / "page")
    assert code == 0
    assert text.split() == [str(tmp_path / "page" / "report.html"), str(tmp_path / "page" / "report.md")]
    assert "zorbo" not in (tmp_path / "page" / "report.md").read_text()
    assert "with retrieval" in (tmp_path / "page" / "report.html").read_text()


def test_the_left_out_pictures_are_not_in_the_knowledge_base(radt, folder, tiny_bundle, tmp_path):
    from index.knowledge_base import KnowledgeBase

    out = tmp_path / "out"
    assert radt("evaluate", "references", folder, "--model", tiny_bundle, "-k", 1, "--out", out)[0] == 0
    kb = KnowledgeBase.open(out / "kb")
    pairs = kb.store.get(kb.store.matching_ids())
    assert sorted(pair.caption for pair in pairs) == ["bimo"] * 2 + ["tuki"] * 2 + ["zorbo"] * 2
    known = {Image.open(io.BytesIO(pair.image.read())).convert("RGB").tobytes() for pair in pairs}
    named = {number: {Image.open(file).tobytes() for file in folder.glob(f"*/{number}.png")} for number in (0, 1, 2)}
    assert len(named[2]) == 3
    assert known == {pixels for pixels in named[0] | named[1] if pixels != Image.new("RGB", (8, 8)).tobytes()}
    other = tmp_path / "others"
    folder.rename(other)
    (other / "tuki").rename(other / "pako")
    code, _, err = radt("evaluate", "references", other, "--model", tiny_bundle, "-k", 1, "--out", out)
    assert code == 1
    assert "holds other pairs than these pictures" in err


def test_mistakes_are_one_sentence(radt, folder, tiny_bundle, tmp_path):
    for name in ("zorbo", "bimo"):
        for number in (1, 2):
            (folder / name / f"{number}.png").unlink()
    code, _, err = radt("evaluate", "references", folder, "--model", tiny_bundle)
    assert code == 1
    assert "has 1 things with two pictures or more" in err
    code, _, err = radt("report", tmp_path / "nowhere", "--out", tmp_path / "page")
    assert code == 1
    assert "there is no folder" in err


def test_neither_own_output_nor_a_broken_picture_is_measured(radt, folder, tiny_bundle, monkeypatch):
    monkeypatch.setattr(references, "ROWS_A_SHEET", 1)  # so that there are pictures enough of `results` for a thing
    (folder / "zorbo" / "broken.png").write_bytes(b"\x89PNG and no more")
    words = ("evaluate", "references", folder, "--model", tiny_bundle, "-k", 1, "--out", folder / "results")
    assert radt(*words)[0] == 0
    assert len(list((folder / "results").glob("*.png"))) == 3
    code, text, err = radt(*words, "--json")
    assert code == 0, err
    told = json.loads(text)
    assert sorted(thing["caption"] for thing in told["things"]) == ["bimo", "tuki", "zorbo"]
    assert [each["name"] for each in told["unread"]] == ["zorbo/broken.png"]
    assert "zorbo/broken.png" in radt(*words)[1]
