import dataclasses
import os

import pytest
import torch
from PIL.PngImagePlugin import PngInfo

from index.errors import UserError
from radt import provenance
from radt.neighbors import Neighbor, to_rgb8
from radt.provenance import Origin, Record, read_png, save_png
from radt.settings import GenerateSettings
from tests.fakes import draw

ORIGIN = Origin(
    model="tiny", model_digest="ab", radt="0", python="3", torch="2", processor="AVX2", threads=2, snapshot="7"
)


def record(num_neighbors: int = 2) -> Record:
    neighbors = tuple(
        Neighbor(
            id=str(2**62 + i),
            caption=f"caf\u00e9 {i}",
            pixels=to_rgb8(draw(i), (16, 16)),
            score=0.25,
            clip=-0.1,
            license="CC0",
        )
        for i in range(num_neighbors)
    )
    settings = GenerateSettings(text_share=0.25, exclude=("17",), min_score=0.1)
    return Record(
        prompt='a "wolf" \u2014 \U0001f43a', seed=2**53 + 1, settings=settings, origin=ORIGIN, neighbors=neighbors
    )


def same(a: Record, b: Record) -> bool:
    pixels = all(torch.equal(x.pixels, y.pixels) for x, y in zip(a.neighbors, b.neighbors, strict=True))
    facts = [x.to_json() for x in a.neighbors] == [y.to_json() for y in b.neighbors]
    return pixels and facts and dataclasses.replace(a, neighbors=()) == dataclasses.replace(b, neighbors=())


@pytest.mark.parametrize("num_neighbors", [0, 1, 5])
def test_a_record_comes_back_as_it_was_saved(tmp_path, num_neighbors):
    path = tmp_path / "x.png"
    save_png(path, draw(3), record(num_neighbors))
    image, back = read_png(path)
    assert image.tobytes() == draw(3).tobytes()
    assert same(back, record(num_neighbors))
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


def test_large_neighbours_go_to_a_file_beside_and_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "INLINE_LIMIT", 100)
    path = tmp_path / "x.png"
    save_png(path, draw(3), record())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.png", "x.png.neighbors.safetensors"]
    assert same(read_png(path)[1], record())
    (tmp_path / "x.png.neighbors.safetensors").unlink()
    with pytest.raises(UserError, match=r"x\.png\.neighbors\.safetensors"):
        read_png(path)


def test_a_foreign_png_is_one_sentence(tmp_path):
    draw(1).save(tmp_path / "foreign.png")
    with pytest.raises(UserError, match="carries no record"):
        read_png(tmp_path / "foreign.png")


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no file"):
        read_png(tmp_path / "none.png")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 1}', '{"format": 99}'])
def test_a_damaged_record_is_one_sentence(tmp_path, text):
    info = PngInfo()
    info.add_itxt("radt", text)
    draw(1).save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(UserError, match=r"x\.png.*(damaged|format 99)"):
        read_png(tmp_path / "x.png")


def test_a_full_disk_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    save_png(path, draw(1), record())

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"could not write .*x\.png.*No space left"):
        save_png(path, draw(2), record())
    assert read_png(path)[0].tobytes() == draw(1).tobytes()
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
