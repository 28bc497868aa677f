"""The plan beside what a build really took, its arithmetic by hand, and the sizes that structures are chosen by."""

import dataclasses
import errno
import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from index.cli import make_app
from index.errors import ConfigError, CorpusError, ModelError
from index.ingest import plan as module
from index.ingest.build import BuildConfig, build
from index.ingest.decode import KeepImages
from index.ingest.plan import StageCost, UnitCosts, count_sources, make_plan, plan_sources
from index.knowledge_base import KnowledgeBase
from index.search.searcher import ArrayRows, build_searcher
from index.search.sizes import (
    choose_structure,
    gigabytes,
    parse_bytes,
    scann_serving_bytes,
    training_rows,
    working_bytes,
)
from index.stats import bytes_by_part, folder_bytes
from index.store import MAP_ROWS
from tests.fakes import HashEmbedder, sample, write_img2dataset, write_tar

MS = 1e-3


def costs(**changes: object) -> UnitCosts:
    """A machine whose model is the slowest part."""
    made = UnitCosts(
        dim=512,
        read=StageCost(seconds=0.1 * MS, processor_seconds=0.1 * MS),
        decode=StageCost(seconds=2 * MS, processor_seconds=2 * MS),
        embed=StageCost(seconds=1 * MS, processor_seconds=0.1 * MS),
        write=StageCost(seconds=0.05 * MS, processor_seconds=0.05 * MS),
        row_bytes=2500.0,
        caption_bytes=80.0,
        source_bytes=20_000.0,
        process_bytes=1e9,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


# Sizes


def test_sizes_are_written_as_people_write_them() -> None:
    sizes = [parse_bytes(text) for text in ("16G", "800M", "1.5T", "64k", "1000", "16GB", "16 GiB")]
    assert sizes == [16_000_000_000, 800_000_000, 1_500_000_000_000, 64_000, 1000, 16_000_000_000, 16_000_000_000]
    assert (gigabytes(16e9), gigabytes(2.5e12), gigabytes(800e6), gigabytes(1500)) == (
        "16.0 GB",
        "2.5 TB",
        "800.0 MB",
        "1.5 kB",
    )


@pytest.mark.parametrize("text", ["", "G", "-3G", "0", "many", "nan", "inf", "16X"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size; write it as 16G or 800M"):
        parse_bytes(text)


def test_the_structure_follows_the_budget() -> None:
    def chosen(ram: str, rows: int = 10_000_000) -> tuple[str, str, bool]:
        structure = choose_structure(rows, 512, ram=parse_bytes(ram))
        return structure.kind, structure.vectors, structure.shards > 1

    assert chosen("1G", rows=1000)[0] == "exact"
    assert chosen("64G") == ("scann", "memory", False)  # 21 GB to serve, 43 GB to build
    assert chosen("24G") == ("scann", "memory", True)  # built in parts
    assert chosen("8G") == ("scann", "disk", True)
    assert chosen("900M") == ("lance", "disk", False)


@pytest.mark.parametrize("ram", ["64G", "24G", "8G", "2G"])
def test_a_chosen_structure_stays_in_its_budget(ram: str) -> None:
    structure = choose_structure(10_000_000, 512, ram=parse_bytes(ram))
    assert structure.serving_bytes <= parse_bytes(ram)
    assert structure.building_bytes <= parse_bytes(ram)


def test_what_is_asked_for_is_chosen_and_said_when_it_suits_badly() -> None:
    lance = choose_structure(100, 16, kind="lance")
    assert (lance.kind, lance.reason) == ("lance", "it was asked for")
    exact = choose_structure(1_000_000, 512, kind="exact", ram=10**9)
    assert "does not fit in 1.0 GB" in exact.reason
    one_by_one = choose_structure(10_000_000, 512, kind="scann", ram=parse_bytes("900M"))
    assert not one_by_one.is_resident
    assert one_by_one.serving_bytes <= 900e6
    assert "loaded one at a time" in one_by_one.reason


def test_a_budget_that_builds_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"1\.0 MB of memory are too little .* at least"):
        choose_structure(1_000_000, 512, ram=1_000_000)


def test_the_bytes_of_a_row_by_hand() -> None:
    ids = 5 * 8  # the same in all: see `ID_BYTES`
    assert scann_serving_bytes(1, 512, vectors="memory") == 2048 + 85 + 8 + ids + 24
    assert scann_serving_bytes(1, 512, vectors="disk") == 85 + 8 + ids + 24
    assert scann_serving_bytes(1, 768, vectors="disk") == 96 + 8 + ids + 24
    many = MAP_ROWS + 1  # of which no map is kept
    assert scann_serving_bytes(many, 512, vectors="disk") == many * (85 + 8 + ids)
    assert scann_serving_bytes(1000, 512, vectors="disk", resident_rows=10) == 10 * (85 + 8) + 1000 * (ids + 24)
    assert training_rows(50_000) == 50_000
    assert training_rows(1_000_000) == 200_000


# Arithmetic


def test_a_plan_by_hand() -> None:
    plan = make_plan(1_000_000, costs(), ram=16 * 10**9, processors=4)
    # Decoding by four threads takes 0.5 ms a pair and the network 1 ms, so the network holds it up.
    assert plan.bottleneck == "embed"
    assert plan.pairs_per_second == pytest.approx(1000)
    assert plan.stages == pytest.approx({"read": 0.1 * MS, "decode": 0.5 * MS, "embed": MS, "write": 0.05 * MS})
    assert plan.seconds["pairs"] == pytest.approx(1000)
    assert plan.bytes["rows"] == pytest.approx(2.5e9)
    assert plan.bytes["word index"] == pytest.approx(80e6 * module.WORD_BYTES)
    assert plan.bytes["searcher"] == plan.structure.disk_bytes
    searcher = scann_serving_bytes(1_000_000, 512, vectors="memory")
    assert plan.memory["serving"] == 1e9 + searcher + 80e6 * module.WORD_MEMORY
    assert plan.total_bytes == pytest.approx(sum(plan.bytes.values()))
    assert plan.hours == pytest.approx(sum(plan.seconds.values()) / 3600)
    assert (plan.expected_recall, plan.warnings) == (0.95, ())
    json.dumps(plan.to_json(), allow_nan=False)


def test_duplicates_are_looked_for_by_comparing_few_rows_and_by_searching_for_many() -> None:
    few = make_plan(10_000, costs(), processors=2)
    assert few.seconds["duplicates"] == pytest.approx(module.COMPARE_SECONDS * 10_000**2 * 512 / 2)
    many = make_plan(1_000_000, costs(), processors=2, ram=64 * 10**9)
    assert many.seconds["duplicates"] == pytest.approx(module.NEIGHBORS_SECONDS * 1_000_000 * 1000 * 512 / 2)
    shards = make_plan(1_000_000, costs(), processors=2, ram=2 * 10**9)
    root = math.sqrt(shards.structure.shards)  # of shards a row is looked up in each, and the leaves are smaller
    assert shards.structure.shards > 1
    assert shards.seconds["duplicates"] == pytest.approx(many.seconds["duplicates"] * root)
    assert make_plan(10**6, costs(), kind="exact").seconds["duplicates"] == 0.0  # by their bytes alone


def test_what_holds_a_build_up() -> None:
    assert make_plan(100, costs(), workers=1, processors=4).bottleneck == "decode"
    slow_disk = StageCost(seconds=9 * MS, processor_seconds=0.0)
    assert make_plan(100, costs(read=slow_disk), processors=4).bottleneck == "read"
    assert make_plan(100, costs(write=slow_disk), processors=4).bottleneck == "write"
    # A network on the processors takes them from the decoders: 2 + 4 ms of four processors, and no stage alone is slow.
    on_cpu = StageCost(seconds=1 * MS, processor_seconds=4 * MS)
    shared = make_plan(100, costs(embed=on_cpu), processors=4)
    assert shared.bottleneck == "processors"
    assert shared.pairs_per_second == pytest.approx(1 / ((0.1 + 2 + 4 + 0.05) / 4 * MS))


def test_machines_share_the_pairs_and_the_time() -> None:
    alone, ten = make_plan(10**8, costs(), ram=10**12), make_plan(10**8, costs(), ram=10**12, machines=10)
    assert ten.pairs_each == 10**7
    assert ten.seconds["pairs"] == pytest.approx(alone.seconds["pairs"] / 10)
    assert ten.total_bytes < alone.total_bytes / 9
    with pytest.raises(ConfigError, match="at least one pair and one machine, got 5 and 0"):
        make_plan(5, costs(), machines=0)


@pytest.mark.parametrize(("pairs", "machines", "ram"), [(10**8, 1, 64 * 10**9), (5 * 10**9, 50, 64 * 10**9)])
def test_plans_on_paper_for_the_web(pairs: int, machines: int, ram: int) -> None:
    plan = make_plan(pairs, costs(), ram=ram, machines=machines, processors=16)
    each = math.ceil(pairs / machines)
    assert (plan.structure.kind, plan.structure.vectors) == ("scann", "disk")  # 100 M x 512: 13.3 GB of codes and ids
    assert plan.structure.serving_bytes == each * (85 + 8 + 40)
    assert plan.memory["building"] <= ram + 1e9 + working_bytes(512)
    assert plan.bytes["rows"] == each * 2500
    assert plan.seconds["pairs"] == pytest.approx(each * MS)


# Counting and probing


def test_pairs_are_counted_without_being_read(tmp_path: Path) -> None:
    write_img2dataset(tmp_path / "a", shards=3, per_shard=4)
    _, counted = count_sources([str(tmp_path / "a")])
    assert (counted.shards, counted.pairs, counted.is_estimate) == (3, 12, False)
    write_tar(tmp_path / "plain" / "x.tar", sample(1))
    _, unknown = count_sources([str(tmp_path / "plain")])
    assert (unknown.pairs, unknown.is_estimate) == (None, True)
    _, both = count_sources([str(tmp_path / "a"), str(tmp_path / "plain")])
    assert both.is_estimate
    assert both.pairs is not None
    assert both.pairs > 12


def test_of_very_many_shards_some_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COUNTED_SHARDS", 2)
    write_img2dataset(tmp_path, shards=5, per_shard=4)
    _, count = count_sources([str(tmp_path)])
    assert count.is_estimate
    assert count.pairs == pytest.approx(20, rel=0.1)


def test_a_source_without_shards_cannot_be_planned(tmp_path: Path) -> None:
    write_img2dataset(tmp_path, shards=1)
    (tmp_path / "00000_stats.json").unlink()
    (tmp_path / "00001_stats.json").write_text("{}")
    with pytest.raises(CorpusError, match="there is no shard to plan with"):
        count_sources([str(tmp_path)])


def test_a_source_of_bad_samples_cannot_be_planned(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"1.png": b"no image", "1.txt": b"a caption"})
    with pytest.raises(CorpusError, match="none of the first samples"):
        plan_sources([str(tmp_path)], HashEmbedder())


@pytest.mark.parametrize("footer", [b"\xff" * 40, b""])
def test_a_damaged_table_says_nothing_of_its_rows(tmp_path: Path, footer: bytes) -> None:
    write_tar(tmp_path / "x.tar", sample(1))
    (tmp_path / "y.parquet").write_bytes(b"PAR1" + footer + b"\xff\xff\0\0PAR1")
    shards, count = count_sources([str(tmp_path)])
    assert (len(shards), count.pairs) == (2, None)


def test_a_source_that_fails_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "x.tar", sample(1))

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("index.ingest.tar_reader.open_ahead", broken)
    with pytest.raises(CorpusError, match=r"a source cannot be read .*Input/output error"):
        plan_sources([str(tmp_path)], HashEmbedder())


