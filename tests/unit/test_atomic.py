import shutil
import sys
import tempfile

import pytest

from index.atomic import new_file, new_folder, one_sentence, write_bytes
from index.errors import DiskError, KnowledgeBaseError


def interrupted_at(step, run):
    """Run, with a Ctrl-C at the given line of Python; whether it came before the end."""
    seen = 0

    def trace(frame, event, argument):
        nonlocal seen
        if frame.f_code.co_filename in (write_bytes.__code__.co_filename, tempfile.__file__) and event == "line":
            seen += 1
            if seen == step:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def write_folder(path, text):
    with new_folder(path) as folder:
        (folder / "a.txt").write_text(text)


def test_an_interrupt_at_any_line_leaves_the_old_file_or_the_new_one_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    step = 1
    while interrupted_at(step, lambda: write_bytes(path, b"new")):
        assert [path] == list(tmp_path.iterdir()), step
        assert path.read_bytes() in (b"old", b"new")
        path.write_bytes(b"old")
        step += 1
    assert path.read_bytes() == b"new"
    assert step > 8


def test_an_interrupt_at_any_line_leaves_no_part_of_a_new_folder(tmp_path):
    path = tmp_path / "a"
    step = 1
    while interrupted_at(step, lambda: write_folder(path, "new")):
        assert [p for p in tmp_path.iterdir() if p != path] == [], step
        shutil.rmtree(path, ignore_errors=True)
        step += 1
    assert (path / "a.txt").read_text() == "new"
    assert step > 8


def test_an_interrupt_at_any_line_leaves_the_old_folder_or_the_new_one(tmp_path):
    step, path = 1, tmp_path / "a"
    write_folder(path, "old")
    while interrupted_at(step, lambda: write_folder(path, "new")):
        assert (path / "a.txt").read_text() in ("old", "new"), step
        write_folder(path, "old")
        step += 1
    assert step > 8


def test_a_folder_takes_the_place_of_the_old_one(tmp_path):
    write_folder(tmp_path / "a", "old")
    write_folder(tmp_path / "a", "new")
    assert (tmp_path / "a" / "a.txt").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_block_that_fails_leaves_the_old_file(tmp_path):
    write_bytes(tmp_path / "a", b"old")

    def fail_halfway():
        with new_file(tmp_path / "a") as partial:
            partial.write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="file"):
        write_bytes(tmp_path / "file" / "below", b"")


@pytest.mark.parametrize("error", [OSError(), OSError("\n"), PermissionError()])
def test_a_failure_without_words_is_one_sentence_too(tmp_path, error):
    with (
        pytest.raises(KnowledgeBaseError, match=f"cannot write to .*: {type(error).__name__};"),
        one_sentence(tmp_path),
    ):
        raise error
