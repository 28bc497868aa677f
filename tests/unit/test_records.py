"""Records: ids that never change, images read from where they lie."""

import json
from pathlib import Path

from index.records import Hit, ImageLocation, pair_id, table_schema
from tests.fakes import draw, encode


def test_pair_ids_are_fixed_for_ever() -> None:
    # Written down once: another value would orphan every id that anybody has noted.
    assert pair_id("pets", "00000.tar", "000000001") == 795074071378181717
    assert pair_id("pets", "00000.tar", "000000002") != pair_id("pets", "00000.tar", "000000001")


def test_pair_ids_do_not_run_names_together() -> None:
    assert pair_id("a", "b", "cd") != pair_id("a", "bc", "d")
    assert pair_id("a", "b", "c") != pair_id("a", "c", "b")
    assert all(0 <= pair_id("d", "s", str(i)) < 2**63 for i in range(1000))


def test_a_location_reads_a_range_or_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"0123456789")
    assert ImageLocation(uri=str(path), offset=2, size=3).read() == b"234"
    assert ImageLocation(uri=str(path)).read() == b"0123456789"


def test_a_hit_in_json_keeps_all_bits_of_its_id(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encode(draw(3)))
    hit = Hit(
        id=2**63 - 1,
        rank=1,
        score=0.5,
        clip=None,
        bm25=1.5,
        caption="x",
        dataset="d",
        image=ImageLocation(uri=str(tmp_path / "x.png")),
        metadata={"a": 1},
    )
    document = json.loads(json.dumps(hit.to_json()))
    assert int(document["id"]) == 2**63 - 1
    assert list(document) == ["id", "rank", "score", "clip", "bm25", "caption", "dataset", "image", "metadata"]
    assert document["image"] == {"uri": str(tmp_path / "x.png"), "offset": None, "size": None}
    assert hit.open_image().tobytes() == draw(3).tobytes()


def test_the_schema_has_room_for_the_vectors() -> None:
    assert table_schema(12).field("vector").type.list_size == 12
