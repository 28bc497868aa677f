"""Text that others wrote, on one line and harmless: a terminal obeys control characters, wherever they come from."""

_CONTROLS = {code: " " if chr(code).isspace() else None for code in (*range(0x20), *range(0x7F, 0xA0))}


def printable(text: str) -> str:
    """`text` without the control characters of C0 and C1; those that are white space become spaces."""
    return text.translate(_CONTROLS)


def one_line(text: str) -> str:
    """`printable` text with single spaces between its words: how captions are kept."""
    return " ".join(printable(text).split())


def writable(text: str) -> str:
    """`text` as UTF-8 can hold it: Python's lone surrogates, for the bytes of a name that are not UTF-8, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def escaped_json(document: str) -> str:
    """A JSON document in which DEL and C1 are written as escapes, too, as JSON has it for C0 alone."""
    return document.translate({code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)})
