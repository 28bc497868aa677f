"""references: are things that a user brings drawn right, in whatever style, from their own pictures (rows R10, R17)?

A folder holds entities: pictures under one caption, or in one subfolder, two at least. All but one picture of each go
into a knowledge base, the entity is asked for by name on a ground, and drawn with retrieval and without. A picture
shows the entity whose known pictures it is nearest to, among all entities of the folder, by two measures:

    pixels    the figure, cut out of its ground, made square and laid on gray: where it stands, how large it is and on
              which ground does not count
    clip      the whole picture, by the image features of the model's own CLIP

The picture that was left out is judged likewise: that is the most that a measure can give.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from index.config import to_dict
from index.errors import CorpusError, QueryError, UserError
from index.text import one_line
from radt.corpora.scenes import PALETTE
from radt.corpora.wording import with_article
from radt.evaluation.color import border_color, nearest_color
from radt.evaluation.image_set import LeftOut, PictureFile, decode, find_pictures
from radt.evaluation.intervals import wilson
from radt.evaluation.plain_results import share as share_of
from radt.evaluation.ranking import ranks
from radt.evaluation.results import Cell, Picture, Result, Table, typed_command
from radt.pipeline import DrawRequest, OnStep, TextToImage, ignore
from radt.settings import GenerateSettings
from radt.sheet import Picture as SheetPicture
from radt.sheet import Row, Sheet, write_sheet

if TYPE_CHECKING:
    from index.embedder import Embedder

KIND = "references"
BATCH_SIZE = 20
FIGURE_SIDE = 24  # of a figure that is compared
GROUND_REACH = 36  # of 8 bits, in any channel: what differs less from the border's median is ground
GRAY = 128
LARGEST = 1024  # side of a picture that is held, that of the largest preset: photographs would fill the memory
ROWS_A_SHEET = 24
NAMED = 3  # broken pictures that a sentence names
ARMS = ("with_retrieval", "without_retrieval")
MEASURES = ("pixels", "clip")
TITLES = {"with_retrieval": "with retrieval", "without_retrieval": "without", "left_out": "the pictures left out"}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Thing:
    """One entity of the folder: its caption, the pictures that the model may see, and the one that it may not."""

    caption: str
    known: tuple[Image.Image, ...]
    left_out: Image.Image

    @property
    def name(self) -> str:
        """What it is asked for by: the caption up to a colon."""
        return self.caption.partition(":")[0].strip()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Judged:
    """Ranks of the asked things, from 1, by each measure, and the places of the nearest ones."""

    ranks: Mapping[str, Int[np.ndarray, " n"]]
    guesses: Mapping[str, Int[np.ndarray, " n"]]

    def share(self, measure: str, best: int) -> float:
        """How many of the asked things are among the nearest so many."""
        return float((self.ranks[measure] <= best).mean())


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReferencesReport:
    """Everything measured and everything drawn."""

    folder: str
    things: tuple[Thing, ...]
    prompts: tuple[str, ...]
    grounds: tuple[str, ...]
    drawn: Mapping[str, tuple[Image.Image, ...]]  # by arm
    judged: Mapping[str, Judged]  # by arm, and `left_out`
    found: tuple[tuple[tuple[str, Image.Image], ...], ...]  # what retrieval showed: caption and picture
    seconds: Mapping[str, float]
    settings: GenerateSettings
    seed: int
    model: Mapping[str, Any]
    unread: tuple[LeftOut, ...] = ()  # pictures that are broken

    @property
    def n(self) -> int:
        """How many things were asked for, and are told apart."""
        return len(self.things)

    def recall(self) -> float:
        """Of the prompts, those for which a picture of the asked thing was found."""
        rows = zip(self.things, self.found, strict=True)
        return float(np.mean([any(caption == thing.caption for caption, _ in row) for thing, row in rows]))

    def ground_share(self, arm: str) -> float:
        """Of the pictures of an arm, those on the ground that was asked for."""
        measured = [nearest_color(border_color(np.asarray(picture)), PALETTE) for picture in self.drawn[arm]]
        return float(np.mean([one == other for one, other in zip(measured, self.grounds, strict=True)]))

    def to_json(self) -> dict[str, Any]:
        """Shares by arm and measure, each with its 95 % interval."""
        arms: dict[str, Any] = {}
        for arm, judged in self.judged.items():
            shares = {f"{measure}_top{best}": judged.share(measure, best) for measure in MEASURES for best in (1, 5)}
            arms[arm] = {**shares, "intervals": {name: list(wilson(each, self.n)) for name, each in shares.items()}}
        for arm in ARMS:
            arms[arm] |= {"ground_color": self.ground_share(arm), "seconds_per_image": self.seconds[arm] / self.n}
        return {
            "n": self.n,
            **arms,
            "retrieval": {"recall_at_k": self.recall()},
            "settings": {"seed": self.seed, **to_dict(self.settings)},
            "model": dict(self.model),
            "folder": self.folder,
            "unread": [{"name": each.name, "reason": each.reason} for each in self.unread],
            "things": [self._thing(place) for place in range(self.n)],
        }

    def _thing(self, place: int) -> dict[str, Any]:
        """One thing's prompt, and its rank among all by each measure, in each arm."""
        ranks = {
            arm: {measure: int(judged.ranks[measure][place]) for measure in MEASURES}
            for arm, judged in self.judged.items()
        }
        return {"caption": self.things[place].caption, "prompt": self.prompts[place], "ranks": ranks}

    def table(self) -> Table:
        """The figures, as a page and the terminal show them."""
        rows: list[tuple[Cell, ...]] = []
        for arm, judged in self.judged.items():
            shares = [judged.share(measure, best) for measure in MEASURES for best in (1, 5)]
            rows.append((TITLES[arm], *(share_of(each, self.n) for each in shares)))
        columns = ("", "pixels: top-1", "top-5", "CLIP: top-1", "top-5")
        note = (
            f"nearest of {self.n} things; a picture of the asked one was found for {self.recall():.2f} of the prompts; "
            f"ground as asked {self.ground_share(ARMS[0]):.2f} with retrieval{_told_unread(self.unread)}"
        )
        return Table(title=f"Things of {self.folder}", columns=columns, rows=tuple(rows), note=note)


