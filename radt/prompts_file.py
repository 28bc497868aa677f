"""Many prompts from a file: text with one a line, or JSON lines with settings of their own."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from index.errors import QueryError

JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt and what is asked for it alone; None and names that `settings` lacks are as for all. `source`: where."""

    text: str
    seed: int | None = None
    n: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """The prompts of a file in their order; empty lines are passed over.

    A line of a `.jsonl` file is an object: `prompt`, perhaps `seed` and `n`, and any fields of GenerateSettings. Any
    other file is text, one prompt a line. A QueryError names the line that cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise QueryError(f"cannot read the prompts in {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise QueryError(f"{str(path)!r} is not text in UTF-8, as a file of prompts is") from error
    prompts = tuple(_parse(lines, path))
    if not prompts:
        raise QueryError(f"there is no prompt in {str(path)!r}: write one a line")
    return prompts


def _parse(lines: list[str], path: Path) -> Iterator[Prompt]:
    for number, line in enumerate(lines, start=1):
        source = f"line {number} of {str(path)!r}"
        if not line.strip():
            continue
        if path.suffix.lower() in JSON_LINES:
            yield _from_json(line, source)
        else:
            yield Prompt(text=line.strip(), source=source)


def _from_json(line: str, source: str) -> Prompt:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise QueryError(f"{source} is not JSON ({error})") from error
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise QueryError(f'{source} should be an object with a text "prompt", such as {{"prompt": "a wolf"}}')
    settings = {name: value for name, value in values.items() if name not in ("prompt", "seed", "n")}
    for name in ("seed", "n"):
        if name in values and type(values[name]) is not int:  # True is an int, too
            raise QueryError(f"{source}: {name} is a whole number, got {values[name]!r}")
    return Prompt(text=values["prompt"], seed=values.get("seed"), n=values.get("n"), settings=settings, source=source)
