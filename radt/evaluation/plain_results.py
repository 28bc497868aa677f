"""Results that were stored before there was one form for all of them, read into it: of emoji-draw and bench_quality.

Such a file keeps neither its command nor its date, so these are put together from its settings and the file's own time.
"""

import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeAlias

from radt.evaluation.intervals import wilson
from radt.evaluation.results import SUFFIX, Cell, Estimate, Line, Picture, Plot, Result, Table

EMOJI_DRAW, EMOJI_DRAW_TITLE = "emoji-draw", "Held-out emoji, one prompt each"
JUDGES = {"trained": "the trained recogniser", "pixels": "pixel distance, without the trained recogniser"}
ARMS = {"with_retrieval": "with retrieval", "without_retrieval": "without", "with_one_wrong": "one neighbour wrong"}
SHARES = {"entity_top1": "entity top-1", "entity_top5": "top-5", "ground_color": "ground colour"}
Reader: TypeAlias = Callable[[Path, dict[str, Any]], Result | None]
NOTE = "Stored without its command, which is put together here from its settings."


def find_plain_results(folders: Iterable[Path]) -> Iterator[tuple[Path, Result]]:
    """Those below the folders, but where the same folder has them in the newer form, too; each once."""
    seen = set[Path]()
    for folder in folders:
        for name, read in READERS.items():
            for path in sorted(folder.rglob(name)):
                result = None if path.resolve() in seen else _read(path, read)
                seen.add(path.resolve())
                if result is not None and not (path.parent / f"{result.kind}{SUFFIX}").exists():
                    yield path.parent, result


def _read(path: Path, read: Reader) -> Result | None:
    """None for another program's file of the same name."""
    try:
        return read(path, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _emoji_draw(path: Path, values: dict[str, Any]) -> Result | None:
    if not {*ARMS, "recognizer_ceiling", "settings"} <= values.keys():
        return None
    command = ["--kb", values["kb"]["path"], "-n", str(values["n"]), "--seed", str(values["settings"]["seed"])]
    return Result(
        kind=EMOJI_DRAW,
        title=EMOJI_DRAW_TITLE,
        command=shlex.join(["radt", "evaluate", "emoji-draw", *command]),
        date=date_of(path),
        note=NOTE,
        facts=emoji_draw_facts(values),
        tables=(emoji_draw_table(values),),
        pictures=tuple(Picture(file=each.name, title=each.stem) for each in sorted(path.parent.glob("sheet*.png"))),
        data=values,
    )


def emoji_draw_facts(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a document of emoji-draw in its short form was measured with, and who judged, where it says so."""
    model, settings, judge = values["model"], values["settings"], values.get("recognizer", {}).get("judge")
    facts = {"model": model["name"], "digest": model["digest"], "side": model["image_size"], "n": values["n"]}
    return {**facts, "k": settings["k"], **({} if judge is None else {"judge": JUDGES.get(judge, judge)})}


def emoji_draw_table(values: Mapping[str, Any]) -> Table:
    """The shares of a document of emoji-draw in its short form, by what is shown."""
    n, found, ceiling = values["n"], values["retrieval"], values["recognizer_ceiling"]
    rows: list[tuple[Cell, ...]] = [
        (title, *(share(values[arm][key], n) for key in SHARES), values[arm]["copy_similarity"])
        for arm, title in ARMS.items()
    ]
    rows.append(("the true scenes", *(ceiling[key] for key in SHARES), None))
    return Table(
        title="By what is shown",
        columns=("", *SHARES.values(), "copy similarity"),
        rows=tuple(rows),
        note=(
            f"retrieval by {values['settings']['by']}: recall {found['recall_at_k']:.2f}, "
            f"all right {found['all_right']:.2f}"
        ),
    )


def _quality(path: Path, values: dict[str, Any]) -> Result | None:
    facts, points = values["facts"], values["points"]
    judge = JUDGES[facts.get("recognizer", {"judge": "pixels"})["judge"]]  # earlier versions knew no other
    labels = sorted({point["label"] for point in points})
    rows = [
        (p["label"], p["steps"], p["calls"], p["rows"], share(p["top1"], facts["n"]), p["discrepancy"], p["seconds"])
        for p in sorted(points, key=lambda point: (point["label"], point["calls"]))
    ]
    columns = ("sampler", "steps", "calls", "rows", "entity top-1", "MMD2 x 1000", "s a picture")
    return Result(
        kind="quality",
        title="Quality against network calls",
        command=f"python tools/bench_quality.py --kb KB --out {path.parent.name} -n {facts['n']}",
        date=date_of(path),
        note=NOTE,
        facts={"model": facts["model"], "n": facts["n"], "seed": facts["seed"], "judge": judge},
        tables=(Table(title="By sampler and steps", columns=columns, rows=tuple(rows)),),
        plots=(
            _plot(points, labels, value="top1", y="entity top-1", n=facts["n"]),
            _plot(points, labels, value="discrepancy", y="MMD2 x 1000, less is better"),
        ),
        data=values,
    )


READERS: dict[str, Reader] = {"results.json": _emoji_draw, "quality.json": _quality}


def _plot(
    points: Sequence[Mapping[str, Any]], labels: Sequence[str], *, value: str, y: str, n: int | None = None
) -> Plot:
    lines = []
    for label in labels:
        own = sorted((point for point in points if point["label"] == label), key=lambda point: point["calls"])
        bounds = [wilson(point[value], n) for point in own] if n else []
        lines.append(
            Line(
                name=label,
                x=tuple(point["calls"] for point in own),
                y=tuple(point[value] for point in own),
                low=tuple(low for low, _ in bounds),
                high=tuple(high for _, high in bounds),
            )
        )
    return Plot(title=f"{y} over network calls", x="network calls a picture", y=y, lines=tuple(lines), log_x=True)


def share(value: float, n: int) -> Estimate:
    """A share of n trials with its 95 % interval."""
    low, high = wilson(value, n)
    return Estimate(value=value, low=low, high=high)


def date_of(path: Path) -> str:
    """When a file was written, in UTC."""
    return datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).isoformat(timespec="seconds")