def evaluate_references(
    source: str,
    *,
    model: str | Path | None = None,
    kb: Path | None = None,
    out: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    n: int | None = None,
    seed: int = 0,
    device: str = "auto",
    on_step: OnStep = ignore,
) -> ReferencesReport:
    """Build the knowledge base of a source in `kb`, or for the moment, and draw everything in it once with and without.

    Args:
        source: a folder of pictures with captions, of subfolders, or whatever `radt index build` reads.
        model: the bundle; None is the demonstration model.
        kb: where the knowledge base goes; a folder that is not there yet. None: it vanishes afterwards.
        out: where results are kept; what lies below it is none of the source's pictures.
        settings: changes of the bundle's own.
        n: the first so many things of the source; None is all.
        seed: of the noise; thing i takes seed + i.
        device: auto, cpu or cuda.
        on_step: told (done, total).

    Raises:
        CorpusError: the source has fewer than two things of two pictures.
    """
    things, unread = find_things(find_pictures(source, out=out), n)
    if len(things) < 2:
        raise CorpusError(
            f"{source!r} has {len(things)} things with two pictures or more, and two are needed to tell apart: put "
            f"pictures of one thing under one caption, or into one subfolder{_told_unread(unread)}"
        )
    with TemporaryDirectory() as temporary:
        folder = make_knowledge_base(things, Path(temporary) / "kb" if kb is None else kb, model)
        pipeline = TextToImage.load(model, kb=folder, device=device)
        asked = pipeline.settings(**{"batch_size": BATCH_SIZE, **(settings or {})})
        if asked.k < 1:
            raise QueryError("references compares with and without neighbours, so k must be at least 1, got 0")
        return measure(pipeline, things, asked, source=source, seed=seed, unread=unread, on_step=on_step)


def find_things(pictures: Sequence[PictureFile], n: int | None = None) -> tuple[list[Thing], list[LeftOut]]:
    """Pictures grouped by caption, or by subfolder where they have none; and those looked at that cannot be read.

    Things of one picture are passed over; of the others the first `n`. The last picture of a thing, by name, is the
    one that is left out.
    """
    titles = _folder_titles(pictures)
    groups: dict[str, list[PictureFile]] = {}
    for picture in pictures:
        title = one_line(picture.caption or titles[PurePosixPath(picture.name).parent])
        if title:
            groups.setdefault(title, []).append(picture)
    things: list[Thing] = []
    unread: list[LeftOut] = []
    for caption, files in groups.items():
        if len(files) < 2 or len(things) == n:
            continue
        images = [_decode(file, unread) for file in files]
        readable = [image for image in images if image is not None]
        if len(readable) > 1:
            things.append(Thing(caption=caption, known=tuple(readable[:-1]), left_out=readable[-1]))
    return things, unread


