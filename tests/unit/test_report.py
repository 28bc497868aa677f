"""The page of everything measured: nothing of a result is lost, every text is escaped, every link leads somewhere."""

import json
import re
from xml.etree import ElementTree

import pytest
from PIL import Image

from index.errors import CorpusError, QueryError
from radt.evaluation.plain_results import find_plain_results
from radt.evaluation.report import write_report
from radt.evaluation.results import Estimate, Line, Picture, Plot, Result, Table
from radt.evaluation.svg_plot import draw_plot, number_text
from radt.evaluation.tables import cell_text, table_lines

SVG = "{http://www.w3.org/2000/svg}"


def result(kind="emoji-draw", **changes):
    values = {
        "title": "Bench <&> one",
        "command": "radt evaluate emoji-draw --where 'a < b'",
        "date": "2026-11-22T00:00:00+00:00",
        "facts": {"n": 1824, "model": "demo|x"},
        "tables": (
            Table(
                title="By <arm>",
                columns=("arm", "top-1", "n"),
                rows=(("with|<b>", Estimate(value=0.84, low=0.76, high=0.9), 100), ("without", None, 1234)),
                note="a <note>",
            ),
        ),
        "plots": (Plot(title="The dial", x="eta <x>", y="share", lines=(line("entity"), line("ground", bounds=True))),),
        "pictures": (Picture(file="sheet.png", title="Twenty & more"),),
    }
    return Result(kind=kind, **(values | changes))


def line(name, *, bounds=False):
    extra = {"low": (0.5, 0.3, 0.1), "high": (0.9, 0.7, 0.5)} if bounds else {}
    return Line(name=name, x=(0.0, 0.5, 1.0), y=(0.8, 0.5, 0.2), **extra)


@pytest.fixture
def stored(tmp_path):
    folder = tmp_path / "results"
    result().save(folder)
    Image.new("RGB", (8, 8), "red").save(folder / "sheet.png")
    return folder


def test_everything_is_on_both_pages(stored, tmp_path):
    page, text = write_report([stored], tmp_path / "out")
    html, markdown = page.read_text(), text.read_text()
    assert "Bench &lt;&amp;&gt; one" in html
    assert "radt evaluate emoji-draw --where &#x27;a &lt; b&#x27;" in html
    assert "<b>|" not in html.replace("demo|x", "")
    assert "with|&lt;b&gt;" in html
    assert "0.84 <small>(0.76 to 0.90)</small>" in html
    assert "1,824" in html
    assert html.count("<svg") == 1
    assert 'src="data:image/png;base64,' in html
    assert not re.search(r'(src|href)="(?!data:|#)', html)  # nothing from elsewhere
    assert "| with\\|&lt;b> | 0.84 (0.76 to 0.90) | 100 |" in markdown
    assert "```\nradt evaluate emoji-draw --where 'a < b'\n```" in markdown
    assert "2026-11-22" in markdown
    for link in re.findall(r"!\[.*?\]\((.*?)\)", markdown):
        assert (tmp_path / "out" / link).is_file(), link
    assert len(list((tmp_path / "out" / "report.files").iterdir())) == 2


def test_results_of_one_kind_are_told_apart_and_an_old_page_is_replaced_whole(stored, tmp_path):
    again = tmp_path / "more"
    result(title="another", pictures=()).save(again)
    _, text = write_report([stored, again], tmp_path / "out")
    assert text.read_text().count("report.files/emoji-draw-1.svg") == 1
    assert text.read_text().count("report.files/emoji-draw.2-1.svg") == 1
    write_report([again], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "report.files").iterdir()] == ["emoji-draw-1.svg"]


