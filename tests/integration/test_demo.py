import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from index.errors import QueryError
from radt.bundle import read_info
from radt.corpora.emoji import load_entities, select
from radt.demo import by_lot, held_out_prompts, run_demo
from radt.provenance import read_png


def drawn(folder):
    return {path: read_png(path)[0].tobytes() for path in folder.rglob("*.png")}


@pytest.mark.slow
def test_the_demo_draws_held_out_entities_and_uses_again_what_is_there(tiny_bundle, tmp_path):
    said = []
    asked = {"model": tiny_bundle, "num_entities": 2, "renditions": 1, "say": said.append}
    report = run_demo(tmp_path / "demo", **asked)
    with Image.open(report.sheet_png) as sheet:
        assert sheet.width > 1000
    assert all(prompt in report.sheet_html.read_text() for prompt in held_out_prompts(2))
    assert len(list(report.pictures.glob("text-only/*.png"))) == 2
    with_neighbours = list(report.pictures.glob("with-neighbours/*.png"))
    assert len(with_neighbours) == 4
    own_k = read_info(tiny_bundle).sampling.k  # what the model itself draws from
    assert {read_png(path)[1].settings.k for path in with_neighbours} == {own_k}
    assert len(list(report.pictures.glob("pictures-of-the-next/*.png"))) == 2
    assert report.query_page.exists()
    said.clear()
    before = drawn(report.pictures)
    run_demo(tmp_path / "demo", **asked)
    assert any("already there" in line for line in said)
    assert any(", 0 of them new" in line for line in said)
    assert drawn(report.pictures) == before


def test_demo_entities_are_held_out_and_of_different_groups():
    chosen = by_lot(select(load_entities(), "heldout"))
    assert all(entity.held_out for entity in chosen)
    assert len(chosen) == len(set(chosen)) == len(select(load_entities(), "heldout"))
    groups = {entity.group for entity in chosen}
    assert {entity.group for entity in chosen[: len(groups)]} == groups
    for num in (1, 3, 4, 8, len(chosen) - 1):
        assert len(set(held_out_prompts(num))) == num
    with pytest.raises(QueryError, match=rf"^--entities 1000: .* {len(chosen) - 1} prompts$"):
        held_out_prompts(1000)
    *_, several, two = held_out_prompts(8)
    assert several.startswith("three ")
    assert " left of " in two


@pytest.mark.slow
def test_ctrl_c_is_one_sentence_and_leaves_whole_pictures(tiny_bundle, tmp_path):
    words = ["generate", "a wolf", "--model", str(tiny_bundle), "-n", "100000", "--out", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-m", "radt.cli", *words], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out/*.png")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1].startswith("error: stopped")
    assert "Traceback" not in err
    for path in (tmp_path / "out").iterdir():
        with Image.open(path) as image:
            image.load()
