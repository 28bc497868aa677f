"""Each measure of a set of pictures by one extractor: which mathematics, under which title, and what to mind.

`images.py` takes them in turn; `metrics.py` is the mathematics.
"""

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int

from index.atomic import write_bytes
from index.errors import ConfigError, QueryError
from radt.copying import WARN_ABOVE, best_match
from radt.evaluation import metrics
from radt.evaluation.extractors import Extractor, InceptionExtractor, OpenClipExtractor
from radt.evaluation.image_set import DECODING, MeasuredSet, PictureFile, decode
from radt.evaluation.metrics import Score

MEASURES = (
    "fd",
    "kid",
    "cmmd",
    "precision",
    "recall",
    "density",
    "coverage",
    "is",
    "clip-score",
    "r-precision",
    "soa",
    "copies",
)
OF_TWO_SETS = ("fd", "kid", "cmmd", "precision", "recall", "density", "coverage")
MANIFOLD = metrics.NEIGHBORHOODS
OF_TEXTS = ("clip-score", "r-precision")
OF_CLASSES = ("is", "soa")
OF_CAPTIONS = (*OF_TEXTS, "soa")
OF_OPTIONS = {
    "subset_size": ("kid",),
    "subsets": (*OF_TWO_SETS, "is"),
    "candidates": ("r-precision",),
    "copy_limit": ("copies",),
}
NO_REALS = "it compares with real pictures; name them with --real"
NO_ENCODER = "it needs an image-text encoder: name one as --extractor open_clip:NAME_OR_FOLDER"
NO_CLASSIFIER = "an image-text encoder is no classifier; inception and most timm models are"
NOTHING_TO_COPY = "no picture says what its neighbours were, and there are no reals; name them with --real"
NOT_NAMED = "--metrics leaves it out"
NO_CAPTION = "no picture has a caption: `radt generate` leaves prompts in its PNG, or give --captions FILE"
FEW_SUBSETS = 25  # of what takes seconds
SLOW = ("fd", *MANIFOLD)
COPY_CANDIDATES = 5  # reals nearest by features, compared pixel by pixel
SIMILARITIES = "similarities.json"
COMPARING = 1  # to be raised when radt/copying.py measures otherwise: similarities that are kept are known by it
LOWER_IS_BETTER = ("fd", "kid", "cmmd", "copies")
SHARES = ("precision", "recall", "coverage", "r-precision", "soa", "copies")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What is measured and how. `measures` None: all that can be. Others None: by the number of pictures."""

    measures: tuple[str, ...] | None = None
    subset_size: int | None = None  # of a kernel distance
    subsets: int | None = None  # that an error is taken over; 100, or 25 of what takes seconds
    candidates: int | None = None  # of an R-precision; 100, or all captions where they are fewer
    copy_limit: float | None = None  # above which a picture is a copy; WARN_ABOVE
    seed: int = 0

    def __post_init__(self) -> None:
        if self.measures is not None and not self.measures:
            raise ConfigError(f"no measure is named: give some of {', '.join(MEASURES)}, or leave --metrics out")
        for name in self.measures or ():
            if name not in MEASURES:
                near = difflib.get_close_matches(name, MEASURES, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ConfigError(f"there is no measure {name!r}: {hint}It is one of {', '.join(MEASURES)}")
        if self.subsets is not None and self.subsets < 2:
            raise ConfigError(f"an error is taken over 2 or more subsets, got {self.subsets}")
        if self.subset_size is not None and self.subset_size < 2:
            raise metrics.too_few_for_subsets(self.subset_size, 2)
        if self.candidates is not None and self.candidates < 2:
            raise metrics.too_few_captions(self.candidates, 2)
        if self.copy_limit is not None and not 0 <= self.copy_limit <= 1:
            raise ConfigError(f"the limit of a copy is a similarity between 0 and 1, got {self.copy_limit}")

    def subsets_of(self, measure: str) -> int:
        """Over how many subsets the error of a measure is taken."""
        return self.subsets or (FEW_SUBSETS if measure in SLOW else metrics.SUBSETS)

    def wants(self, measure: str) -> bool:
        """Whether it is to be measured if it can be."""
        return self.measures is None or measure in self.measures

    def asks_for(self, measure: str) -> bool:
        """Whether it was named, so that it is an error where it cannot be measured."""
        return self.measures is not None and measure in self.measures


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One score of `n` pictures. `extractor` is what it is over, empty for none; `notes` say what to mind.

    The interval of SOA-C rests on classes: `score.n` counts those.
    """

    measure: str
    title: str
    score: Score
    n: int
    n_real: int | None = None
    extractor: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sets:
    """What one extractor made of the pictures and the reals."""

    extractor: Extractor
    pictures: MeasuredSet
    reals: MeasuredSet | None
    options: Options
    cache: Path | None = None
    of_manifold: dict[str, Score] = field(default_factory=dict)  # all four, once they are known