def _folder_titles(pictures: Sequence[PictureFile]) -> dict[PurePosixPath, str]:
    """Each subfolder's name as words, or its whole path where others have the same name; none for the top or a tar."""
    folders = {PurePosixPath(picture.name).parent for picture in pictures}
    names = {folder: "" if folder.suffix == ".tar" else _as_words(folder.name) for folder in folders}
    times = Counter(names.values())
    return {folder: name if not name or times[name] == 1 else _as_words(str(folder)) for folder, name in names.items()}


def _as_words(path: str) -> str:
    return re.sub(r"[/_-]+", " ", path).strip()


def _decode(file: PictureFile, unread: list[LeftOut]) -> Image.Image | None:
    """A picture, no larger than any preset looks at it, or None for a broken one, which is then noted."""
    try:
        image = decode(file.read())
        image.thumbnail((LARGEST, LARGEST))
        return image
    except UserError as error:
        unread.append(LeftOut(name=file.name, reason=str(error)))
        return None


def _told_unread(unread: Sequence[LeftOut]) -> str:
    if not unread:
        return ""
    named = "; ".join(f"{each.name} ({each.reason})" for each in unread[:NAMED])
    more = f"; and {len(unread) - NAMED} more" if len(unread) > NAMED else ""
    return f"; {len(unread)} of the pictures left out, for they cannot be read: {named}{more}"


def make_knowledge_base(things: Sequence[Thing], folder: Path, model: str | Path | None) -> Path:
    """A knowledge base of what may be known, embedded by the model's own CLIP."""
    from index.embedder import ClipEmbedder
    from index.knowledge_base import KnowledgeBase
    from radt.bundle import find_bundle

    kb = KnowledgeBase.create(folder, ClipEmbedder.load(str(find_bundle(model))))
    ids = {added for thing in things for added in kb.add(list(thing.known), thing.caption, dataset=KIND)}
    if len(kb) != len(ids):
        raise CorpusError(f"{folder} holds other pairs than these pictures: choose another --out, or delete it")
    kb.build_search(duplicates=False)
    return folder


def measure(
    pipeline: TextToImage,
    things: Sequence[Thing],
    settings: GenerateSettings,
    *,
    source: str,
    seed: int = 0,
    unread: Sequence[LeftOut] = (),
    on_step: OnStep = ignore,
) -> ReferencesReport:
    """Draw everything with neighbours and without, and judge it. The pipeline has the knowledge base of the things."""
    names = list(PALETTE)
    grounds = [names[int(i)] for i in np.random.default_rng(seed).integers(len(names), size=len(things))]
    prompts = [prompt_for(thing, ground) for thing, ground in zip(things, grounds, strict=True)]
    neighbors = [pipeline.retrieve(prompt, settings=settings) for prompt in prompts]
    drawn: dict[str, tuple[Image.Image, ...]] = {}
    seconds: dict[str, float] = {}
    for place, arm in enumerate(ARMS):
        requests = [
            DrawRequest(prompt=prompt, neighbors=found if arm == "with_retrieval" else (), seed=seed + i)
            for i, (prompt, found) in enumerate(zip(prompts, neighbors, strict=True))
        ]
        start = time.perf_counter()
        pictures = pipeline.draw_many(requests, settings=settings, on_step=_half(on_step, place))
        drawn[arm] = tuple(Image.fromarray(picture.numpy()) for picture in pictures)
        seconds[arm] = time.perf_counter() - start
    judge = Judge(things, pipeline.kb.embedder if pipeline.kb is not None else None)
    judged = {arm: judge(drawn[arm]) for arm in ARMS}
    judged["left_out"] = judge([thing.left_out for thing in things])
    return ReferencesReport(
        folder=Path(source).name,
        things=tuple(things),
        prompts=tuple(prompts),
        grounds=tuple(grounds),
        drawn=drawn,
        judged=judged,
        found=tuple(tuple((each.caption, Image.fromarray(each.pixels.numpy())) for each in row) for row in neighbors),
        seconds=seconds,
        settings=settings,
        seed=seed,
        model={"name": pipeline.name, "digest": pipeline.digest},
        unread=tuple(unread),
    )


def prompt_for(thing: Thing, ground: str) -> str:
    """As in `Zorbo on a blue background`."""
    return f"{thing.name} on {with_article(ground)} background"


