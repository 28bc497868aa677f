"""A knowledge base in a bucket is searched where it lies, alone and together with one on this machine."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from index.cli import make_app
from index.errors import KnowledgeBaseError
from index.ingest.build import BuildConfig, build
from index.ingest.decode import KeepImages
from index.knowledge_base import KnowledgeBase
from index.remote import RemoteFolder, remote_url
from index.search.joined import JoinedKnowledgeBase
from index.verify import verify
from tests.fakes import HashEmbedder, caption_of, draw, sample, write_tar

URL = "s3://shelf/kb"
EMBEDDER = HashEmbedder()


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def shelf(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty bucket, reached by the usual variables, and an empty cache."""
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("RADT_CACHE", str(tmp_path / "cache"))
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem()
    fs.mkdir("shelf")
    yield fs
    fs.rm("shelf", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


def make(folder: Path, numbers: range, *, kind: Any = "lance") -> KnowledgeBase:
    """A knowledge base that keeps its images."""
    members: dict[str, bytes] = {}
    for number in numbers:
        members |= sample(number)
    write_tar(folder / "data" / "00000.tar", members)
    base = KnowledgeBase.create(folder / "kb", EMBEDDER)
    build(base, [str(folder / "data")], BuildConfig(searcher=kind, keep=KeepImages(copy=True)))
    return base


def same(ours: KnowledgeBase | JoinedKnowledgeBase, theirs: KnowledgeBase | JoinedKnowledgeBase) -> None:
    for by in ("clip", "bm25", "tfidf", "hybrid"):
        for query in ("a red circle number 3",):
            got, expected = (kb.search(query, by=by, k=6) for kb in (ours, theirs))
            assert [hit.id for hit in got] == [hit.id for hit in expected]
            np.testing.assert_allclose([hit.score for hit in got], [hit.score for hit in expected], rtol=1e-5)


@pytest.mark.slow
def test_it_answers_as_the_same_folder_on_this_machine(shelf: Any, tmp_path: Path) -> None:
    local = make(tmp_path, range(8))
    local.add(draw(900), "a zebra by hand")
    shelf.put(str(tmp_path / "kb"), "shelf/kb", recursive=True)
    remote = KnowledgeBase.open(URL, EMBEDDER)
    same(remote, local)
    assert len(remote) == 9
    (zebra,) = remote.search("zebra", by="bm25")
    assert zebra.open_image().tobytes() == draw(900).convert("RGB").tobytes()
    hit = remote.search(caption_of(3), by="bm25", k=1)[0]
    assert hit.image.uri.startswith(f"{URL}/pairs.lance#image/id=")
    assert hit.open_image().tobytes() == draw(3).convert("RGB").tobytes()
    stats, ours = remote.stats(), local.stats()
    assert stats["kb"] == URL
    assert stats["bytes_by_part"] == ours["bytes_by_part"]
    assert {key: stats[key] for key in ("pairs", "datasets", "searcher")} == {
        key: ours[key] for key in ("pairs", "datasets", "searcher")
    }
    assert not list(remote.directory.rglob("*.lance")), "tables stay where they are"
    assert verify(remote, sample=3).is_sound


@pytest.mark.slow
def test_what_changes_there_is_seen(shelf: Any, tmp_path: Path) -> None:
    local = make(tmp_path, range(4))
    shelf.put(str(tmp_path / "kb"), "shelf/kb", recursive=True)
    remote = KnowledgeBase.open(URL, EMBEDDER)
    first = remote.directory / str(remote.manifest.searcher)
    assert len(remote.search("circle", k=20)) == 4
    local.add(draw(901), "a zebra")
    local.build_search("scann")
    shelf.put(str(tmp_path / "kb"), "shelf/", recursive=True)
    assert remote.search("zebra", by="bm25", k=1)[0].caption == "a zebra"
    assert len(remote.search("circle", k=20)) == 5
    assert not first.exists(), "a searcher that is no longer named is not kept"


@pytest.mark.slow
def test_a_searcher_is_fetched_once(shelf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, range(6))
    shelf.put(str(tmp_path / "kb"), "shelf/kb", recursive=True)
    KnowledgeBase.open(URL, EMBEDDER)
    monkeypatch.setattr(type(shelf), "get", lambda *_, **__: pytest.fail("fetched again"))
    assert KnowledgeBase.open(URL, EMBEDDER).search("a red circle", k=1)


@pytest.mark.slow
def test_another_knowledge_base_at_the_same_url_is_not_mistaken_for_the_first(
    shelf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where their searchers have one name, as those of an earlier radt may."""
    monkeypatch.setattr("index.knowledge_base.secrets", SimpleNamespace(token_hex=lambda size: "0" * size))
    make(tmp_path / "a", range(6))
    shelf.put(str(tmp_path / "a" / "kb"), "shelf/kb", recursive=True)
    before = KnowledgeBase.open(URL, EMBEDDER)
    shelf.rm("shelf/kb", recursive=True)
    other = make(tmp_path / "b", range(6, 12))
    shelf.put(str(tmp_path / "b" / "kb"), "shelf/kb", recursive=True)
    assert before.manifest.searcher == other.manifest.searcher
    same(KnowledgeBase.open(URL, EMBEDDER), other)


@pytest.mark.slow
def test_one_there_and_one_here_are_searched_as_one(shelf: Any, tmp_path: Path) -> None:
    everything = make(tmp_path / "all", range(12), kind="exact")
    here = make(tmp_path / "here", range(5), kind="exact")
    make(tmp_path / "there", range(5, 12), kind="exact")
    shelf.put(str(tmp_path / "there" / "kb"), "shelf/kb", recursive=True)
    both = JoinedKnowledgeBase.open([here.directory, URL], EMBEDDER)
    same(both, everything)
    assert {hit.kb for hit in both.search("number", by="bm25", k=12)} == {str(here.directory), URL}


@pytest.mark.slow
def test_nothing_is_written_there(shelf: Any, tmp_path: Path) -> None:
    make(tmp_path, range(6), kind="exact")
    shelf.put(str(tmp_path / "kb"), "shelf/kb", recursive=True)
    before = {path: info["ETag"] for path, info in shelf.find("shelf", detail=True).items()}
    remote = KnowledgeBase.open(URL, EMBEDDER)
    pair = remote.search("a red circle", k=1)[0].id
    for change in (
        lambda: remote.remove([pair]),
        lambda: remote.add(draw(1), "a caption"),
        lambda: remote.build_search("exact"),
        lambda: build(remote, [str(tmp_path / "data")], BuildConfig()),
        lambda: KnowledgeBase.create(URL, EMBEDDER),
    ):
        with pytest.raises(KnowledgeBaseError, match=f"{URL} is read where it lies and cannot be changed"):
            change()
    shelf.invalidate_cache()
    assert {path: info["ETag"] for path, info in shelf.find("shelf", detail=True).items()} == before


def test_what_is_not_there_is_said_in_a_sentence(shelf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KnowledgeBaseError, match=r"s3://shelf/none is not a knowledge base: it has no kb\.json"):
        KnowledgeBase.open("s3://shelf/none", EMBEDDER)
    with pytest.raises(KnowledgeBaseError, match="nosuch://x/y cannot be"):
        KnowledgeBase.open("nosuch://x/y", EMBEDDER)


@pytest.mark.slow
def test_the_commands_take_a_url(shelf: Any, tmp_path: Path) -> None:
    make(tmp_path, range(6), kind="exact")
    shelf.put(str(tmp_path / "kb"), "shelf/kb", recursive=True)
    run = CliRunner()
    answer = run.invoke(make_app(), ["query", "red", "--kb", URL, "--by", "bm25", "--json"])
    assert answer.exit_code == 0, answer.output
    document = json.loads(answer.stdout)
    assert document["kb"] == URL
    assert [hit["caption"] for hit in document["hits"]] == [caption_of(0)]
    shown = run.invoke(make_app(), ["show", document["hits"][0]["id"], "--kb", URL, "--json"])
    assert json.loads(shown.stdout)["caption"] == caption_of(0)
    assert json.loads(run.invoke(make_app(), ["stats", "--kb", URL, "--json"]).stdout)["pairs"] == 6
    refused = run.invoke(make_app(), ["remove", "--id", document["hits"][0]["id"], "--kb", URL])
    assert isinstance(refused.exception, KnowledgeBaseError)


@pytest.mark.parametrize(
    ("directory", "url"),
    [
        ("s3://b/kb/", "s3://b/kb"),
        (Path("s3://b/kb"), "s3://b/kb"),
        ("gs://b", "gs://b"),
        ("kb", None),
        ("/data/kb", None),
        (r"C:\kb", None),
        ("file:///data/kb", None),
    ],
    ids=str,
)
def test_urls_and_folders(directory: str | Path, url: str | None) -> None:
    assert remote_url(directory) == url


@pytest.mark.parametrize("searcher", ["../../else", "/else", "searchers/../../../else"])
def test_a_bucket_names_nothing_outside_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, searcher: str
) -> None:
    import fsspec

    monkeypatch.setenv("RADT_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.pipe("/stranger/kb.json", json.dumps({"searcher": searcher}).encode())
    with pytest.raises(KnowledgeBaseError, match="outside its folder"):
        RemoteFolder("memory://stranger").refresh()
    assert not list(tmp_path.rglob("*"))


def test_a_cache_for_every_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RADT_CACHE", str(tmp_path))
    assert RemoteFolder("s3://a/kb").folder != RemoteFolder("s3://b/kb").folder
    assert RemoteFolder("s3://a/kb").folder.is_relative_to(tmp_path)
