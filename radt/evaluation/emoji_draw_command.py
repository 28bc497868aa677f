"""What `radt evaluate emoji-draw` does with what was typed: the short form, kinds of prompts, or a sweep."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from index.errors import QueryError
from radt.evaluation.commands import Progress
from radt.pipeline import TextToImage
from radt.settings import GenerateSettings

SweepOption = Literal["k", "text-share", "by", "neighbors"]
SWEPT = {"k": "k", "text-share": "text_share", "by": "by"}  # the setting that a sweep changes


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What to draw. Without kinds, sweep and new entity it is the short form: one prompt a class, in three arms."""

    n: int
    seed: int
    kinds: str | None = None
    sweep: SweepOption | None = None
    new_entity: bool = False
    recognizer: Path | None = None
    font: Path | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.sweep is not None and self.new_entity:
            raise QueryError("--sweep and --new-entity are two measurements: ask for one of them")

    @property
    def is_short(self) -> bool:
        """Whether it is the short form."""
        return self.kinds is None and self.sweep is None and not self.new_entity


def measure(
    asked: Asked, model: TextToImage, given: Mapping[str, Any], *, progress: Progress, as_json: bool
) -> dict[str, Any]:
    """Measure, write what is kept, print the tables unless JSON is wanted, and return the document."""
    from radt.evaluation import emoji_draw

    swept = SWEPT.get(asked.sweep or "")
    if swept in given:
        raise QueryError(
            f"--sweep {asked.sweep} draws with one {swept} after the other, so it takes none: leave it out"
        )
    # Of the points of a sweep over searches the fused one obeys every setting of a search.
    fused = {"by": "hybrid"} if asked.sweep == "by" else {}
    settings = model.settings(**{"batch_size": emoji_draw.BATCH_SIZE, **given, **fused})
    return (_short if asked.is_short else _long)(asked, model, settings, progress=progress, as_json=as_json)


def _short(
    asked: Asked, model: TextToImage, settings: GenerateSettings, *, progress: Progress, as_json: bool
) -> dict[str, Any]:
    from radt.evaluation import emoji_draw
    from radt.evaluation.emoji_draw_sheet import print_table, write_results
    from radt.evaluation.emoji_recognizer import find_recognizer

    emoji_draw.check(model, settings)
    trained = find_recognizer(asked.recognizer)
    with progress("drawing") as on_step:
        report = emoji_draw.evaluate(
            model, n=asked.n, seed=asked.seed, settings=settings, font=asked.font, trained=trained, on_step=on_step
        )
    written = [] if asked.out is None else write_results(report, asked.out)
    if not as_json:
        print_table(report, written)
    return report.to_json()


def _long(
    asked: Asked, model: TextToImage, settings: GenerateSettings, *, progress: Progress, as_json: bool
) -> dict[str, Any]:
    from radt.evaluation import emoji_draw
    from radt.evaluation.emoji_draw_kinds import read_kinds
    from radt.evaluation.emoji_draw_sweep import KindsBench, Sweep, new_entity_models, plan_points, run_sweep
    from radt.evaluation.emoji_draw_sweep_sheet import print_sweep, write_sweep
    from radt.evaluation.emoji_recognizer import EmojiRecognizer
    from radt.evaluation.images_report import need_matplotlib

    if asked.out is not None:
        need_matplotlib()
    emoji_draw.check(model, settings)
    sweep: Sweep = "new-entity" if asked.new_entity else asked.sweep or "arms"
    plan_points(sweep, settings)  # what cannot be swept is refused before any work
    side, _ = model.picture_size(settings)
    bench = KindsBench.prepare(
        EmojiRecognizer.load(asked.recognizer),
        kinds=read_kinds(asked.kinds or "all"),
        n=asked.n,
        seed=asked.seed,
        size=side,
        font=asked.font,
    )
    with tempfile.TemporaryDirectory() as folder, progress("drawing") as on_step:
        models = new_entity_models(bench, model, Path(folder)) if sweep == "new-entity" else None
        report = run_sweep(
            bench,
            model,
            sweep,
            settings,
            out=asked.out,
            seed=asked.seed,
            models=models,
            on_unit=lambda _, done, total: on_step(done, total),
        )
    written = [] if asked.out is None else write_sweep(report, asked.out)
    if not as_json:
        print_sweep(report, written)
    return report.to_json()
