"""`radt index neighbors`: equal to asking one by one, its own group never there, resumable, in bounded memory."""

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from index.errors import ConfigError, CorpusError
from index.ingest.build import BuildConfig, build
from index.knowledge_base import KnowledgeBase
from index.search import neighbors as module
from index.search.duplicates import Duplicates
from index.search.neighbors import METADATA_KEY, NeighborsConfig, write_neighbors
from index.search.view import StoreView
from tests.fakes import HashEmbedder, caption_of, draw, encode, sample, write_img2dataset, write_tar
from tests.integration.test_index_cli import Shell, shell  # noqa: F401 - a fixture


def make_kb(folder: Path, *sources: Path) -> KnowledgeBase:
    kb = KnowledgeBase.create(folder, HashEmbedder())
    build(kb, [str(source) for source in sources], BuildConfig(searcher="exact"))
    return kb


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three shards of ten pairs, one picture of each under another caption in the next shard as well."""
    for shard in range(3):
        members: dict[str, bytes] = {}
        for i in range(10):
            members |= sample(shard * 10 + i)
        twin = sample((shard * 10 + 10) % 30, key=f"twin{shard}")
        members |= twin | {f"twin{shard}.txt": f"another view of number {shard}".encode()}
        write_tar(tmp_path / "train" / f"{shard:05d}.tar", members)
    return tmp_path / "train"


@pytest.fixture
def kb(source: Path, tmp_path: Path) -> KnowledgeBase:
    return make_kb(tmp_path / "kb", source)


@pytest.mark.parametrize("by", ["hybrid", "clip", "bm25"])
@pytest.mark.parametrize("query", ["caption", "image"])
def test_it_equals_asking_one_by_one(
    kb: KnowledgeBase, source: Path, tmp_path: Path, by: Literal["hybrid", "clip", "bm25"], query: Any
) -> None:
    if (by, query) == ("bm25", "image"):
        with pytest.raises(ConfigError, match="no effect"):
            NeighborsConfig(by=by, query=query)
        return
    config = NeighborsConfig(k=5, by=by, query=query)
    report = write_neighbors(kb, str(source), tmp_path / "n.parquet", config)
    rows = rows_of(tmp_path / "n.parquet")
    stored = {pair.id: pair for pair in kb.store.get(kb.store.matching_ids(), vectors=True)}
    assert [row["id"] for row in rows] == kb.store.matching_ids().tolist()
    assert (report.pairs, report.shards_done, report.bad) == (33, 3, 0)
    for row in rows:
        own = stored[row["id"]]
        group = [pair.id for pair in stored.values() if pair.sha256 == own.sha256]
        vector = own.vector if query == "image" else None
        hits = kb.search(row["caption"], vector=vector, k=5, by=by, exclude=group)
        assert row["neighbor_ids"] == [hit.id for hit in hits]
        np.testing.assert_allclose(row["scores"], [hit.score for hit in hits], rtol=1e-6)
        assert (row["caption"], row["key"], row["shard"]) == (own.caption, own.key, own.shard)


@pytest.mark.parametrize("query", ["caption", "image"])
def test_its_own_group_never_appears(kb: KnowledgeBase, source: Path, tmp_path: Path, query: Any) -> None:
    out = tmp_path / "n.parquet"
    write_neighbors(kb, str(source), out, NeighborsConfig(k=33, query=query))
    digests = {pair.id: pair.sha256 for pair in kb.store.get(kb.store.matching_ids())}
    for row in rows_of(out):
        assert digests[row["id"]] not in {digests[i] for i in row["neighbor_ids"]}
        assert len(row["neighbor_ids"]) == 29  # all the other pictures
    write_neighbors(kb, str(source), out, NeighborsConfig(k=33, query=query, exclude_group=False, by="clip"))
    if query == "image":
        assert all(digests[row["neighbor_ids"][0]] == digests[row["id"]] for row in rows_of(out))
    assert all(len(row["neighbor_ids"]) == 30 for row in rows_of(out))


def test_a_copy_under_another_name_is_left_out_too(kb: KnowledgeBase, tmp_path: Path) -> None:
    """The training set need not be in the knowledge base: its pictures are known by their content."""
    write_tar(tmp_path / "other" / "a.tar", [*sample(7, key="x").items(), *sample(77, key="y").items()])
    write_neighbors(kb, str(tmp_path / "other"), tmp_path / "n.parquet", NeighborsConfig(k=40))
    known, new = rows_of(tmp_path / "n.parquet")
    captions = {pair.id: pair.caption for pair in kb.store.get(kb.store.matching_ids())}
    assert (len(known["neighbor_ids"]), len(new["neighbor_ids"])) == (29, 30)
    assert caption_of(7) not in {captions[i] for i in known["neighbor_ids"]}


def test_near_duplicates_are_of_its_group(
    kb: KnowledgeBase, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.sort(kb.store.matching_ids())
    odd = np.array([int(pair.sha256 or "", 16) % 2 for pair in kb.store.get(ids)])  # two groups, by the picture
    together = np.where(odd == 1, ids[odd == 1].min(), ids[odd == 0].min())
    groups = Duplicates(ids=ids, groups=together)
    monkeypatch.setattr(StoreView, "duplicates", property(lambda view: groups))
    write_neighbors(kb, str(source), tmp_path / "n.parquet", NeighborsConfig(k=33))
    group = dict(zip(ids.tolist(), together.tolist(), strict=True))
    for row in rows_of(tmp_path / "n.parquet"):
        assert row["neighbor_ids"]
        assert group[row["id"]] not in {group[i] for i in row["neighbor_ids"]}


KINDS = ("png", "txt")


class StopError(Exception):
    """What stops a run."""


def test_a_run_that_was_stopped_goes_on(kb: KnowledgeBase, source: Path, tmp_path: Path) -> None:
    whole, out, config = tmp_path / "whole.parquet", tmp_path / "n.parquet", NeighborsConfig(k=3)
    write_neighbors(kb, str(source), whole, config)
    for wanted in (0, 1, 2):
        done: list[str] = []

        def stop_after(shard: str, *, after: int = wanted, done: list[str] = done) -> None:
            done.append(shard)
            if len(done) > after:
                raise StopError

        with pytest.raises(StopError):
            write_neighbors(kb, str(source), out, config, on_shard=stop_after)
        assert not out.exists()
    report = write_neighbors(kb, str(source), out, config)
    assert (report.shards_done, report.shards_kept, report.pairs) == (0, 3, 33)
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if "parquet" in path.name) == ["n.parquet", "whole.parquet"]
    again = write_neighbors(kb, str(source), out, config)
    assert (again.shards_done, again.shards_kept, again.pairs) == (0, 3, 33)


def test_stopped_within_a_shard_leaves_no_half_part(
    kb: KnowledgeBase, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 4)

    def stop(pairs: int) -> None:
        raise StopError

    with pytest.raises(StopError):
        write_neighbors(kb, str(source), tmp_path / "n.parquet", NeighborsConfig(), on_pairs=stop)
    assert [path.name for path in (tmp_path / ".n.parquet.parts").iterdir()] == ["settings.json"]


@pytest.mark.parametrize("change", ["settings", "knowledge base", "source"])
def test_what_has_changed_is_looked_up_anew(kb: KnowledgeBase, source: Path, tmp_path: Path, change: str) -> None:
    out, config = tmp_path / "n.parquet", NeighborsConfig(k=3)
    write_neighbors(kb, str(source), out, config)
    if change == "settings":
        config = NeighborsConfig(k=4)
    elif change == "knowledge base":
        (gone,) = kb.store.matching_ids()[:1].tolist()
        kb.remove([gone])
    else:
        write_tar(source / "00001.tar", sample(3))
    report = write_neighbors(kb, str(source), out, config)
    assert report.shards_done == 3
    rows = rows_of(out)
    if change == "settings":
        assert {len(row["neighbor_ids"]) for row in rows} == {4}
    elif change == "knowledge base":
        assert all(gone not in row["neighbor_ids"] for row in rows)
    else:
        assert len(rows) == 23


def test_the_file_says_what_it_was_made_from(kb: KnowledgeBase, source: Path, tmp_path: Path) -> None:
    write_neighbors(kb, str(source), tmp_path / "n.parquet", NeighborsConfig(k=3, by="bm25"))
    made = json.loads(pq.read_schema(tmp_path / "n.parquet").metadata[METADATA_KEY])
    assert (made["settings"]["by"], made["settings"]["snapshot"]) == ("bm25", kb.store.version)
    assert len(made["shards"]) == 3


def test_pictures_that_cannot_be_read_are_counted(kb: KnowledgeBase, tmp_path: Path) -> None:
    members = [*sample(40, key="a").items(), ("b.png", b"?"), ("b.txt", b"no picture"), ("c.png", encode(draw(41)))]
    write_tar(tmp_path / "bad" / "a.tar", members)
    report = write_neighbors(kb, str(tmp_path / "bad"), tmp_path / "n.parquet", NeighborsConfig(query="image"))
    assert (report.pairs, report.bad) == (1, 2)  # c has no caption
    by_caption = write_neighbors(kb, str(tmp_path / "bad"), tmp_path / "n.parquet", NeighborsConfig())
    assert (by_caption.pairs, by_caption.bad) == (2, 1)  # no picture is needed to ask by a caption


def test_pairs_that_bring_their_vectors_are_not_embedded(kb: KnowledgeBase, tmp_path: Path) -> None:
    """What clip-retrieval left: vectors and captions, no images. Its own record is known by its id alone."""
    stored = kb.store.get(kb.store.matching_ids()[:4], vectors=True)
    folder = tmp_path / "laion"
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    np.save(folder / "img_emb" / "img_emb_0.npy", np.stack([pair.vector for pair in stored if pair.vector is not None]))
    table = pa.table({"caption": [pair.caption for pair in stored], "image_path": [f"{n}" for n in range(4)]})
    pq.write_table(table, folder / "metadata" / "metadata_0.parquet")
    write_neighbors(kb, str(folder), tmp_path / "n.parquet", NeighborsConfig(k=2, by="clip", query="image"))
    rows = rows_of(tmp_path / "n.parquet")
    assert [row["neighbor_ids"][0] for row in rows] == [pair.id for pair in stored]
    assert all(row["scores"][0] == pytest.approx(1, abs=1e-5) for row in rows)
    build(kb, [str(folder)], BuildConfig(searcher="exact"))
    write_neighbors(kb, str(folder), tmp_path / "n.parquet", NeighborsConfig(k=2, by="clip", query="image"))
    for row in rows_of(tmp_path / "n.parquet"):
        assert row["id"] not in row["neighbor_ids"]


def test_mistakes(kb: KnowledgeBase, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lies inside the source"):
        write_neighbors(kb, str(source), source / "n.parquet", NeighborsConfig())
    with pytest.raises(CorpusError, match="there is nothing at"):
        write_neighbors(kb, str(tmp_path / "gone"), tmp_path / "n.parquet", NeighborsConfig())
    with pytest.raises(ConfigError, match="k must be at least 1"):
        NeighborsConfig(k=0)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_img2dataset(tmp_path / "kb-source", shards=1, per_shard=5)
    kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder(dim=8))
    build(kb, [str(tmp_path / "kb-source")], BuildConfig(searcher="exact"))
    monkeypatch.setattr(module, "BATCH", 8)
    monkeypatch.setattr(module, "GROUP_ROWS", 16)
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    picture, config, peaks = encode(PIL.Image.fromarray(noise)), NeighborsConfig(k=1, by="bm25"), {}  # 27 KB
    for rows in (16, 16, 160):  # the first time warms up
        captioned = [
            (f"{i}.{suffix}", picture if suffix == "png" else b"a dog") for i in range(rows) for suffix in KINDS
        ]
        write_tar(tmp_path / f"train{rows}" / "a.tar", captioned)
        tracemalloc.start()
        write_neighbors(kb, str(tmp_path / f"train{rows}"), tmp_path / "n.parquet", config)
        peaks[rows] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[160] < 1.5 * peaks[16], peaks


def test_the_command(shell: Shell, source: Path, tmp_path: Path) -> None:  # noqa: F811
    assert shell("build", source, "--kb", tmp_path / "kb")[0] == 0
    words = ["neighbors", source, "--kb", tmp_path / "kb", "--out", tmp_path / "n.parquet", "-k", 3]
    document = shell.json(*words)
    assert (document["pairs"], document["shards_done"], document["short"]) == (33, 3, 0)
    assert "3 done before" in shell(*words)[1]
    assert pq.read_table(io.BytesIO((tmp_path / "n.parquet").read_bytes())).num_rows == 33
    assert shell.json(*words, "--query", "image", "--by", "clip", "--include-own")["shards_done"] == 3
    assert "no effect" in shell.error(*words, "--query", "image", "--by", "bm25")