class Judge:
    """Ranks things by how near their known pictures are to a picture, by pixels of the figure and by CLIP."""

    def __init__(self, things: Sequence[Thing], embedder: "Embedder | None") -> None:
        assert embedder is not None, "a model without a knowledge base has nothing to embed with"
        self._embedder = embedder
        self._starts = np.cumsum([0, *(len(thing.known) for thing in things[:-1])])
        known = [picture for thing in things for picture in thing.known]
        self._known = {measure: self._features(measure, known) for measure in MEASURES}

    def __call__(self, pictures: Sequence[Image.Image]) -> Judged:
        """Picture i was asked to show thing i. A thing that is as near as the asked one goes before it."""
        places, guesses = {}, {}
        for measure in MEASURES:
            distances = squared_distances(self._features(measure, pictures), self._known[measure])
            nearest = np.minimum.reduceat(distances, self._starts, axis=1)
            places[measure] = ranks(-nearest, np.arange(len(pictures)))
            guesses[measure] = nearest.argmin(axis=1)
        return Judged(ranks=places, guesses=guesses)

    def _features(self, measure: str, pictures: Sequence[Image.Image]) -> Float[np.ndarray, "n d"]:
        if measure == "clip":
            return np.asarray(self._embedder.images(list(pictures)), dtype=np.float64)
        return np.stack([figure(np.asarray(picture.convert("RGB"))).ravel() for picture in pictures])


def figure(picture: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "side side 3"]:
    """The figure of a picture, without its ground, place and size: cut to what is no ground, square, on gray, 24x24.

    A picture that is all ground is all figure.
    """
    mask = is_figure(picture)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    cut = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    alpha = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1, None]
    height, width = cut.shape[:2]
    side = max(height, width)
    square = np.full((side, side, 3), GRAY, dtype=np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = np.where(alpha, cut, np.uint8(GRAY))
    small = Image.fromarray(square).resize((FIGURE_SIDE, FIGURE_SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64)


def is_figure(picture: UInt8[np.ndarray, "h w 3"]) -> Bool[np.ndarray, "h w"]:
    """What is no ground: unlike the median of the border, in rows and columns that have more of it than a speck."""
    differs = np.abs(picture.astype(np.float64) - border_color(picture)).max(axis=2) > GROUND_REACH
    rows, columns = differs.mean(axis=1) > 0.02, differs.mean(axis=0) > 0.02
    mask: Bool[np.ndarray, "h w"] = differs & rows[:, None] & columns[None, :]
    return mask if mask.any() else np.ones_like(mask)


def squared_distances(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
    """Of every row of the one from every row of the other."""
    return np.maximum(0, (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1))


def write_report(report: ReferencesReport, out: Path) -> list[Path]:
    """Write sheets of what was drawn and, last, `references.result.json`. What was written."""
    written: list[Path] = []
    pictures: list[Picture] = []
    for number, start in enumerate(range(0, report.n, ROWS_A_SHEET), 1):
        rows = tuple(_rows(report, range(start, min(start + ROWS_A_SHEET, report.n))))
        title = f"Things of {report.folder}, sheet {number}"
        columns = ("one of its pictures", "found", "with retrieval", "without", "left out")
        sheet = Sheet(title=title, columns=columns, rows=rows, subtitle=f"model {report.model['name']}")
        written += write_sheet(sheet, out / f"references-{number}.png")
        pictures.append(Picture(file=f"references-{number}.png", title=title))
    result = Result(
        kind=KIND,
        title="Things in a style never trained on",
        command=typed_command(),
        facts={"folder": report.folder, "model": report.model["name"], "digest": report.model["digest"], "n": report.n},
        tables=(report.table(),),
        pictures=tuple(pictures),
        data=report.to_json(),
    )
    return [*written, result.save(out)]


def _rows(report: ReferencesReport, places: range) -> Iterator[Row]:
    for place in places:
        thing = report.things[place]
        cells: list[tuple[SheetPicture, ...]] = [(SheetPicture(image=thing.known[0]),)]
        cells.append(tuple(SheetPicture(image=image, lines=(caption,)) for caption, image in report.found[place]))
        for arm in ARMS:
            lines = tuple(_verdict(report, arm, measure, place) for measure in MEASURES)
            cells.append((SheetPicture(image=report.drawn[arm][place], lines=lines),))
        cells.append((SheetPicture(image=thing.left_out),))
        yield Row(prompt=report.prompts[place], cells=tuple(cells), note=thing.caption)


def _verdict(report: ReferencesReport, arm: str, measure: str, place: int) -> str:
    judged = report.judged[arm]
    rank = int(judged.ranks[measure][place])
    return f"{measure}: right" if rank == 1 else f"{measure}: {report.things[judged.guesses[measure][place]].name}"


def _half(on_step: OnStep, place: int) -> Callable[[int, int], None]:
    return lambda done, total: on_step(place * total + done, len(ARMS) * total)
