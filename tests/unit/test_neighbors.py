import numpy as np
import pytest
import torch
from PIL import Image

from index.errors import CorpusError, QueryError
from index.images import read_images
from index.records import Hit, ImageLocation
from radt.conditioning import TextCondition
from radt.neighbors import (
    Neighbor,
    Reference,
    decode_image,
    from_pixels,
    make_batches,
    neighbors_of,
    read_reference,
    to_pixels,
    to_rgb8,
)
from tests.fakes import draw, encode


class LengthEncoder:
    """One token a character, so that a caption's row can be told from its mask."""

    def encode(self, texts):
        longest = max(len(text) for text in texts)
        mask = torch.tensor([[place < len(text) for place in range(longest)] for text in texts])
        tokens = mask[..., None].float().repeat(1, 1, 3)
        return TextCondition(tokens=tokens, mask=mask, pooled=tokens.sum(dim=1))


def neighbor(caption: str, color: str, size: int = 4) -> Neighbor:
    return Neighbor(id="1", caption=caption, pixels=to_rgb8(Image.new("RGB", (size, size), color), (size, size)))


def test_every_byte_survives_the_way_to_pixels_and_back():
    levels = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).repeat(1, 1, 3)
    pixels = to_pixels(levels)
    assert pixels.min() == -1
    assert pixels.max() == 1
    assert torch.equal(from_pixels(pixels), levels)


def test_from_pixels_clips_what_is_out_of_range():
    assert from_pixels(torch.tensor([[[-3.0]], [[0.0]], [[3.0]]])).flatten().tolist() == [0, 128, 255]


def test_transparency_becomes_white_and_bars_keep_the_shape():
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    square = to_rgb8(image, (4, 4))
    white, red = [255, 255, 255], [255, 0, 0]
    assert square[0].tolist() == [white] * 4
    assert square[1].tolist() == [white, red, red, red]
    assert square[3].tolist() == [white] * 4


def test_resizing_averages_rather_than_picks():
    image = Image.new("RGB", (64, 64), "white")
    for x in range(0, 64, 2):
        image.paste((0, 0, 0), (x, 0, x + 1, 64))
    assert abs(int(to_rgb8(image, (8, 8))[4, 4, 0]) - 127) <= 2


@pytest.mark.parametrize("shape", [(10000, 300), (300, 10000), (20000, 1)])
def test_a_long_picture_takes_no_canvas_of_its_length_squared(shape, monkeypatch):
    sizes, new = [], Image.new
    monkeypatch.setattr(Image, "new", lambda mode, size, *rest: sizes.append(size) or new(mode, size, *rest))
    fitted = to_rgb8(new("RGB", shape, "red"), (64, 64))
    ((width, height),) = sizes
    assert width == height <= 4096
    red = (255 - fitted[..., 1].float()).sum().item() / 255 / 64  # rows or columns
    assert red == pytest.approx(64 * min(shape) / max(shape), abs=0.1)


def test_a_picture_of_an_ordinary_size_is_made_smaller_once():
    image = Image.linear_gradient("L").resize((4000, 2500)).convert("RGB")
    canvas = Image.new("RGB", (4000, 4000), "white")
    canvas.paste(image, (0, 750))
    once = canvas.resize((32, 32), Image.Resampling.LANCZOS)
    assert to_rgb8(image, (32, 32)).numpy().tobytes() == once.tobytes()


def test_grey_of_16_bits_keeps_its_level():
    content = encode(Image.fromarray(np.full((6, 4), 20000, dtype=np.uint16)))
    image = decode_image(content, "grey.png")
    assert image.size == (4, 6)
    assert to_rgb8(image, (6, 4)).unique().tolist() == [78]  # 20000 / 257


def test_shorter_rows_are_masked_and_their_text_is_null():
    rows = [[neighbor("wolf", "red"), neighbor("ox", "blue")], [neighbor("a", "green")]]
    batches = make_batches(rows, LengthEncoder(), [(4, 4), (2, 2)])
    assert batches is not None
    batch, smaller = batches
    assert smaller.pixels.shape == (2, 2, 3, 2, 2)
    assert smaller.text is batch.text, "captions are encoded once"
    assert batch.mask.tolist() == [[True, True], [True, False]]
    assert batch.pixels.shape == (2, 2, 3, 4, 4)
    assert batch.text.mask.sum(dim=-1).tolist() == [[4, 2], [1, 0]]
    assert batch.pixels[0, 1, :, 0, 0].tolist() == [-1, -1, 1]


def test_no_neighbours_at_all_is_none():
    assert make_batches([[], []], LengthEncoder(), [(4, 4)]) is None


def test_a_reference_comes_first_and_is_named():
    (found,) = neighbors_of([], [Reference(image=draw(3), caption="a shape", name="x.png")], (8, 8))
    assert found.id == "reference:x.png"
    assert found.score is None
    assert found.pixels.shape == (8, 8, 3)
    assert found.original is not None


def test_the_images_of_hits_are_read_together(tmp_path, monkeypatch):
    path = tmp_path / "pictures"
    pictures = [encode(draw(number)) for number in range(3)]
    path.write_bytes(b"".join(pictures))
    starts = [0, len(pictures[0]), len(pictures[0]) + len(pictures[1])]
    hits = [
        Hit(
            id=rank,
            rank=rank,
            score=1 / rank,
            clip=None,
            bm25=None,
            caption=f"picture {rank}",
            dataset="d",
            image=ImageLocation(uri=str(path), offset=start, size=len(content)),
        )
        for rank, (start, content) in enumerate(zip(starts, pictures, strict=True), 1)
    ]
    calls = []
    monkeypatch.setattr("radt.neighbors.read_images", lambda places: calls.append(places) or read_images(places))
    found = neighbors_of(hits, [Reference(image=draw(3), caption="a shape")], (32, 32))
    assert [len(places) for places in calls] == [3]
    assert [one.id for one in found] == ["reference:reference", "1", "2", "3"]
    assert all(torch.equal(one.pixels, to_rgb8(draw(number), (32, 32))) for number, one in enumerate(found[1:]))


def test_a_reference_is_read_from_path_and_caption(tmp_path):
    path = tmp_path / "dog.png"
    path.write_bytes(encode(draw(1)))
    reference = read_reference(f"{path}= a dog, weight=3kg ")
    assert reference.caption == "a dog, weight=3kg"
    assert reference.name == "dog.png"


@pytest.mark.parametrize(
    ("text", "said"), [("x.png", "IMAGE=CAPTION"), ("x.png= ", "IMAGE=CAPTION"), ("no.png=dog", "no image file")]
)
def test_a_bad_reference_is_one_sentence(text, said):
    with pytest.raises(QueryError, match=said):
        read_reference(text)


@pytest.mark.parametrize("content", [b"", b"not an image", encode(draw(1))[:60]])
def test_what_does_not_decode_is_named(content):
    with pytest.raises(CorpusError, match=r"broken\.png cannot be read"):
        decode_image(content, "broken.png")


def test_a_bomb_is_refused_before_it_is_decoded():
    with pytest.raises(CorpusError, match="bomb"):
        decode_image(encode(Image.new("1", (12000, 9000))), "bomb.png")
