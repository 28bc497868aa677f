"""What the world does to a knowledge base: files lost or cut, a disk that refuses, a folder that may only be read."""

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from index.cli import make_app, run
from index.compaction import compact
from index.errors import KnowledgeBaseError, damage
from index.ingest.build import BuildConfig, build
from index.knowledge_base import MANIFEST, KnowledgeBase
from index.store import PairStore
from tests.fakes import HashEmbedder, draw, encode, write_img2dataset, write_tar

ROOT = Path(__file__).parents[2]
PAIRS = 18

BUILD = """
import pathlib, re, resource, sys
{limit}
sys.path.insert(0, {root!r})
from index.cli import run

def command(args):
    from index.ingest.build import BuildConfig, build
    from index.knowledge_base import KnowledgeBase
    from tests.fakes import HashEmbedder

    kb = KnowledgeBase.create({kb!r}, HashEmbedder(dim={dim}))
    report = build(kb, [{source!r}], BuildConfig(workers=2))
    print(report.pairs_added, re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

run(command, [])
"""


# Root passes over permissions. Without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH it does not, from the next program on;
# who is not root has none to drop.
AS_A_USER = """
import ctypes, os, sys
for capability in (1, 2):
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def python(*args: str, as_user: bool = False) -> "subprocess.CompletedProcess[str]":
    before = ["-c", AS_A_USER] if as_user else []
    return subprocess.run(
        [sys.executable, *before, *args],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=250,
        check=False,
    )


def build_apart(
    kb: Path, source: Path, *, dim: int = 32, limit: str = "", as_user: bool = False
) -> "subprocess.CompletedProcess[str]":
    """A build in a process of its own; what it prints is the number of pairs, and its peak memory in kB."""
    script = BUILD.format(root=str(ROOT), kb=str(kb), source=str(source), dim=dim, limit=limit)
    return python("-c", script, as_user=as_user)


def contents(kb: Path) -> list[tuple[str, ...]]:
    return sorted(tuple(map(str, row.values())) for row in PairStore(kb).dataset.to_table().to_pylist())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus and its knowledge base; to be copied before it is damaged."""
    folder = tmp_path_factory.mktemp("whole")
    write_img2dataset(folder / "pets", shards=3)
    build(KnowledgeBase.create(folder / "kb", HashEmbedder()), [str(folder / "pets")], BuildConfig())
    return folder


def copy_of(whole: Path, folder: Path) -> Path:
    shutil.copytree(whole / "kb", folder)
    return folder


# Files


def first_file(kb: Path, folder: str) -> Path:
    return min((kb / "pairs.lance" / folder).iterdir())


def lose(path: Path) -> None:
    path.unlink()


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def overwrite_the_end(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + b"\xff" * (len(content) - len(content) // 2))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("folder", "harm"),
    [("data", lose), ("data", cut_short), ("data", overwrite_the_end), ("data", empty), ("_versions", empty)],
)
@pytest.mark.parametrize(
    "command",
    [["stats"], ["query", "a red circle", "--by", "bm25"], ["remove", "--where", "caption LIKE '%red%'"], ["compact"]],
    ids=lambda command: command[0],
)
def test_a_lost_or_damaged_file_of_the_table_is_one_sentence(
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    folder: str,
    harm: Callable[[Path], None],
    command: list[str],
) -> None:
    kb = copy_of(whole, tmp_path / "kb")
    harm(first_file(kb, folder))
    with pytest.raises(SystemExit) as ended:
        run(make_app(), [*command, "--kb", str(kb)])
    out, err = capsys.readouterr()
    assert (out, ended.value.code) == ("", 1)
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "missing or damaged" in err or f"the table of {kb} cannot be read" in err


@pytest.mark.parametrize("harm", [lose, cut_short, overwrite_the_end, empty])
def test_a_build_on_a_damaged_table_writes_nothing(whole: Path, tmp_path: Path, harm: Callable[[Path], None]) -> None:
    kb = copy_of(whole, tmp_path / "kb")
    harm(first_file(kb, "data"))
    before = sorted(path.name for path in (kb / "pairs.lance").rglob("*"))
    with pytest.raises((OSError, ValueError)) as told:
        build(KnowledgeBase.open(kb, HashEmbedder()), [str(whole / "pets")], BuildConfig())
    assert damage(told.value)
    assert sorted(path.name for path in (kb / "pairs.lance").rglob("*")) == before


def test_a_damaged_searcher_or_word_index_is_made_again_by_a_build(whole: Path, tmp_path: Path) -> None:
    kb = copy_of(whole, tmp_path / "kb")
    for path in (kb / "searchers").rglob("*.json"):
        empty(path)
    shutil.rmtree(kb / "pairs.lance" / "_indices")
    base = KnowledgeBase.open(kb, HashEmbedder())
    with pytest.raises(KnowledgeBaseError, match=r"cannot be read .*radt index build"):
        base.search("a red circle")
    report = build(base, [str(whole / "pets")], BuildConfig())
    assert (report.pairs_added, report.pairs_total) == (0, PAIRS)
    for by in ("clip", "bm25"):
        hits = KnowledgeBase.open(kb, HashEmbedder()).search("a red circle", k=5, by=by)
        expected = KnowledgeBase.open(whole / "kb", HashEmbedder()).search("a red circle", k=5, by=by)
        assert [(hit.id, hit.score) for hit in hits] == [(hit.id, hit.score) for hit in expected]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"7",
        b"\xff\xfe",
        b'{"format": 2}',
        b'{"format": "2", "model": "hash-32"}',
        b'{"format": 2, "model": 5, "fingerprint": "x", "dim": "wide", "created": null}',
    ],
)
def test_a_damaged_manifest_is_one_sentence(whole: Path, tmp_path: Path, content: bytes) -> None:
    kb = copy_of(whole, tmp_path / "kb")
    (kb / MANIFEST).write_bytes(content)
    with pytest.raises(KnowledgeBaseError, match=MANIFEST) as told:
        KnowledgeBase.open(kb, HashEmbedder())
    assert "\n" not in str(told.value)


