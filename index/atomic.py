"""Writing so that a reader sees the old file or the whole new one, never half of it; a full disk is one sentence."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from index.errors import DiskError, KnowledgeBaseError, damage


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """The name of a temporary file beside `path`: flushed and renamed to it when the block ends well, else removed.

    The block creates the file, so that an interrupt finds it already ours to remove. The folder is made where it is
    missing. DiskError when it cannot be written.
    """
    with _as_disk_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _beside(path, "new")
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file, or leave the old one."""
    with new_file(path) as partial:
        partial.write_bytes(data)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` when the block ends well, and vanishes when it does not.

    A folder cannot replace a full one in one step: for a moment between two renames there is none.
    """
    with _as_disk_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder, old = _beside(path, "new"), _beside(path, "old")
        try:
            folder.mkdir()
            yield folder
            if path.exists():
                os.rename(path, old)
            os.rename(folder, path)
        finally:
            if old.exists() and not path.exists():  # stopped between the two
                os.rename(old, path)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def one_sentence(directory: Path) -> Iterator[None]:
    """A full or refusing disk becomes one sentence; a commit that failed has left the table as it was."""
    try:
        yield
    except OSError as error:
        text = str(error)
        if damage(error):
            raise  # not a matter of writing
        is_full = "os error 28" in text or error.errno == 28
        why = "no space is left on the disk" if is_full else (text.strip().splitlines() or [type(error).__name__])[0]
        raise KnowledgeBaseError(
            f"cannot write to {directory}: {why}; what was there before is unharmed, so mend that and run it again"
        ) from error


def _beside(path: Path, role: str) -> Path:
    """A hidden name in the same folder that nobody else has."""
    return path.with_name(f".{path.name}.{role}-{secrets.token_hex(4)}")


@contextmanager
def _as_disk_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(path, error) from error