class NotMeasurableError(Exception):
    """Why a measure cannot be taken of these pictures: an error if it was named, else a line below the table."""


def refuse_early(
    options: Options,
    pictures: Sequence[PictureFile],
    reals: Sequence[PictureFile] | None,
    extractors: Sequence[Extractor],
) -> None:
    """QueryError for a named measure that will be impossible, before hours go into features.

    ConfigError for an option of measures that will not be taken, and for a size of subsets or a number of candidates
    that the pictures are too few for.
    """
    impossible = _impossible(pictures, reals, extractors)
    for measure, reason in impossible.items():
        if options.asks_for(measure):
            raise QueryError(f"{measure} cannot be measured: {reason}")
    _refuse_unused(options, impossible)
    if reals is not None and options.subset_size is not None:
        fewest = min(len(pictures), len(reals))
        if options.subset_size > fewest >= 2:
            raise metrics.too_few_for_subsets(options.subset_size, fewest)
    if options.candidates is not None:
        different = len({picture.caption for picture in pictures if picture.caption})
        if options.candidates > different >= 2:
            raise metrics.too_few_captions(options.candidates, different)


def _impossible(
    pictures: Sequence[PictureFile], reals: Sequence[PictureFile] | None, extractors: Sequence[Extractor]
) -> dict[str, str]:
    """The measures that certainly cannot be taken, with the first reason of each."""
    encoders = [isinstance(each, OpenClipExtractor) for each in extractors]
    lacks = {
        NO_REALS: reals is None,
        NO_ENCODER: not any(encoders),
        NO_CAPTION: not any(picture.caption for picture in pictures),
        NO_CLASSIFIER: all(encoders),
        NOTHING_TO_COPY: reals is None and all(picture.copy_similarity is None for picture in pictures),
    }
    needs: dict[str, tuple[str, ...]] = dict.fromkeys(OF_TWO_SETS, (NO_REALS,))
    needs.update(dict.fromkeys(OF_TEXTS, (NO_ENCODER, NO_CAPTION)))
    needs.update(dict.fromkeys(OF_CLASSES, (NO_CLASSIFIER,)), copies=(NOTHING_TO_COPY,))
    reasons = {measure: [reason for reason in needed if lacks[reason]] for measure, needed in needs.items()}
    return {measure: lacking[0] for measure, lacking in reasons.items() if lacking}


def _refuse_unused(options: Options, impossible: Mapping[str, str]) -> None:
    """ConfigError for an option that was given, where no measure is taken that heeds it."""
    for option, measures in OF_OPTIONS.items():
        reasons = [impossible.get(each, "") if options.wants(each) else NOT_NAMED for each in measures]
        if getattr(options, option) is not None and all(reasons):
            raise ConfigError(
                f"--{option.replace('_', '-')} has no effect without {' or '.join(measures)}: "
                f"{'; '.join(dict.fromkeys(reasons))}"
            )


def _both(sets: Sets, least: int) -> tuple[np.ndarray, np.ndarray]:
    if sets.reals is None:
        raise NotMeasurableError(NO_REALS)
    fewest = min(len(sets.pictures.pictures), len(sets.reals.pictures))
    if fewest < least:
        raise NotMeasurableError(f"it needs at least {least} pictures in each set, and the smaller has {fewest}")
    return sets.pictures.features, sets.reals.features


