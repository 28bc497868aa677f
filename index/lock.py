"""The lock of a knowledge base: one writer at a time. The operating system drops it when the process dies."""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from index.atomic import one_sentence
from index.errors import KnowledgeBaseError

LOCK = "writer.lock"
TAKEN = {errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK, errno.EDEADLK}  # the last is what Windows says
POLL_SECONDS = 0.2


@contextmanager
def writer_lock(
    directory: Path, *, wait: float = 0, on_wait: Callable[[str], None] = lambda owner: None
) -> Iterator[IO[str]]:
    """Hold the lock of this folder; wait up to `wait` seconds for it, after telling `on_wait` who has it.

    KnowledgeBaseError when another process still has it then, and when the file system knows no locks.
    """
    with one_sentence(directory):
        file = open(directory / LOCK, "a+", encoding="ascii")  # noqa: SIM115 - closed below
    with file:
        _wait_for(file, directory, wait=wait, on_wait=on_wait)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file


def _wait_for(file: IO[str], directory: Path, *, wait: float, on_wait: Callable[[str], None]) -> None:
    deadline = time.monotonic() + wait
    told = ""
    while True:
        try:
            return _lock(file)
        except OSError as error:
            if error.errno not in TAKEN:
                raise _no_locks(directory, error) from error
            file.seek(0)
            owner = file.read().strip() or "unknown"
            if time.monotonic() >= deadline:
                raise KnowledgeBaseError(
                    f"{directory} is being written by process {owner}; run the command again when it has ended, or "
                    "let it wait with --wait SECONDS"
                ) from error
            if owner != told:
                on_wait(f"{directory} is being written by process {owner}; waiting for it up to {wait:.0f} s")
                told = owner
        time.sleep(min(POLL_SECONDS, wait))


def _lock(file: IO[str]) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def try_lock(file: IO[str]) -> bool:
    """Take the advisory lock of an open file, unless another process has it. KnowledgeBaseError as `writer_lock`."""
    try:
        _lock(file)
    except OSError as error:
        if error.errno not in TAKEN:
            raise _no_locks(Path(file.name).parent, error) from error
        return False
    return True


def _no_locks(directory: Path, error: OSError) -> KnowledgeBaseError:
    """Lustre without `flock`, and some NFS."""
    return KnowledgeBaseError(
        f"the file system of {directory} lacks locks ({error.strerror or error}), which keep two writers apart; build "
        "the knowledge base on another disk, and copy it here to be read"
    )
