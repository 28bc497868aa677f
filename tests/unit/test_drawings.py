"""The drawings corpus: over a hundred things, no two alike, each with a name of its own, always the same."""

import io
import itertools
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from index.errors import CorpusError
from radt.corpora.drawings import (
    KINDS_EACH,
    LEAST_DISTANCE,
    PAINTERS,
    PROJECT,
    distance,
    drawing_rendition,
    load_drawings,
    write_drawings,
)
from radt.corpora.emoji import load_entities


@pytest.fixture(scope="module")
def drawings():
    return load_drawings()


def test_there_are_over_a_hundred_of_many_kinds(drawings):
    kinds = [each.kind for each in drawings]
    assert len(drawings) == len(PAINTERS) * KINDS_EACH + 10 + 4
    assert all(kinds.count(kind) == KINDS_EACH for kind in PAINTERS)


def test_every_name_is_one_word_that_nothing_else_has(drawings):
    names = [each.name for each in drawings]
    assert len(set(names)) == len(names)
    assert all(name.isalpha() and name.istitle() for name in names)
    emoji = {word for entity in load_entities() for word in entity.caption.lower().split()}
    assert not {name.lower() for name in names} & emoji
    assert drawings[0].caption == f"{drawings[0].name}: a monster"


def test_no_two_are_alike(drawings):
    pairs = itertools.combinations(drawings, 2)
    near = [(a.caption, b.caption) for a, b in pairs if distance(a.picture, b.picture) < 25]
    assert near == []
    painted = [each for each in drawings if each.license == PROJECT]
    assert all(distance(a.picture, b.picture) >= LEAST_DISTANCE for a, b in itertools.combinations(painted[:40], 2))


def test_they_are_the_same_every_time(drawings):
    load_drawings.cache_clear()
    again = load_drawings()
    assert [(a.name, a.picture.tobytes()) for a in again] == [(b.name, b.picture.tobytes()) for b in drawings]


def test_every_record_says_whose_it_is(drawings):
    assert all(each.license for each in drawings)
    assert {each.license.split(",")[0] for each in drawings} == {"drawn by radt", "scikit-learn"}


def test_renditions_differ_in_ground_and_place_and_keep_the_drawing_within_the_frame(drawings):
    some = [drawing_rendition(drawings[3], number) for number in range(6)]
    assert some[0].ground_name == "white"
    assert len({(each.scale, each.angle, each.shift) for each in some}) == 6
    for each in some:
        assert all(0 <= edge <= 1 for edge in each.box)
    assert drawing_rendition(drawings[3], 2) == some[2]


def test_the_corpus_is_as_img2dataset_writes_it(tmp_path, drawings):
    written = write_drawings(tmp_path, renditions=2, size=16)
    assert written.pairs == 2 * len(drawings)
    with tarfile.open(tmp_path / "00000.tar") as tar:
        contents = {member.name: tar.extractfile(member).read() for member in tar.getmembers()[:6]}
    facts = json.loads(contents["000000000.json"])
    assert (facts["caption"], facts["license"]) == (drawings[0].caption, PROJECT)
    pixels = np.asarray(Image.open(io.BytesIO(contents["000000000.png"])))
    assert pixels.shape == (16, 16, 3)
    assert tuple(pixels[0, 0]) == (255, 255, 255)
    assert write_drawings(tmp_path, renditions=2, size=16).shards_kept == 1


def test_impossible_sizes_are_refused(tmp_path):
    with pytest.raises(CorpusError, match="at least"):
        write_drawings(tmp_path, renditions=0)
