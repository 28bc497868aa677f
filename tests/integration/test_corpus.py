"""The corpora as files: what a reader of img2dataset's layout finds, and what a killed or repeated run leaves."""

import errno
import io
import json
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from index.errors import CorpusError
from radt.corpora.emoji import GlyphRenderer, load_entities, render_rendition, rendition, select, write_emoji
from radt.corpora.img2dataset import Sample, write_shards
from radt.corpora.scenes import PALETTE, write_scenes

RECIPE = {"corpus": "squares"}


def read(path):
    """The samples of a tar by key: {suffix: bytes}."""
    samples = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            samples.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    return samples


def pixels(sample):
    return np.asarray(Image.open(io.BytesIO(sample["png"])))


def square(i):
    return Sample(pixels=np.full((8, 8, 3), i, dtype=np.uint8), caption=f"square {i}", metadata={"i": i, "nested": [i]})


def snapshot(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in {".tar", ".parquet"}}


def test_the_layout(tmp_path):
    seen = []
    written = write_shards(
        tmp_path, square, num=5, shard_size=2, recipe=RECIPE, on_item=lambda done, total: seen.append((done, total))
    )
    assert (written.pairs, written.shards, written.shards_kept) == (5, 3, 0)
    assert seen == [(i, 5) for i in range(1, 6)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{shard:05d}{suffix}" for shard in range(3) for suffix in (".tar", ".parquet", "_stats.json")
    )
    samples = read(tmp_path / "00001.tar")
    assert list(samples) == ["000010000", "000010001"]
    facts = json.loads(samples["000010001"]["json"])
    assert samples["000010001"]["txt"] == b"square 3"
    assert (facts["key"], facts["caption"], facts["status"], facts["i"]) == ("000010001", "square 3", "success", 3)
    assert (pixels(samples["000010001"]) == 3).all()
    table = pq.read_table(tmp_path / "00001.parquet").to_pylist()
    assert [row["key"] for row in table] == ["000010000", "000010001"]
    assert json.loads(table[1]["nested"]) == [3]
    stats = json.loads((tmp_path / "00002_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["status_dict"]) == (1, 1, {"success": 1})


def test_a_whole_corpus_is_kept_and_a_lost_shard_is_made_again_alike(tmp_path):
    write_shards(tmp_path, square, num=5, shard_size=2, recipe=RECIPE)
    before = snapshot(tmp_path)
    (tmp_path / "00001_stats.json").unlink()
    (tmp_path / "00001.tar").write_bytes(b"half")
    made = []
    written = write_shards(tmp_path, lambda i: made.append(i) or square(i), num=5, shard_size=2, recipe=RECIPE)
    assert (made, written.shards_kept) == ([2, 3], 2)
    assert snapshot(tmp_path) == before


def test_a_run_that_breaks_off_leaves_no_half_file_and_resumes(tmp_path):
    def full_disk(i):
        if i == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return square(i)

    with pytest.raises(CorpusError, match=r"No space left on device.*run the command again"):
        write_shards(tmp_path, full_disk, num=5, shard_size=2, recipe=RECIPE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.parquet", "00000.tar", "00000_stats.json"]
    assert write_shards(tmp_path, square, num=5, shard_size=2, recipe=RECIPE).shards_kept == 1


@pytest.mark.parametrize("name", ["00000_stats.json", "other.tar", "notes.json"])
def test_a_folder_of_something_else_is_refused(tmp_path, name):
    (tmp_path / name).write_text("[]")
    with pytest.raises(CorpusError, match=f"holds {name}.*choose an empty folder"):
        write_shards(tmp_path, square, num=5, shard_size=2, recipe=RECIPE)


def test_other_settings_are_refused(tmp_path):
    write_shards(tmp_path, square, num=2, shard_size=2, recipe=RECIPE)
    with pytest.raises(CorpusError, match="with other settings"):
        write_shards(tmp_path, square, num=3, shard_size=2, recipe=RECIPE)


def test_the_place_to_write_must_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CorpusError, match="cannot write the corpus"):
        write_shards(tmp_path / "file", square, num=2, shard_size=2, recipe=RECIPE)


def test_nothing_to_write_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="at least one pair"):
        write_shards(tmp_path, square, num=0, shard_size=2, recipe=RECIPE)


def test_write_emoji(tmp_path):
    written = write_emoji(tmp_path, renditions=2, size=16, split="heldout", shard_size=1000)
    held_out = select(load_entities(), "heldout")
    assert written.pairs == 2 * len(held_out)
    samples = list(read(tmp_path / "00000.tar").values())
    facts = [json.loads(sample["json"]) for sample in samples]
    assert [f["codes"] for f in facts[::2]] == [" ".join(entity.codes) for entity in held_out]
    assert all(f["held_out"] and "Open Font License" in f["license"] for f in facts)
    glyph = GlyphRenderer().glyph(held_out[4])
    assert (pixels(samples[9]) == render_rendition(glyph, rendition(held_out[4], 1), 16)).all()
    assert samples[9]["txt"].decode() == held_out[4].caption


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_write_scenes_keeps_the_split_and_tells_the_truth(tmp_path, split):
    write_scenes(tmp_path, num=60, split=split, size=16)
    classes = {entity.class_id for entity in select(load_entities(), split)}
    for sample in read(tmp_path / "00000.tar").values():
        facts = json.loads(sample["json"])
        assert facts["held_out"] == (split == "heldout")
        assert {entity["class_id"] for entity in facts["entities"]} <= classes
        assert len(facts["entities"]) == facts["count"]
        corner = [(0, 0), (0, -1), (-1, 0), (-1, -1)]
        ground = np.array([pixels(sample)[at] for at in corner])
        if facts["kind"] == "alone":
            assert (ground == PALETTE[facts["ground"]]).all()


def test_a_scene_depends_on_its_number_alone(tmp_path):
    write_scenes(tmp_path / "few", num=4, split="heldout", size=16)
    write_scenes(tmp_path / "more", num=8, split="heldout", size=16)
    few, more = read(tmp_path / "few/00000.tar"), read(tmp_path / "more/00000.tar")
    assert all(few[key] == more[key] for key in few)
    write_scenes(tmp_path / "other", num=4, split="heldout", size=16, seed=1)
    assert read(tmp_path / "other/00000.tar") != few
