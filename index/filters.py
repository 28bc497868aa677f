"""SQL filters as users write them: which fields they may name, and one sentence for one that cannot be obeyed."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from index.errors import QueryError, check_filter, damage

PAIR_FIELDS = (
    *("id", "dataset", "source", "shard", "key", "caption", "image_uri", "image_offset", "image_size"),
    *("image_sha256", "width", "height", "metadata"),
)
BAD_FIELDS = ("dataset", "source", "shard", "key", "image_offset", "reason")  # of a sample in quarantine
_LISTED = 20  # datasets that an error names at most

_UNKNOWN = re.compile(r"No field named \"?(.+?)\"?\.(?:\s|$)")
_SYNTAX = re.compile(r"sql parser error: Expected: (.+), found: (.+?)\)*$")
_KIND = re.compile(r"Received literal \w+\((.*)\) and could not convert to literal of type '(\w+)'")
_PREFIX = re.compile(r"^(?:Invalid user input: |Error parsing [a-z]+: |Error during planning: )+")
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|`[^`]*`")
_COMMENTS = ("--", "/*")
_MISTAKES = ("Invalid user input", "Cannot access field")


@contextmanager
def filter_errors(where: str | None, *, fields: Sequence[str] = PAIR_FIELDS) -> Iterator[None]:
    """Lance reports a filter it cannot read as a ValueError or an OSError; to a user it is a mistake in the query."""
    if where is not None:
        check_filter(where)
        _check_shape(where)
    try:
        yield
    except (ValueError, OSError) as error:
        is_mistake = not isinstance(error, OSError) or any(sign in str(error) for sign in _MISTAKES)
        if where is None or not is_mistake or damage(error):
            raise
        raise QueryError(f"cannot filter by {where!r}: {_reason(where, str(error), fields)}") from error


def unknown_datasets(names: Sequence[str], there: Mapping[str, int]) -> str | None:
    """A sentence that names the datasets there are, when some of `names` is none of them."""
    unknown = [name for name in names if name not in there]
    if not unknown:
        return None
    near = difflib.get_close_matches(unknown[0], there, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"there is no dataset {unknown[0]!r}{hint}; {listed_datasets(there)}"


def listed_datasets(there: Mapping[str, int]) -> str:
    """`the datasets here are pets (30 pairs), wild (1,200)`."""
    if not there:
        return "the knowledge base is empty"
    counts = [f"{name} ({pairs:,}{' pairs' if i == 0 else ''})" for i, (name, pairs) in enumerate(there.items())]
    return f"the datasets here are {', '.join(counts[:_LISTED])}" + (", ..." if len(counts) > _LISTED else "")


def _reason(where: str, error: str, fields: Sequence[str]) -> str:
    """What is wrong, without what only Lance knows; and how it is written, where that is the usual mistake."""
    line = error.splitlines()[0].partition(", /")[0]
    if unknown := _UNKNOWN.search(line):
        return _unknown_field(where, unknown[1], fields)
    if syntax := _SYNTAX.search(line):
        is_end = syntax[2] == "EOF" or (syntax[2] == ")" and ")" not in where)  # the parenthesis is ours
        return f"it does not read as SQL: {syntax[1]} was expected before {'its end' if is_end else syntax[2]}"
    if "Unterminated string" in line:
        return "a quote is not closed; a quote within text is written twice: 'it''s'"
    if kind := _KIND.search(line):
        held = "text" if kind[2] == "Utf8" else "numbers"
        return f"{kind[1]} is compared with a field of {held}"
    if "Cannot access field" in line:
        return "metadata is JSON text and has no fields; look into it with metadata LIKE '%...%'"
    if "boolean" in line:
        return "it is no condition; write a comparison, such as width >= 256"
    return _PREFIX.sub("", line)


def _check_shape(where: str) -> None:
    """Lance stops reading at a parenthesis too many, and the filter would not be the one that was written.

    One in a comment would count here and not there, so there are no comments.
    """
    bare = _QUOTED.sub("''", where)
    comment = next((mark for mark in _COMMENTS if mark in bare), None)
    if comment is not None:
        raise QueryError(f"cannot filter by {where!r}: it has a comment ({comment}); leave that out")
    depth = 0
    for letter in bare:
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            break
    if depth:
        raise QueryError(f"cannot filter by {where!r}: its parentheses do not match")


def _unknown_field(where: str, name: str, fields: Sequence[str]) -> str:
    if re.search(rf"(?:[=<>]|\blike|\bin\s*\(|,)\s*[\"`]?{re.escape(name)}\b", where, re.IGNORECASE):
        return f"{name!r} reads as the name of a field; text is put in single quotes: '{name}'"
    near = difflib.get_close_matches(name, fields, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"there is no field {name!r}{hint}; the fields are {', '.join(fields)}"
