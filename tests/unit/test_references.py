"""The protocol for things that a user brings: how pictures become things, and how a drawing is judged."""

from functools import partial
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageDraw

from index.errors import CorpusError
from radt.evaluation.image_set import PictureFile, find_pictures
from radt.evaluation.references import (
    FIGURE_SIDE,
    GRAY,
    MEASURES,
    Judge,
    Thing,
    evaluate_references,
    figure,
    find_things,
    is_figure,
    prompt_for,
    squared_distances,
)


def badge(*, color="red", box=(10, 10, 50, 50), ground="white", size=64) -> Image.Image:
    """A square with a dark bar."""
    image = Image.new("RGB", (size, size), ground)
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = box
    draw.rectangle((left, top, right - 1, bottom - 1), fill=color)
    draw.rectangle((left, top, left + (right - left) // 2 - 1, top + (bottom - top) // 2 - 1), fill="black")
    return image


class Colors:
    """Embeds a picture as the mean of its pixels that are no white, as a unit vector."""

    def images(self, images):
        means = [np.asarray(image, dtype=float).reshape(-1, 3).mean(axis=0) for image in images]
        return np.stack([mean / np.linalg.norm(mean) for mean in means]).astype(np.float32)


def test_a_figure_is_the_same_wherever_it_stands_and_on_whatever_ground():
    one = figure(np.asarray(badge()))
    assert one.shape == (FIGURE_SIDE, FIGURE_SIDE, 3)
    for other in (
        badge(box=(20, 4, 60, 44)),
        badge(ground="blue"),
        badge(box=(30, 30, 110, 110), size=128, ground=(30, 200, 90)),
    ):
        np.testing.assert_allclose(figure(np.asarray(other)), one, atol=1)
    assert np.abs(figure(np.asarray(badge(color="green"))) - one).max() > 100


def test_a_figure_that_is_wide_lies_on_gray():
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).rectangle((8, 24, 55, 39), fill="red")
    found = figure(np.asarray(image))
    assert (found[0] == GRAY).all()
    np.testing.assert_array_equal(found[FIGURE_SIDE // 2], [[255, 0, 0]] * FIGURE_SIDE)


def test_a_picture_that_is_all_ground_is_all_figure_and_specks_are_none():
    plain = np.full((20, 20, 3), 90, dtype=np.uint8)
    assert is_figure(plain).all()
    picture = np.asarray(badge(size=128, box=(40, 40, 90, 90))).copy()
    without = figure(picture)
    picture[2, 2] = (0, 0, 0)
    np.testing.assert_array_equal(figure(picture), without)


def test_distances_are_those_of_the_rows():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 6)), rng.normal(size=(5, 6))
    slow = [[((x - y) ** 2).sum() for y in b] for x in a]
    np.testing.assert_allclose(squared_distances(a, b), slow)
    assert (squared_distances(a, a).diagonal() < 1e-12).all()


def thing(name, color, count=2):
    known = tuple(badge(color=color, ground=ground) for ground in ("white", "lightblue", "pink")[:count])
    return Thing(caption=f"{name}: a badge", known=known, left_out=badge(color=color, box=(15, 20, 55, 60)))


def test_a_picture_shows_the_thing_whose_known_pictures_it_is_nearest_to():
    things = [thing("Ruba", "red", 3), thing("Gola", "green"), thing("Bimo", "blue")]
    judge = Judge(things, Colors())
    true = judge([each.left_out for each in things])
    assert all(true.ranks[measure].tolist() == [1, 1, 1] for measure in MEASURES)
    assert true.share("pixels", 1) == 1.0
    turned = judge([things[1].left_out, things[2].left_out, things[0].left_out])
    for measure in MEASURES:
        assert (turned.ranks[measure] > 1).all()
        assert turned.guesses[measure].tolist() == [1, 2, 0]
    assert turned.share("clip", 1) == 0.0
    assert turned.share("clip", 5) == 1.0


def test_a_thing_as_near_as_the_asked_one_goes_before_it():
    twins = [thing("Ruba", "red"), thing("Rubo", "red"), thing("Bimo", "blue")]
    judged = Judge(twins, Colors())([each.left_out for each in twins])
    assert judged.ranks["pixels"].tolist() == [2, 2, 1]


CAPTIONS = ((1, "Zorbo:\na green  robot"), (2, "Zorbo: a green robot"))


def encoded(image):
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_things_are_captions_or_subfolders_of_two_pictures_at_least():
    def file(name, caption, color):
        return PictureFile(name=name, caption=caption, read=partial(encoded, badge(color=color)))

    things, unread = find_things([
        file("a/1.png", "Zorbo: my robot", "red"),
        file("b/2.png", "Zorbo: my robot", "green"),
        file("b/3.png", "Zorbo: my robot", "blue"),
        file("blue_dog/1.png", None, "red"),
        file("blue_dog/2.png", None, "green"),
        file("single/1.png", None, "red"),
        file("top.png", None, "red"),
    ])
    assert [(each.caption, each.name, len(each.known)) for each in things] == [
        ("Zorbo: my robot", "Zorbo", 2),
        ("blue dog", "blue dog", 1),
    ]
    assert unread == []
    assert things[0].left_out.getpixel((45, 45)) == (0, 0, 255)
    assert prompt_for(things[0], "orange") == "Zorbo on an orange background"


def test_a_tar_names_nothing_that_its_pictures_without_captions_show():
    files = [PictureFile(name=f"00000.tar/{i}", read=partial(encoded, badge())) for i in range(2)]
    assert find_things(files) == ([], [])


def test_captions_are_of_one_line_as_a_knowledge_base_keeps_them():
    one, other = (PictureFile(name=f"{i}.png", caption=text, read=partial(encoded, badge())) for i, text in CAPTIONS)
    ((found,), _) = find_things([one, other])
    assert found.caption == "Zorbo: a green robot"


def test_of_many_pictures_only_those_of_the_things_asked_for_are_decoded_and_held_small():
    def read(name):
        looked_at.append(name)
        return encoded(badge().resize((1536, 1024)))

    looked_at = []
    names = [f"{thing}/{number}.png" for thing in ("ant", "bee", "cat") for number in range(2)]
    things, _ = find_things([PictureFile(name=name, read=partial(read, name)) for name in names], 1)
    assert [each.caption for each in things] == ["ant"]
    assert looked_at == names[:2]
    assert things[0].left_out.size == (1024, 683)


@pytest.mark.parametrize("names", [("robot/1.png", "robot/2.png")])
def test_a_folder_of_subfolders_is_read_from_disk(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        badge().save(tmp_path / name)
    ((found,), _) = find_things(find_pictures(str(tmp_path)))
    assert (found.caption, len(found.known)) == ("robot", 1)


def test_subfolders_of_one_name_are_two_things(tmp_path):
    for name in ("p/one", "q/one", "q/blue_dog"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(2):
            badge().save(tmp_path / name / f"{number}.png")
    things, _ = find_things(find_pictures(str(tmp_path)))
    assert sorted((each.caption, len(each.known)) for each in things) == [("blue dog", 1), ("p one", 1), ("q one", 1)]


def test_a_broken_picture_is_named_and_left_out(tmp_path):
    for name, good in (("robot", 2), ("dog", 1)):
        (tmp_path / name).mkdir()
        for number in range(good):
            badge().save(tmp_path / name / f"{number}.png")
        (tmp_path / name / "broken.png").write_bytes(encoded(badge())[:80])
    things, unread = find_things(find_pictures(str(tmp_path)))
    assert [(each.caption, len(each.known)) for each in things] == [("robot", 1)]
    assert [each.name for each in unread] == ["dog/broken.png", "robot/broken.png"]
    assert all("image" in each.reason for each in unread)
    with pytest.raises(CorpusError, match=r"has 1 things .*; 2 of the pictures left out.*dog/broken\.png"):
        evaluate_references(str(tmp_path))


def test_what_is_transparent_is_white_as_where_a_model_draws_from_it(tmp_path):
    (tmp_path / "robot").mkdir()
    for number in range(2):
        picture = badge().convert("RGBA")
        picture.putalpha(Image.fromarray(np.where(np.asarray(badge().convert("L")) == 255, 0, 255).astype(np.uint8)))
        clear = np.asarray(picture).copy()
        clear[clear[..., 3] == 0] = 0  # black under what is transparent
        Image.fromarray(clear).save(tmp_path / "robot" / f"{number}.png")
    ((robot,), _) = find_things(find_pictures(str(tmp_path)))
    for image in (robot.left_out, *robot.known):
        assert image.getpixel((0, 0)) == (255, 255, 255)
        assert image.getpixel((45, 45)) == (255, 0, 0)
