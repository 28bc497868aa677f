"""Tar headers against Python's own tarfile, and samples whose names are unusual."""

import io
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.ingest.readers import Shard, read
from index.ingest.tar_headers import Damage, Member, tar_members
from index.records import BadSample, Pair
from tests.fakes import draw, encode, write_tar

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
MEMBERS = st.lists(st.tuples(NAMES, st.integers(0, 1500), st.sampled_from([b"0", b"0", b"5", b"2"])), max_size=8)


def tar_of(members: list[tuple[str, int, bytes]], form: int, *, depth: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, size, kind in members:
            info = tarfile.TarInfo("folder/" * depth + name)
            info.size, info.type, info.linkname = size * (kind == b"0"), kind, "x" * 150 if kind == b"2" else ""
            info.mtime = 1.5 if form == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(bytes(size)))
    return buffer.getvalue()


@settings(deadline=None, max_examples=60)
@given(members=MEMBERS, form=st.sampled_from(FORMATS[1:]), depth=st.sampled_from([0, 3, 20, 60]))
def test_headers_are_what_tarfile_says(members: list[tuple[str, int, bytes]], form: int, depth: int) -> None:
    content = tar_of(members, form, depth=depth)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        expected = [(info.offset_data, info.size) for info in tar if info.isreg()]
    found = list(tar_members(io.BytesIO(content)))
    assert [(member.offset, member.size) for member in found if isinstance(member, Member)] == expected
    assert [m.name for m in found if isinstance(m, Member)] == [
        "folder/" * depth + name for name, _, kind in members if kind == b"0"
    ]
    assert not any(isinstance(member, Damage) for member in found)


def test_headers_of_the_oldest_form() -> None:
    members = [("a" * 99, 700, b"0"), ("folder/" * 20 + "b", 0, b"0"), ("c", 513, b"0")]
    found = list(tar_members(io.BytesIO(tar_of(members, tarfile.USTAR_FORMAT, depth=0))))
    assert [(member.name, member.size) for member in found if isinstance(member, Member)] == [m[:2] for m in members]


def test_files_of_more_than_8_gib() -> None:
    class Endless(io.RawIOBase):
        """A header, nothing for nine gigabytes, and the end."""

        size = 9 << 30

        def __init__(self, form: int) -> None:
            info = tarfile.TarInfo("x.png")
            info.size = self.size
            self.head, self.at = info.tobuf(form), 0

        def seek(self, offset: int, whence: int = 0) -> int:
            self.at = offset if whence == 0 else len(self.head) + self.size + 1024
            return self.at

        def read(self, count: int = -1) -> bytes:
            self.at += count
            return self.head[self.at - count : self.at].ljust(count, b"\0")

    for form in FORMATS[1:]:
        file = Endless(form)
        members = tar_members(file)
        assert next(members) == Member("x.png", len(file.head), 9 << 30)


@pytest.mark.parametrize("form", ["gnu", "pax", "ustar", "v7"])
def test_what_the_tar_command_writes(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "d" / "sub"
    folder.mkdir(parents=True)
    (folder / "x.png").write_bytes(encode(draw(1)))
    (folder / "x.txt").write_text("a caption")
    (folder / "link.png").symlink_to("x.png")
    tar = tmp_path / "out" / "a.tar"
    tar.parent.mkdir()
    subprocess.run(["tar", "-cf", tar, f"--format={form}", "-C", tmp_path / "d", "--sort=name", "."], check=True)
    (pair,) = [s for s in samples_of(tar.parent) if isinstance(s, Pair)]
    assert (pair.key, pair.caption, pair.image.read()) == ("./sub/x", "a caption", encode(draw(1)))


# Names


def samples_of(source: Path) -> list[Pair | BadSample]:
    return [s for shard in read(str(source)) if isinstance(shard, Shard) for s in shard.samples()]


KEYS = (
    *("000", "0001", "1e5", "-1", "NaN", "a b", "a\nb", "a\tb", "x" * 200, "a/b/c", "//a", "../up", "C:\\x", "%2e%2e"),
    *("\u00fc\u00f1\u00ee", "u\u0308", "\U0001f600", "a'; --", "\u202eabc"),
)


@pytest.mark.parametrize("key", KEYS)
def test_a_key_is_what_the_file_is_called(tmp_path: Path, key: str) -> None:
    write_tar(tmp_path / "a.tar", {f"{key}.PNG": encode(draw(1)), f"{key}.Txt": b"yes"})
    (pair,) = samples_of(tmp_path)
    assert isinstance(pair, Pair)
    assert (pair.key, pair.caption, pair.encoded) == (key, "yes", encode(draw(1)))


def test_names_that_differ_in_little_are_different_pairs(tmp_path: Path) -> None:
    keys = ["1", "01", "001", "\u00fc", "u\u0308", "A", "a", "a ", " a", "b/a", "./a"]
    members = {name: c for key in keys for name, c in ((f"{key}.png", encode(draw(1))), (f"{key}.txt", b"x"))}
    write_tar(tmp_path / "a.tar", members)
    pairs = [s for s in samples_of(tmp_path) if isinstance(s, Pair)]
    assert [p.key for p in pairs] == keys
    assert len({p.id for p in pairs}) == len(keys)


def test_interleaved_samples_are_told_and_never_mixed(tmp_path: Path) -> None:
    members = [("a.png", encode(draw(1))), ("b.png", encode(draw(2))), ("a.txt", b"of a"), ("b.txt", b"of b")]
    write_tar(tmp_path / "a.tar", members)
    assert [(s.key, getattr(s, "reason", "")) for s in samples_of(tmp_path)] == [
        ("a", "no caption"),
        ("b", "no caption"),
        ("a", "no image"),
        ("b", "no image"),
    ]


def test_the_first_of_two_samples_of_one_key_is_taken(tmp_path: Path) -> None:
    members = [
        ("a.png", encode(draw(1))), ("a.txt", b"first"), ("b.png", encode(draw(2))), ("b.txt", b"other"),
        ("a.png", encode(draw(3))), ("a.txt", b"second"), ("a.png", encode(draw(4))), ("a.txt", b"third"),
    ]  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    samples = samples_of(tmp_path)
    assert [s.caption for s in samples if isinstance(s, Pair)] == ["first", "other"]
    assert [(s.key, s.reason) for s in samples if isinstance(s, BadSample)] == [("a", "duplicate key")] * 2


def test_files_in_a_folder_with_dots_and_letters_of_all_kinds(tmp_path: Path) -> None:
    names = ["a.b.png", ".hidden.png", "\u00fc \U0001f600.JPG", "x.tar.gz.png", "no-suffix", "trailing..png"]
    for name in names:
        (tmp_path / name).write_bytes(encode(draw(1), "JPEG" if name.endswith("JPG") else "PNG"))
        stem = name.rpartition(".")[0]
        (tmp_path / f"{stem}.txt").write_text(f"of {stem}")
    found = {s.key: s.caption for s in samples_of(tmp_path) if isinstance(s, Pair)}
    assert found == {
        "a.b.png": "of a.b",
        "\u00fc \U0001f600.JPG": "of \u00fc \U0001f600",
        "x.tar.gz.png": "of x.tar.gz",
        "trailing..png": "of trailing.",
    }
