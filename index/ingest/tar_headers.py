"""The headers of a tar, read in one pass, with a way on after a damaged place.

`tarfile` stops at the first damaged header, and its members are slow to make; here a reader loses what is damaged and
no more. Format: POSIX.1-1988 (ustar), POSIX.1-2001 (pax) and GNU tar's long names and large sizes.
"""

import io
from collections.abc import Iterator
from typing import Any, NamedTuple

BLOCK = 512
MAX_NAME_BYTES = 1 << 16  # of an extended header; a file name has no use for more
SCAN_BYTES, MOST_SCAN_BYTES = 1 << 12, 1 << 20
MAGIC, MAGIC_AT = b"ustar", 257
REGULAR = (b"0", b"\0", b"7")
LONG_NAME, PAX = b"L", (b"x", b"X")
REASON = "the tar is damaged or cut short here"


class Member(NamedTuple):
    """A regular file in a tar. The file object stands at its content when this is yielded."""

    name: str
    offset: int
    size: int


class Damage(NamedTuple):
    """A place that is not what a tar should have there, and the file that should be, if that is known."""

    offset: int
    name: str = ""


class _Header(NamedTuple):
    kind: bytes
    name: bytes
    size: int


def tar_members(file: Any) -> Iterator[Member | Damage]:
    """Every regular file in stored order. After a Damage it goes on at the next whole header, if there is one."""
    end = file.seek(0, io.SEEK_END)
    position = last = reread = 0
    extended: dict[str, Any] = {}  # what an extended header says of the file that follows
    while True:
        file.seek(position)
        header = _parse_header(file.read(BLOCK))
        start = position + BLOCK
        size = extended.get("size", header.size) if header else 0
        if header is None or start + size > end:
            here = start if header else position
            found, is_blank = _next_header(file, here)
            if found is None and is_blank and header is None and start <= end:
                return
            yield Damage(here, _name(header, extended) if header else "")
            if header is None and reread + position - last <= end:  # if the last file lost bytes, the next is within it
                reread += position - last
                found = _next_header(file, last)[0]
            if found is None:
                return
            position, extended = found, {}
            continue
        last = start
        position = start + -(-size // BLOCK) * BLOCK
        if header.kind in PAX or header.kind == LONG_NAME:
            if size <= MAX_NAME_BYTES:
                extended |= _extended(header.kind, file.read(size))
            continue
        if header.kind in REGULAR:
            yield Member(_name(header, extended), start, size)
        extended = {}


def _parse_header(block: bytes) -> _Header | None:
    """None for what is not a header: the sum of its bytes must be the sum that it carries."""
    try:
        stored, size = _number(block[148:156]), _number(block[124:136])
    except ValueError:
        return None
    total = sum(block.replace(b"\0", b"")) - sum(block[148:156]) + 8 * ord(" ")
    if len(block) < BLOCK or total != stored or size < 0:
        return None
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return _Header(block[156:157], prefix + b"/" + name if prefix else name, size)


def _name(header: _Header, extended: dict[str, Any]) -> str:
    name: bytes = extended.get("name", header.name)
    return name.decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    """Octal digits, or GNU tar's base 256 when the first bit is set."""
    if field[:1] in (b"\x80", b"\xff"):
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _extended(kind: bytes, content: bytes) -> dict[str, Any]:
    if kind == LONG_NAME:
        name = content.partition(b"\0")[0]
        return {"name": name} if name else {}
    found: dict[str, Any] = {}
    while content:
        digits, _, rest = content.partition(b" ")  # a record is b"12 path=name\n", its own length first
        length = int(digits) if digits.isdigit() and len(digits) < 9 else 0
        if not len(digits) + 2 < length <= len(content):
            break
        name, _, value = rest[: length - len(digits) - 2].partition(b"=")
        if name == b"path":
            found["name"] = value
        elif name == b"size" and value.isdigit():
            found["size"] = int(value[:19])
        content = content[length:]
    return found


def _next_header(file: Any, start: int) -> tuple[int | None, bool]:
    """(where the next whole header is, or None; whether there are only zeros before it)."""
    window, window_at, is_blank, count = b"", start, True, SCAN_BYTES
    file.seek(start)
    while more := file.read(count):
        count = min(2 * count, MOST_SCAN_BYTES)
        window += more
        at = window.find(MAGIC, MAGIC_AT)
        while at >= 0 and at - MAGIC_AT + BLOCK <= len(window):
            header = at - MAGIC_AT
            if _parse_header(window[header : header + BLOCK]):
                return window_at + header, is_blank and not any(window[:header])
            at = window.find(MAGIC, at + 1)
        keep = max(len(window) - BLOCK, 0)
        is_blank = is_blank and not any(window[:keep])
        window, window_at = window[keep:], window_at + keep
    return None, is_blank and not any(window)