def _row(measure: str, title: str, score: Score, sets: Sets, *, n: int | None = None, notes: Sequence[str] = ()) -> Row:
    return Row(
        measure=measure,
        title=title,
        score=score,
        n=len(sets.pictures.pictures) if n is None else n,
        n_real=len(sets.reals.pictures) if measure in OF_TWO_SETS and sets.reals is not None else None,
        extractor=sets.extractor.name,
        notes=tuple(notes),
    )


def _is_inception(sets: Sets) -> bool:
    """Whether it is the one network that FID, KID and the inception score are named after."""
    return isinstance(sets.extractor, InceptionExtractor) and sets.extractor.is_published


def _frechet(measure: str, sets: Sets) -> list[Row]:
    a, b = _both(sets, 2)
    score = metrics.frechet_score(a, b, subsets=sets.options.subsets_of(measure), seed=sets.options.seed)
    title = "FID" if _is_inception(sets) else "FD"
    fewest, width = min(len(a), len(b)), sets.extractor.width
    notes = []
    if fewest < width:
        half = "" if score.at_half is None else f", and {score.at_half:.4g} over half as many"
        notes.append(
            f"N too small: {fewest} pictures for {width} features{half}; it would fall further with more, so compare "
            "it at the same N only, and rather by KID or CMMD"
        )
    return [_row(measure, title, score, sets, notes=notes)]


def _kernel(measure: str, sets: Sets) -> list[Row]:
    a, b = _both(sets, 2)
    options = sets.options
    score = metrics.kernel_distance(
        a, b, subset_size=options.subset_size, subsets=options.subsets_of(measure), seed=options.seed
    )
    return [_row(measure, "KID" if _is_inception(sets) else "KD", score, sets)]


def _gaussian(measure: str, sets: Sets) -> list[Row]:
    a, b = _both(sets, 1)
    score = metrics.gaussian_mmd_score(a, b, subsets=sets.options.subsets_of(measure), seed=sets.options.seed)
    if isinstance(sets.extractor, OpenClipExtractor):
        return [_row(measure, "CMMD" if sets.extractor.is_published else "MMD", score, sets)]
    note = f"the kernel's width of {metrics.CMMD_SIGMA:g} is meant for features of length 1, as CLIP's are"
    return [_row(measure, "MMD", score, sets, notes=[note])]


def _manifold(measure: str, sets: Sets) -> list[Row]:
    a, b = _both(sets, metrics.LEAST_OF_BALLS)
    if not sets.of_manifold:
        subsets, seed = sets.options.subsets_of(measure), sets.options.seed
        sets.of_manifold.update(metrics.neighborhood_scores(a, b, subsets=subsets, seed=seed))
    is_lopsided = measure in ("recall", "coverage") and 2 * len(a) < len(b)
    notes = [f"{len(a)} pictures beside {len(b)} reals: give as many of both"] if is_lopsided else []
    return [_row(measure, measure, sets.of_manifold[measure], sets, notes=notes)]


def _inception_score(measure: str, sets: Sets) -> list[Row]:
    logits = sets.pictures.logits
    if logits is None:
        raise NotMeasurableError(f"{sets.extractor.name} is no classifier; inception and most timm models are")
    if len(logits) < 2:
        raise NotMeasurableError("one picture has no diversity")
    options = sets.options
    score = metrics.subset_score(
        metrics.inception_score, (logits,), subsets=options.subsets_of(measure), seed=options.seed, floor=1.0
    )
    title = "inception score" if _is_inception(sets) else "classifier score"
    classes = logits.shape[1]
    notes = [f"N too small: {len(logits)} pictures for {classes} classes"] if len(logits) < classes else []
    return [_row(measure, title, score, sets, notes=notes)]


def _captioned(sets: Sets) -> tuple[OpenClipExtractor, Int[np.ndarray, " n"], list[str]]:
    """The encoder, which pictures have captions, and those."""
    if not isinstance(sets.extractor, OpenClipExtractor):
        raise NotMeasurableError(NO_ENCODER)
    captions = [picture.caption for picture in sets.pictures.pictures]
    places = np.array([place for place, caption in enumerate(captions) if caption], np.int64)
    if not len(places):
        raise NotMeasurableError(NO_CAPTION)
    return sets.extractor, places, [caption for caption in captions if caption]


