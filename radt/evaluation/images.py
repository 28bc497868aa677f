"""`radt evaluate images`: every measure of a set of pictures, over any extractors, with N and an interval each.

Reads `image_set.py` for the features and `image_measures.py` for each measure; `images_report.py` shows what comes of
it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from index.errors import ConfigError, QueryError
from index.text import writable
from radt.evaluation.extractors import Extractor
from radt.evaluation.image_measures import (
    BY_NAME,
    MEASURES,
    OF_TWO_SETS,
    NotMeasurableError,
    Options,
    Row,
    Sets,
    refuse_early,
)
from radt.evaluation.image_set import LeftOut, MeasuredSet, OnStep, PictureFile, measure_set


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractorFacts:
    """Which extractor it was."""

    name: str
    kind: str
    side: int
    resize: str
    width: int
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagesReport:
    """Everything measured. `skipped` says of a measure why it was not."""

    source: str
    real: str | None
    n: int
    n_real: int | None
    left_out: tuple[LeftOut, ...]
    left_out_real: tuple[LeftOut, ...]
    extractors: tuple[ExtractorFacts, ...]
    rows: tuple[Row, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0

    def facts_of(self, row: Row) -> ExtractorFacts | None:
        """The extractor of a score."""
        return next((each for each in self.extractors if each.name == row.extractor), None)

    def to_json(self) -> dict[str, Any]:
        """All of it; every score by itself says what it rests on."""
        return {
            "pictures": self.source,
            "real": self.real,
            "n": self.n,
            "n_real": self.n_real,
            "left_out": [{"name": each.name, "reason": each.reason} for each in self.left_out],
            "left_out_real": [{"name": each.name, "reason": each.reason} for each in self.left_out_real],
            "scores": [self._row_json(row) for row in self.rows],
            "not_measured": dict(self.skipped),
            "seed": self.seed,
        }

    def _row_json(self, row: Row) -> dict[str, Any]:
        facts, score = self.facts_of(row), row.score
        return {
            "measure": row.measure,
            "title": f"{row.title} ({row.extractor})" if row.measure in OF_TWO_SETS else row.title,
            "value": score.value,
            "interval": None if score.low is None else [score.low, score.high],
            "interval_by": score.method,
            "at_half_n": score.at_half,
            "n": row.n,
            "n_interval": score.n,
            "n_real": row.n_real,
            "extractor": facts and facts.name,
            "extractor_digest": facts and facts.digest,
            "features": facts and facts.width,
            "resize": facts and facts.resize,
            "notes": list(row.notes),
        }


def measure_images(
    pictures: Sequence[PictureFile],
    extractors: Sequence[Extractor],
    *,
    reals: Sequence[PictureFile] | None = None,
    options: Options | None = None,
    cache: Path | None = None,
    source: str = "",
    real: str | None = None,
    on_step: OnStep = lambda done, total: None,
) -> ImagesReport:
    """Measure a set, beside `reals` where they are given. `cache` keeps features, so that a later run goes on.

    QueryError for a measure that was named and cannot be taken, and as from `measure_set`.
    """
    options = options or Options()
    if not extractors:
        raise ConfigError("nothing can be measured without an extractor: name one with --extractor")
    refuse_early(options, pictures, reals, extractors)
    measures = [measure for measure in MEASURES if options.wants(measure)]
    work = len(extractors) * (len(pictures) + len(reals or ()))
    steps = _part(on_step, 0, work + len(measures))  # a measure counts as one picture
    sets = _extract(pictures, reals, extractors, options=options, cache=cache, on_step=steps)
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    for done, measure in enumerate(measures, start=work + 1):
        _take(measure, sets, rows=rows, skipped=skipped)
        steps(done, 0)
    if not rows:
        reasons = "; ".join(dict.fromkeys(skipped.values()))
        raise QueryError(f"nothing can be measured of these pictures: {reasons}")
    first = sets[0]
    return ImagesReport(
        source=writable(source),
        real=None if real is None else writable(real),
        n=len(first.pictures.pictures),
        n_real=None if first.reals is None else len(first.reals.pictures),
        left_out=first.pictures.left_out,
        left_out_real=() if first.reals is None else first.reals.left_out,
        extractors=tuple(facts_of(each.extractor) for each in sets),
        rows=tuple(rows),
        skipped=skipped,
        seed=options.seed,
    )


def facts_of(extractor: Extractor) -> ExtractorFacts:
    """What is said of an extractor beside its scores."""
    return ExtractorFacts(
        name=extractor.name,
        kind=extractor.kind,
        side=extractor.side,
        resize=extractor.resize,
        width=extractor.width,
        digest=extractor.digest,
    )


def _extract(
    pictures: Sequence[PictureFile],
    reals: Sequence[PictureFile] | None,
    extractors: Sequence[Extractor],
    *,
    options: Options,
    cache: Path | None,
    on_step: OnStep,
) -> list[Sets]:
    sets, before = [], 0
    for extractor in extractors:
        both: list[MeasuredSet] = []
        for some in (pictures, *([reals] if reals is not None else [])):
            both.append(measure_set(some, extractor, cache=cache, on_step=_part(on_step, before, 0)))
            before += len(some)
        sets.append(Sets(extractor=extractor, pictures=both[0], reals=[*both, None][1], options=options, cache=cache))
    return sets


def _part(on_step: OnStep, before: int, total: int) -> OnStep:
    return lambda done, of: on_step(before + done, total)


def _take(measure: str, sets: Sequence[Sets], *, rows: list[Row], skipped: dict[str, str]) -> None:
    """One measure by every extractor that can; the reason of the first that cannot counts where none can."""
    takers = sets[:1] if measure == "copies" else sets
    outcomes = [_attempt(measure, each) for each in takers]
    found = [row for outcome in outcomes if not isinstance(outcome, str) for row in outcome]
    if found:
        rows += found
        return
    reason = next(outcome for outcome in outcomes if isinstance(outcome, str))
    if sets[0].options.asks_for(measure):
        raise QueryError(f"{measure} cannot be measured: {reason}")
    skipped[measure] = reason


def _attempt(measure: str, sets: Sets) -> list[Row] | str:
    """Its rows, or why there are none."""
    try:
        return BY_NAME[measure](measure, sets)
    except NotMeasurableError as reason:
        return str(reason)
