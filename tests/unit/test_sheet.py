import pytest
from PIL import Image

from radt.sheet import (
    NOTE_LINE,
    PICTURE,
    SCALE,
    Picture,
    Row,
    Sheet,
    draw_sheet,
    enlarge,
    render_html,
    sheet_paths,
    shorten,
    text_width,
    wrap,
    write_sheet,
)
from tests.fakes import draw


def sheet(rows: int = 2, pictures: int = 2, prompt: str = "a wolf") -> Sheet:
    group = tuple(Picture(image=draw(i, size=16), lines=(f"caption {i}", "score 0.5")) for i in range(pictures))
    row = Row(prompt=prompt, cells=(group, ()), note="held out")
    return Sheet(title="A title", columns=("Neighbours", "Pictures"), rows=(row,) * rows)


def colors(image: Image.Image) -> set:
    return {color for _, color in image.getcolors()}


def test_small_pictures_are_enlarged_by_whole_factors_with_their_own_colours_only():
    image = draw(5, size=30)
    large = enlarge(image, 128)
    assert large.size == (120, 120)
    assert colors(large) == colors(image)


def test_large_pictures_keep_their_proportions():
    assert enlarge(Image.new("RGB", (400, 100)), 128).size == (128, 32)


@pytest.mark.parametrize("text", ["", "short", "a very long caption that cannot possibly fit in here", "x" * 200])
def test_shortened_text_fits(text):
    short = shorten(text, 11, 100)
    assert text_width(short, 11) <= 100
    assert text.startswith(short.removesuffix("..."))


def test_wrapping_loses_no_word_where_there_is_room():
    text = "a large bear to the left of two small houses on a green ground"
    lines = wrap(text, 15, 150, lines=9)
    assert " ".join(lines) == text
    assert len(lines) > 2
    assert all(text_width(line, 15) <= 150 for line in lines)


def test_wrapping_stops_at_the_last_line_with_dots():
    lines = wrap("one two three four five six seven eight nine ten", 15, 60, lines=2)
    assert len(lines) == 2
    assert lines[1].endswith("...")


def test_the_pictures_stand_on_the_page_unchanged():
    page = draw_sheet(sheet(rows=1, pictures=1))
    picture = enlarge(draw(0, size=16), PICTURE * SCALE)
    found = [
        (x, y)
        for y in range(0, page.height - picture.height, SCALE)
        for x in range(0, page.width - picture.width, SCALE)
        if page.getpixel((x + picture.width // 2, y + picture.height // 2)) == (255, 0, 0)
        and page.crop((x, y, x + picture.width, y + picture.height)).tobytes() == picture.tobytes()
    ]
    assert len(found) == 1


def test_more_rows_and_more_pictures_make_a_larger_page():
    one, many = draw_sheet(sheet(rows=1)), draw_sheet(sheet(rows=3, pictures=9))
    assert many.height > 2 * one.height
    assert many.width > one.width


def test_an_empty_sheet_and_an_empty_cell_are_drawn():
    assert draw_sheet(Sheet(title="nothing", columns=("a",), rows=())).width > 0


def test_html_escapes_what_people_wrote():
    page = render_html(sheet(prompt="<script>alert('x')</script> & co"))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<figure>") == 4


def test_both_files_are_written_whatever_the_suffix(tmp_path):
    png, page = write_sheet(sheet(), tmp_path / "deep" / "sheet.html")
    assert png == tmp_path / "deep" / "sheet.png"
    with Image.open(png) as image:
        assert image.size == draw_sheet(sheet()).size
    assert page.read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in png.parent.iterdir()) == ["sheet.html", "sheet.png"]


@pytest.mark.parametrize(
    ("out", "name"), [("report.v2", "report.v2"), ("x.PNG", "x"), ("x.explain.html", "x.explain"), ("x", "x")]
)
def test_only_an_ending_of_the_two_is_taken_off_a_name(tmp_path, out, name):
    assert sheet_paths(tmp_path / out) == (tmp_path / f"{name}.png", tmp_path / f"{name}.html")


def test_a_long_first_line_takes_two_lines_and_both_are_drawn():
    def page(*lines: str) -> Image.Image:
        row = Row(prompt="p", cells=((Picture(image=draw(1), lines=lines),),))
        return draw_sheet(Sheet(title="t", columns=("a",), rows=(row,)))

    short, long = page("wolf", "score"), page("wolf among very many sheep", "score")
    assert long.height == short.height + NOTE_LINE * SCALE
    assert long.tobytes() != page("wolf among very many goats", "score").tobytes()