def _text_notes(sets: Sets, count: int) -> list[str]:
    notes, pictures, extractor = [], sets.pictures.pictures, sets.extractor
    encoder = extractor if isinstance(extractor, OpenClipExtractor) else None
    if encoder and any(picture.encoder == encoder.fingerprint for picture in pictures):
        notes.append("not independent: the model looked its prompts up with this very encoder")
    if encoder and encoder.bundle and any(picture.model == encoder.bundle for picture in pictures):
        notes.append("not independent: the model reads its prompts with this very encoder")
    missing = len(sets.pictures.pictures) - count
    return [*notes, f"{missing} pictures have no caption"] if missing else notes


def _clip_score(measure: str, sets: Sets) -> list[Row]:
    encoder, places, captions = _captioned(sets)
    values = metrics.clip_scores(sets.pictures.features[places], encoder.texts(captions))
    score = metrics.mean_score(values, seed=sets.options.seed)
    return [_row(measure, "CLIP score", score, sets, n=len(places), notes=_text_notes(sets, len(places)))]


def _r_precision(measure: str, sets: Sets) -> list[Row]:
    encoder, places, captions = _captioned(sets)
    different = sorted(set(captions))
    if len(different) < 2:
        raise NotMeasurableError("it needs two different captions or more")
    asked = sets.options.candidates
    candidates = min(metrics.CANDIDATES, len(different)) if asked is None else asked
    own = np.array([different.index(caption) for caption in captions])
    hits = metrics.r_precision_hits(
        sets.pictures.features[places],
        encoder.texts(different),
        own,
        candidates=candidates,
        seed=sets.options.seed,
    )
    notes = _text_notes(sets, len(places))
    if candidates < metrics.CANDIDATES:
        notes.append(f"easier than among {metrics.CANDIDATES}: there are {len(different)} different captions")
    title = f"R-precision of {candidates}"
    return [_row(measure, title, metrics.mean_score(hits), sets, n=len(places), notes=notes)]


def _object_accuracy(measure: str, sets: Sets) -> list[Row]:
    logits, extractor = sets.pictures.logits, sets.extractor
    if logits is None:
        raise NotMeasurableError(f"{extractor.name} is no classifier")
    words, numbers = extractor.class_words, extractor.class_numbers
    if not numbers:
        raise NotMeasurableError(
            f"nothing says what the {logits.shape[1]:,} classes of {extractor.name} are: name an extractor that knows "
            "its own, such as a timm model of ImageNet"
        )
    asked = [asked_class(picture, words, numbers) for picture in sets.pictures.pictures]
    places = [place for place, each in enumerate(asked) if each is not None]
    if not places:
        raise NotMeasurableError(
            f"no caption names a class that {extractor.name} knows; give a `label` to each picture in --captions"
        )
    classes = np.array([each for each in asked if each is not None])
    answers = logits[places].argmax(axis=1)[:, None]
    found = metrics.object_accuracy(classes, answers, seed=sets.options.seed)
    missing = len(asked) - len(places)
    notes = [f"{missing} pictures ask for no class that it knows"] if missing else []
    if not all(sets.pictures.pictures[place].label for place in places):
        notes.append("classes are read off captions by their words: `label` in --captions says them surely")
    return [
        _row(measure, "SOA-I", found.by_picture, sets, n=len(places), notes=notes),
        _row(measure, "SOA-C", found.by_class, sets, n=len(places), notes=[f"over {found.by_class.n} classes", *notes]),
    ]


