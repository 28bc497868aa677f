"""The writer's lock: what another process has is waited for, what the file system lacks is told."""

import errno
from pathlib import Path

import pytest

from index.errors import KnowledgeBaseError
from index.lock import try_lock, writer_lock


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_no_other_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    for wait in (0, 30):  # nothing is waited for
        with (
            pytest.raises(KnowledgeBaseError, match=r"lacks locks \(No locks available\)"),
            writer_lock(tmp_path, wait=wait),
        ):
            pytest.fail("it was not locked")
    with open(tmp_path / "part.lock", "w") as file, pytest.raises(KnowledgeBaseError, match="lacks locks"):
        try_lock(file)


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EACCES])
def test_what_another_has_is_told_with_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    with writer_lock(tmp_path):
        pass

    def refuse(*_: object) -> None:
        raise OSError(code, "busy")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(KnowledgeBaseError, match=r"being written by process \d+"), writer_lock(tmp_path):
        pytest.fail("it was not locked")
    with open(tmp_path / "part.lock", "w") as file:
        assert not try_lock(file)
