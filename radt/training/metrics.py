"""`metrics.jsonl`: one line of numbers for every logged step, each step once however often a run was killed."""

import json
from collections.abc import Mapping
from pathlib import Path

from index.atomic import write_bytes


def append_metrics(path: Path, metrics: Mapping[str, float]) -> None:
    """Add one line. The folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps that were lost with the process that made them."""
    if path.exists():
        # A killed process may have left half a line, which is of a lost step too.
        whole = [line for line in path.read_text(encoding="utf-8").split("\n")[:-1] if json.loads(line)["step"] <= step]
        write_bytes(path, "".join(f"{line}\n" for line in whole).encode())
