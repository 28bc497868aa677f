"""Results as they are stored: one form for whatever was measured, so that `radt report` shows it without knowing it.

A benchmark builds a `Result` of tables, plots and pictures and saves it beside its other files:

    Result(
        kind="emoji-draw",                      # names the benchmark; a folder holds one result of a kind
        title="EmojiDrawBench",
        command=typed_command(),                # what was typed; a script names itself
        facts={"model": "emoji-demo", "n": 100},
        tables=(Table(title="By arm", columns=("", "top1"), rows=(("with", Estimate(value=0.8, low=0.7, high=0.9)),)),),
        plots=(Plot(title="Dial", x="eta", y="share", lines=(Line(name="entity", x=(0, 1), y=(0.8, 0.4)),)),),
        pictures=(Picture(file="sheet-1.png", title="The first twenty"),),  # lies in the folder
        data=report.to_json(),                  # everything measured, for other programs
    ).save(folder)                              # writes folder/emoji-draw.result.json

`find_results` reads all of them below some folders. Cells are text, numbers, estimates or None, which shows as a dash.
"""

import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeAlias

from index.atomic import write_bytes
from index.config import from_dict, to_dict
from index.errors import ConfigError, CorpusError
from index.text import writable

FORMAT = 1
SUFFIX = ".result.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A measured number and its 95 % interval."""

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise ConfigError(f"an estimate lies in its interval, got {self.value} in [{self.low}, {self.high}]")


Cell: TypeAlias = str | int | float | Estimate | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Figures in rows. The first column names a row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ConfigError(f"table {self.title!r} has {len(self.columns)} columns and a row of {len(row)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Points joined in the order given, their 95 % bounds with them where they are known."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        lengths = {len(self.x), len(self.y), len(self.low or self.y), len(self.high or self.y)}
        if len(lengths) != 1 or bool(self.low) != bool(self.high):
            raise ConfigError(f"line {self.name!r} needs as many x as y, and both bounds of each or none")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """Lines over one pair of axes. A logarithmic axis shows what is above 0."""

    title: str
    x: str
    y: str
    lines: tuple[Line, ...]
    log_x: bool = False
    log_y: bool = False
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A PNG or JPEG, named relative to the folder of its result."""

    file: str
    title: str

    def __post_init__(self) -> None:
        if Path(self.file).is_absolute() or ".." in Path(self.file).parts:
            raise ConfigError(f"a picture of a result lies in the result's own folder, got {self.file!r}")


def now() -> str:
    """The date and time in UTC, to the second, as ISO 8601 writes it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def typed_command() -> str:
    """The command line that this process was started with, as one types it; names that are not UTF-8 with escapes."""
    name = Path(sys.argv[0]).name
    program = "radt" if name in ("radt", "cli.py", "__main__.py") else f"python {sys.argv[0]}"
    return writable(shlex.join([*program.split(" ", 1), *sys.argv[1:]]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What one command measured."""

    kind: str
    title: str
    command: str
    date: str = field(default_factory=now)
    note: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    pictures: tuple[Picture, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        """Write it whole into `folder`, over one of the same kind. NaN, which JSON has no word for, is a ValueError."""
        path = folder / f"{self.kind}{SUFFIX}"
        document = {"format": FORMAT, **to_dict(self)}
        write_bytes(path, (json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False) + "\n").encode())
        return path

    @staticmethod
    def load(path: Path) -> "Result":
        """Read one. A file that is none is a CorpusError."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("format") != FORMAT:
                raise ConfigError(f"its format is not {FORMAT}")
            return from_dict(Result, values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorpusError(f"{path} is no stored result ({error}); measure again to write it anew") from error


def find_results(folders: Iterable[Path]) -> Iterator[tuple[Path, Result]]:
    """Every stored result below the folders, with the folder it lies in, each once, in the order of their paths."""
    seen = set[Path]()
    for folder in folders:
        if not folder.is_dir():
            raise CorpusError(f"there is no folder {str(folder)!r}: name one that a benchmark wrote with --out")
        for path in sorted(folder.rglob(f"*{SUFFIX}")):
            if path.resolve() not in seen:
                seen.add(path.resolve())
                yield path.parent, Result.load(path)