def test_a_manifest_cut_anywhere_is_one_sentence(whole: Path, tmp_path: Path) -> None:
    kb = copy_of(whole, tmp_path / "kb")
    text = (kb / MANIFEST).read_bytes().rstrip()
    for length in range(0, len(text), 7):
        (kb / MANIFEST).write_bytes(text[:length])
        with pytest.raises(KnowledgeBaseError, match=MANIFEST):
            KnowledgeBase.open(kb, HashEmbedder())


def test_a_manifest_edited_to_another_model_is_refused(whole: Path, tmp_path: Path) -> None:
    kb = copy_of(whole, tmp_path / "kb")
    values = json.loads((kb / MANIFEST).read_text())
    (kb / MANIFEST).write_text(json.dumps({**values, "fingerprint": "0" * 32}))
    with pytest.raises(KnowledgeBaseError, match="cannot be compared"):
        KnowledgeBase.open(kb, HashEmbedder())


def test_an_empty_knowledge_base_can_be_compacted(tmp_path: Path) -> None:
    assert compact(KnowledgeBase.create(tmp_path / "kb", HashEmbedder())).pairs == 0


# The disk


@pytest.mark.slow
def test_a_disk_that_takes_no_more_below_lance_harms_nothing(tmp_path: Path) -> None:
    """No file may grow beyond 150 kB: the fragment with the vectors does not fit, what came before does."""
    write_img2dataset(tmp_path / "pets", shards=1, per_shard=3)
    write_img2dataset(tmp_path / "more", shards=4, per_shard=30)
    assert build_apart(tmp_path / "kb", tmp_path / "pets", dim=512).returncode == 0
    before = contents(tmp_path / "kb")

    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))"
    done = build_apart(tmp_path / "kb", tmp_path / "more", dim=512, limit=limit)
    assert (done.stdout, done.returncode) == ("", 1)
    assert done.stderr.startswith(f"error: cannot write to {tmp_path / 'kb'}: ")
    assert "File too large" in done.stderr
    assert done.stderr.count("\n") == 1
    assert contents(tmp_path / "kb") == before
    assert build_apart(tmp_path / "kb", tmp_path / "more", dim=512).stdout.startswith("120 ")


@pytest.mark.slow
def test_a_folder_that_may_only_be_read_is_read_and_not_written(whole: Path, tmp_path: Path) -> None:
    kb = copy_of(whole, tmp_path / "kb")
    write_img2dataset(tmp_path / "more", shards=1, per_shard=3)
    folders = [kb, *(path for path in kb.rglob("*") if path.is_dir())]
    query = ["-m", "radt.cli", "index", "query", "a red circle", "--by", "bm25", "--json", "--kb", str(kb)]
    try:
        for path in [*folders, *(path for path in kb.rglob("*") if path.is_file())]:
            path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o222)
        done = build_apart(kb, tmp_path / "more", as_user=True)
        asked = python(*query, as_user=True)
    finally:
        for path in folders:
            path.chmod(0o755)
    assert (done.stdout, done.returncode) == ("", 1)
    assert done.stderr.startswith(f"error: cannot write to {kb}: ")
    assert "Permission denied" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (asked.stderr, asked.returncode) == ("", 0)
    assert json.loads(asked.stdout)["hits"][0]["caption"] == "a red circle number 0"


# Memory


@pytest.mark.slow
def test_memory_is_flat_over_ten_times_more_shards(tmp_path: Path) -> None:
    """6 shards of 3 MB, then 60: were what is read kept, the second build would need 160 MB more."""
    peaks = []
    for shards in (6, 60):
        for shard in range(shards):
            pictures = [
                encode(draw(20 * shard + i)) + b"\0" * 150_000 for i in range(20)
            ]  # a decoder stops before that
            members = {f"{i:03d}.png": picture for i, picture in enumerate(pictures)}
            write_tar(
                tmp_path / str(shards) / f"{shard:05d}.tar",
                [item for name, picture in members.items() for item in ((name, picture), (f"{name[:3]}.txt", b"dot"))],
            )
        done = build_apart(tmp_path / f"kb{shards}", tmp_path / str(shards))
        assert done.stderr == ""
        pairs, peak = map(int, done.stdout.split())
        assert pairs == 20 * shards
        peaks.append(peak)
    assert peaks[1] < 1.1 * peaks[0] + 40_000, peaks
