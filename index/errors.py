"""The errors a user can fix, for both packages. The message says what, the value, and what to do."""

from pathlib import Path


class UserError(Exception):
    """Anything the user can mend. The command line prints it as one sentence and exits 1."""


class CorpusError(UserError):
    """The image-text pairs on disk cannot be read as they stand."""


class ImageError(CorpusError, OSError):
    """An image cannot be read where it lies."""


class KnowledgeBaseError(UserError):
    """The knowledge base is missing, empty, locked, or was made by another model."""


class QueryError(UserError):
    """A query cannot be answered as asked."""


class ModelError(UserError):
    """A model name, folder or checkpoint cannot be used."""


class ConfigError(UserError, ValueError):
    """A configuration field has an impossible value or an unknown name."""


class MissingExtraError(UserError, ImportError):
    """An optional package is needed. The message carries the pip line that brings it."""


def damage(error: BaseException) -> str | None:
    """What is wrong with a file of the table, in a line, when that is what the error says: Lance has no type for it."""
    line = str(error).partition("\n")[0].partition(", /")[0]
    is_damage = "/rust" in str(error) and any(sign in line for sign in _DAMAGE)  # where in its source it was noticed
    return line.removeprefix("External error: ").removeprefix("LanceError(IO): ") if is_damage else None


def was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: while Arrow waits for Lance, it becomes an error of theirs."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt) or "External error: KeyboardInterrupt" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def check_filter(where: str) -> None:
    """An empty filter is a variable that was not set, not every pair: nobody means to take all of them down."""
    if not where.strip():
        raise QueryError("the filter is empty; write a condition, such as width >= 256, or leave the filter out")


_DAMAGE = ("Not found: ", "not appear to be a Lance file", "fill whole buffer", "Invalid range", "External error: ")


class DiskError(UserError, OSError):
    """A file or folder could not be written. `errno` and `strerror` are those of its cause."""

    def __init__(self, path: Path, cause: OSError) -> None:
        reason = cause.strerror or str(cause)
        self.sentence = f"could not write {str(path)!r} ({reason}): make room, or choose another place"
        super().__init__(self.sentence)
        self.errno, self.strerror = cause.errno, cause.strerror

    def __str__(self) -> str:  # OSError would say errno and strerror alone
        return self.sentence
