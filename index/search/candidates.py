"""Candidates: the scored pairs of one query on their way to becoming hits, and what is done to them as lists."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy import ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """Best first. `clip` and `words` are None where not asked for; `part` counts into `labels`, -1 for no part."""

    ids: Int64[ndarray, " n"]
    score: Float64[ndarray, " n"]
    clip: Float64[ndarray, " n"] | None
    words: Float64[ndarray, " n"] | None
    labels: tuple[str, ...] = ()  # parts of the prompt
    part: Int64[ndarray, " n"] | None = None
    is_final: bool = False  # a deeper search would bring none that may become a hit

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, positions: Int64[ndarray, " m"] | Bool[ndarray, " n"]) -> "Candidates":
        """Those at these positions, in their order."""
        return Candidates(
            ids=self.ids[positions],
            score=self.score[positions],
            clip=None if self.clip is None else self.clip[positions],
            words=None if self.words is None else self.words[positions],
            labels=self.labels,
            part=None if self.part is None else self.part[positions],
            is_final=self.is_final,
        )

    def label(self, position: int) -> str | None:
        """The part of the prompt that a candidate answers."""
        return None if self.part is None or self.part[position] < 0 else self.labels[self.part[position]]


def first_of_each(groups: Int64[ndarray, " n"]) -> Bool[ndarray, " n"]:
    """Which positions are the first of their group."""
    _, first = np.unique(groups, return_index=True)
    is_first = np.zeros(len(groups), dtype=bool)
    is_first[first] = True
    return is_first


def interleave(lists: Sequence[Candidates], labels: Sequence[str]) -> Candidates:
    """One list by round robin: the best of every part in the order of the prompt, then the second ones, and so on.

    A pair that several parts found answers the one that ranks it first. Scores stay what each part gave.
    """
    everything = Candidates(
        ids=np.concatenate([each.ids for each in lists]),
        score=np.concatenate([each.score for each in lists]),
        clip=_joined([each.clip for each in lists]),
        words=_joined([each.words for each in lists]),
        labels=tuple(labels),
        part=np.repeat(np.arange(len(lists)), [len(each) for each in lists]),
        is_final=all(each.is_final for each in lists),
    )
    assert everything.part is not None
    rank = np.concatenate([np.arange(len(each)) for each in lists])
    ordered = everything.take(np.lexsort((everything.part, rank)))
    return ordered.take(first_of_each(ordered.ids))


def _joined(scores: Sequence[Float64[ndarray, " _"] | None]) -> Float64[ndarray, " n"] | None:
    """None as soon as one of them is: all parts of a prompt are asked for by the same kind of search."""
    given = [each for each in scores if each is not None]
    return np.concatenate(given) if len(given) == len(scores) else None