def test_what_cannot_be_shown_is_one_sentence(stored, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="there is no stored result below"):
        write_report([tmp_path / "empty"], tmp_path / "out")
    (stored / "sheet.png").unlink()
    with pytest.raises(CorpusError, match=r"sheet\.png is gone"):
        write_report([stored], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_report_beside_the_results_leaves_them_alone(stored):
    folder = stored / "report"  # as results may be called
    result(title="another").save(folder)
    Image.new("RGB", (8, 8), "blue").save(folder / "sheet.png")
    before = contents(stored)
    for _ in range(2):
        page, _ = write_report([stored], stored)
    after = contents(stored)
    assert {name: after.get(name) for name in before} == before
    assert page.read_text().count("<h2") == 2


@pytest.mark.parametrize("name", ["my.result.json", "notes/a-1.svg", "holiday.png", "drawing.svg"])
def test_a_folder_with_what_no_report_wrote_is_not_replaced(stored, tmp_path, name):
    out = tmp_path / "out"
    write_report([stored], out)
    path = out / "report.files" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    before = contents(out)
    with pytest.raises(QueryError, match="was not written by `radt report`"):
        write_report([stored], out)
    assert contents(out) == before


def test_a_folder_elsewhere_that_a_link_leads_to_is_not_replaced(stored, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "report.files").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(QueryError, match="was not written by `radt report`"):
        write_report([stored], tmp_path / "out")


def test_what_cannot_be_rendered_leaves_the_old_report_whole(stored, tmp_path):
    out = tmp_path / "out"
    write_report([stored], out)
    before = contents(out)
    result(title="another", pictures=(Picture(file="sheet.gif", title="a GIF"),)).save(stored)
    (stored / "sheet.gif").write_bytes(b"GIF89a")
    with pytest.raises(CorpusError, match="is no PNG or JPEG"):
        write_report([stored], out)
    assert contents(out) == before


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1824, "1,824"),
        (0.84, "0.84"),
        (0.1, "0.1"),
        (2.5, "2.50"),
        (3.1e-5, "3.1e-05"),
        (0.0, "0"),
        (1234.5, "1,234.50"),
        (0.9996, "1"),
        (-0.9996, "-1"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_numbers_are_short(value, text):
    assert number_text(value) == text


def test_an_estimate_has_as_many_decimals_as_its_interval_deserves():
    assert cell_text(Estimate(value=0.84, low=0.757, high=0.9)) == "0.84 (0.76 to 0.90)"
    assert cell_text(Estimate(value=12.345, low=11.0, high=13.7)) == "12.3 (11.0 to 13.7)"
    assert cell_text(Estimate(value=0.00123, low=0.0011, high=0.0013)) == "0.00123 (0.00110 to 0.00130)"
    assert cell_text(None) == "-"


def test_the_terminal_has_columns():
    head, *rows = table_lines(Table(title="T", columns=("", "n"), rows=(("long name", 5), ("b", 1234))))
    assert head == "T"
    assert rows == ["               n", "long name      5", "b          1,234"]


def test_a_plot_is_svg_with_every_line_and_point_in_its_place():
    root = ElementTree.fromstring(draw_plot(result().plots[0]))
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{SVG}circle")]
    assert len(circles) == 6
    first = circles[:3]
    assert first[0][0] < first[1][0] < first[2][0]
    assert first[0][1] < first[1][1] < first[2][1]  # shares fall, and y grows downwards
    assert first[1][0] == pytest.approx((first[0][0] + first[2][0]) / 2, abs=0.1)
    assert len(list(root.iter(f"{SVG}polygon"))) == 1
    words = [each.text for each in root.iter(f"{SVG}text")]
    assert {"entity", "ground", "eta <x>", "share"} <= set(words)


def test_a_logarithmic_axis_spaces_powers_alike_and_leaves_out_what_it_cannot_show():
    plot = Plot(title="t", x="calls", y="y", log_x=True, lines=(Line(name="a", x=(0, 1, 10, 100), y=(1, 2, 3, 4)),))
    root = ElementTree.fromstring(draw_plot(plot))
    x = [float(c.get("cx")) for c in root.iter(f"{SVG}circle")]
    assert len(x) == 3
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.1)


def test_a_plot_of_one_point_or_none_is_drawn():
    for lines in ((), (Line(name="a", x=(1.0,), y=(0.5,)),), (Line(name="a", x=(1.0, 2.0), y=(0.5, 0.5)),)):
        ElementTree.fromstring(draw_plot(Plot(title="t", x="x", y="y", lines=lines)))


def emoji_draw_document():
    shares = {"entity_top1": 0.84, "entity_top5": 0.87, "ground_color": 0.98, "copy_similarity": None}
    return {
        "n": 100,
        **dict.fromkeys(("with_retrieval", "without_retrieval", "with_one_wrong"), shares),
        "recognizer_ceiling": shares,
        "retrieval": {"recall_at_k": 0.99, "all_right": 0.98},
        "settings": {"seed": 3, "k": 2, "by": "bm25"},
        "model": {"name": "demo", "digest": "ab", "image_size": 128},
        "kb": {"path": "my kb"},
        "recognizer": {"judge": "trained"},
    }


def test_what_was_stored_before_the_common_form_is_read_too(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "results.json").write_text(json.dumps(emoji_draw_document()))
    points = [
        {"label": "ddim", "steps": s, "calls": s, "rows": 2 * s, "top1": 0.5, "discrepancy": 1.5, "seconds": 0.1}
        for s in (4, 8)
    ]
    facts = {"n": 50, "seed": 0, "model": "ab"}
    (tmp_path / "quality.json").write_text(json.dumps({"facts": facts, "points": points}))
    (tmp_path / "late").mkdir()
    facts = {**facts, "recognizer": {"judge": "trained"}}
    (tmp_path / "late" / "quality.json").write_text(json.dumps({"facts": facts, "points": points}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text('{"some": "thing else"}')
    judges = {folder.name: result.facts["judge"] for folder, result in find_plain_results([tmp_path])}
    assert judges["late"] == "the trained recogniser"
    assert "pixel distance" in judges[tmp_path.name]
    found = {result.kind: result for _, result in find_plain_results([tmp_path, tmp_path / "one"])}
    assert set(found) == {"emoji-draw", "quality"}
    assert found["emoji-draw"].command == "radt evaluate emoji-draw --kb 'my kb' -n 100 --seed 3"
    assert found["emoji-draw"].facts["judge"] == "the trained recogniser"
    row = found["emoji-draw"].tables[0].rows[0]
    assert row[0] == "with retrieval"
    assert cell_text(row[1]) == "0.84 (0.76 to 0.90)"
    assert found["quality"].plots[0].lines[0].x == (4, 8)
    page, _ = write_report([tmp_path], tmp_path / "out")
    assert "MMD2" in page.read_text()


def test_of_two_forms_in_one_folder_the_newer_is_shown(stored):
    (stored / "results.json").write_text(json.dumps(emoji_draw_document()))
    assert list(find_plain_results([stored])) == []