def test_pairs_of_plain_tars_are_told_by_their_bytes(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for number in range(60):
        members |= sample(number)
    write_tar(tmp_path / "x.tar", members)
    write_tar(tmp_path / "y.tar", {name.replace("0", "1"): content for name, content in members.items()})
    count, _, plan = plan_sources([str(tmp_path)], HashEmbedder())
    assert count.pairs is None
    assert plan.pairs == pytest.approx(120, rel=0.1)


def test_the_plan_is_within_a_quarter_of_a_real_build(tmp_path: Path) -> None:
    pairs = write_img2dataset(tmp_path / "a", shards=4, per_shard=150)
    embedder = HashEmbedder(dim=256)
    count, measured, plan = plan_sources([str(tmp_path / "a")], embedder)
    assert (count.pairs, plan.pairs) == (pairs, pairs)
    assert measured.bad_share == 0.0
    assert all(getattr(measured, stage).seconds > 0 for stage in ("read", "decode", "embed"))
    assert measured.write.seconds >= 0
    kb = KnowledgeBase.create(tmp_path / "kb", embedder)
    build(kb, [str(tmp_path / "a")], BuildConfig())
    parts = bytes_by_part(kb.directory)
    assert plan.bytes["rows"] == pytest.approx(parts["rows"], rel=0.25)
    assert plan.structure.kind == "exact"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scann", "lance"])
def test_the_searcher_on_disk_is_within_a_quarter_of_the_plan(kind: str, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((20_000, 48)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = ArrayRows(np.arange(20_000), vectors)
    queries = vectors[:30].copy()
    build_searcher(kind, rows, tmp_path / "s", queries=queries, target_recall=0.1)  # type: ignore[arg-type]
    structure = choose_structure(20_000, 48, kind=kind)  # type: ignore[arg-type]
    assert structure.disk_bytes == pytest.approx(folder_bytes(tmp_path / "s"), rel=0.25)


def test_images_that_are_kept_are_in_the_plan(tmp_path: Path) -> None:
    write_img2dataset(tmp_path, shards=1, per_shard=30)
    embedder = HashEmbedder()
    _, plain, _ = plan_sources([str(tmp_path)], embedder)
    _, copied, _ = plan_sources([str(tmp_path)], embedder, keep=KeepImages(copy=True))
    size = len(sample(1)["000000001.png"])
    assert copied.row_bytes - plain.row_bytes == pytest.approx(size, rel=0.5)


def test_the_command_plans_in_json_and_for_people(tmp_path: Path, tiny_clip: Path) -> None:
    write_img2dataset(tmp_path, shards=2, per_shard=20)
    app = make_app()
    words = ["plan", str(tmp_path), "--model", str(tiny_clip), "--pairs", "1000000", "--ram", "200M", "--machines", "4"]
    done = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    document = json.loads(done.stdout)
    assert document["sources"]["pairs"] == 40
    assert (document["plan"]["pairs_each"], document["plan"]["recall"]) == (250_000, 0.95)
    assert document["plan"]["structure"]["kind"] == "scann"
    text = CliRunner().invoke(app, words, catch_exceptions=False).stdout
    assert "held up by" in text
    assert "1,000,000 on 4 machines" in text
    assert not list(tmp_path.glob("*.lance"))


def test_the_command_wants_a_model_and_a_size(tmp_path: Path, tiny_clip: Path) -> None:
    write_img2dataset(tmp_path, shards=1)
    with pytest.raises(ModelError, match="--model"):
        CliRunner().invoke(make_app(), ["plan", str(tmp_path)], catch_exceptions=False)
    words = ["plan", str(tmp_path), "--model", str(tiny_clip), "--ram", "much"]
    wrong = CliRunner().invoke(make_app(), words, catch_exceptions=False)
    assert wrong.exit_code == 2
    assert "'much' is not a size" in wrong.stderr


def test_the_recall_that_is_asked_for_decides_whether_a_searcher_is_built_again(tmp_path: Path) -> None:
    write_img2dataset(tmp_path / "a", shards=1, per_shard=40)
    kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
    config = BuildConfig(searcher="lance")
    build(kb, [str(tmp_path / "a")], config)
    first = kb.manifest.searcher
    build(kb, [str(tmp_path / "a")], config)
    assert kb.manifest.searcher == first
    report = build(kb, [str(tmp_path / "a")], dataclasses.replace(config, recall=0.99, ram=10**9))
    assert kb.manifest.searcher != first
    assert report.warning == ""  # so few rows are compared one by one
    manifest = kb.searcher_manifest()
    assert manifest is not None
    assert (manifest.target_recall, manifest.ram, manifest.calibrated_on) == (0.99, 10**9, "captions")
    again = kb.build_search("lance")  # without being told, it stays with what it was told before
    assert again == manifest
    assert [hit.caption for hit in kb.search("red circle", k=2)]