def asked_class(picture: PictureFile, words: Mapping[str, int], numbers: Mapping[int, int]) -> int | None:
    """The column of the class that a picture should show: by its label, a name or a number, else by its caption.

    `numbers` says which column a number means: places in ImageNet or in the names of a timm model, class ids of emoji.

    Of the names that stand in the caption as whole words the first counts, the longest of those that begin there; Hinz
    et al. 2022 choose captions by words, too. Words mislead: an orange background is no orange. NotMeasurableError for
    a label that is neither.
    """
    if picture.label is not None:
        if picture.label.lower() in words:
            return words[picture.label.lower()]
        if picture.label.isascii() and picture.label.isdigit() and int(picture.label) in numbers:
            return numbers[int(picture.label)]
        raise NotMeasurableError(
            f"{picture.name!r} is labelled {picture.label!r}, which is neither the name nor the number of a class that "
            "this extractor knows"
        )
    said = _spaced(picture.caption or "")
    places = {name: said.find(_spaced(name)) for name in words}
    named = [name for name, place in places.items() if place >= 0]
    return words[min(named, key=lambda name: (places[name], -len(name)))] if named else None


@lru_cache(16_384)  # of thousands of names, asked of every caption
def _spaced(text: str) -> str:
    """Its words in small letters, a blank around each."""
    words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
    return f" {' '.join(words)} "


# Copies


def _copies(measure: str, sets: Sets) -> list[Row]:
    """Shares of pictures that are nearly their own neighbour, and nearly a real."""
    rows: list[Row] = []
    limit = WARN_ABOVE if sets.options.copy_limit is None else sets.options.copy_limit
    own = [each.copy_similarity for each in sets.pictures.pictures if each.copy_similarity is not None]
    if own:
        score = metrics.mean_score(np.array(own) > limit)
        note = f"more like a neighbour it was drawn from than {limit:g}, as radt/copying.py measures it"
        rows.append(Row(measure=measure, title="copy rate, neighbours", score=score, n=len(own), notes=(note,)))
    if sets.reals is not None:
        similarities = real_similarities(sets.pictures, sets.reals, sets.cache)
        rows.append(
            Row(
                measure=measure,
                title="copy rate, reals",
                score=metrics.mean_score(similarities > limit),
                n=len(similarities),
                n_real=len(sets.reals.pictures),
                extractor=sets.extractor.name,
                notes=(f"more like one of the {COPY_CANDIDATES} reals nearest by these features than {limit:g}",),
            )
        )
    if not rows:
        raise NotMeasurableError(NOTHING_TO_COPY)
    return rows


def real_similarities(pictures: MeasuredSet, reals: MeasuredSet, cache: Path | None) -> Float64[np.ndarray, " n"]:
    """The largest similarity (radt/copying.py) of each picture to one of the reals nearest by features."""
    from radt.neighbors import to_rgb8

    path = None if cache is None else cache / SIMILARITIES
    known = _read_similarities(path)
    nearest = metrics.nearest_rows(pictures.features, reals.features, COPY_CANDIDATES)
    best = np.zeros(len(nearest))
    for place, rows in enumerate(nearest):
        picture = None
        for row in rows.tolist():
            pair = f"{pictures.digests[place]} {reals.digests[row]}"
            if pair not in known:
                picture = picture or decode(pictures.pictures[place].read())
                size = picture.height, picture.width
                match = best_match(to_rgb8(picture, size), to_rgb8(decode(reals.pictures[row].read()), size))
                known[pair] = match.similarity
            best[place] = max(best[place], known[pair])
        if path is not None and picture is not None and place % 50 == 49:
            _write_similarities(path, known)
    if path is not None:
        _write_similarities(path, known)
    return best


def _read_similarities(path: Path | None) -> dict[str, float]:
    try:
        kept = {} if path is None else json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    is_ours = isinstance(kept, dict) and kept.get("made_by") == [DECODING, COMPARING]
    return kept["similarities"] if is_ours else {}


def _write_similarities(path: Path, known: Mapping[str, float]) -> None:
    write_bytes(path, json.dumps({"made_by": [DECODING, COMPARING], "similarities": known}).encode())


BY_NAME: Mapping[str, Callable[[str, Sets], list[Row]]] = {
    "fd": _frechet,
    "kid": _kernel,
    "cmmd": _gaussian,
    **dict.fromkeys(MANIFOLD, _manifold),
    "is": _inception_score,
    "clip-score": _clip_score,
    "r-precision": _r_precision,
    "soa": _object_accuracy,
    "copies": _copies,
}
