"""Does `--decompose` bring both things a prompt names? Shares of held-out prompts, by search and by rule; markdown.

    radt corpus emoji emoji && radt index build emoji --kb kb
    python tools/bench_decompose.py --kb kb

A prompt is the caption of an emoji scene of held-out entities (`radt.corpora.scenes`): two things in a relation, mostly
on a coloured ground, or one. It is answered when every entity it names is among the first K hits.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np

from index.knowledge_base import KnowledgeBase
from radt.corpora.emoji import Entity, load_entities
from radt.corpora.scenes import Scene, sample_scene

MODES = ("off", "phrases", "terms")
SEARCHES = ("bm25", "hybrid", "clip")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kb", required=True, help="the emoji corpus, built with the shipped model")
    parser.add_argument("-n", type=int, default=300, help="prompts of each kind")
    parser.add_argument("--misses", action="store_true", help="list the prompts of two that bm25 leaves unanswered")
    given = parser.parse_args()
    kb = KnowledgeBase.open(given.kb)
    table = load_entities()
    held_out = [entity for entity in table if entity.held_out]
    two = _scenes(given.n, lambda rng: sample_scene(rng, held_out, kinds={"two": 1.0}))
    one = _scenes(
        given.n, lambda rng: sample_scene(rng, held_out, kinds={"alone": 0.65, "placed": 0.15, "sized": 0.05})
    )
    print(f"{given.n} prompts of each kind, {len(held_out)} held-out entities, {len(kb):,} pairs\n")
    print("| by | decompose | both in 2 | both in 4 | one thing, in 1 | in 2 | in 4 | ms a prompt |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for by in SEARCHES:
        for mode in MODES:
            start = time.perf_counter()
            pairs = _ranks(kb, two, table, by=by, decompose=mode)
            ms = (time.perf_counter() - start) / given.n * 1e3
            alone = _ranks(kb, one, table, by=by, decompose=mode)
            shares = [
                *(f"{(pairs <= k).mean():.3f}" for k in (2, 4)),
                *(f"{(alone <= k).mean():.3f}" for k in (1, 2, 4)),
            ]
            print(f"| {by} | {mode} | {' | '.join(shares)} | {ms:.1f} |")
            if given.misses and by == "bm25" and mode != "off":
                _print_misses(kb, [scene for scene, rank in zip(two, pairs, strict=True) if rank > 2], mode)
                _print_misses(kb, [scene for scene, rank in zip(one, alone, strict=True) if rank > 2], mode)


def _scenes(num: int, draw: Callable[[np.random.Generator], Scene]) -> list[Scene]:
    return [draw(np.random.default_rng([7, i])) for i in range(num)]


def _ranks(kb: KnowledgeBase, scenes: Sequence[Scene], table: Sequence[Entity], **asked: str) -> np.ndarray:
    """For each scene, how many hits it takes until all its entities have been shown; infinite beyond 8."""
    found = kb.retriever.search_many([scene.caption for scene in scenes], k=8, **asked)  # type: ignore[arg-type]
    ranks = []
    for scene, hits in zip(scenes, found, strict=True):
        shown = [_codes(hit.metadata["codes"]) for hit in hits]
        wanted = {" ".join(table[placement.entity].codes) for placement in scene.placements}
        ranks.append(max(shown.index(codes) + 1 if codes in shown else np.inf for codes in wanted))
    return np.array(ranks)


def _codes(codes: str | list[str]) -> str:
    return codes if isinstance(codes, str) else " ".join(codes)


def _print_misses(kb: KnowledgeBase, scenes: Sequence[Scene], mode: str) -> None:
    for scene in scenes:
        result = kb.query(scene.caption, k=2, by="bm25", decompose=mode)
        print(f"    {scene.caption!r} {result.parts} -> {[hit.caption[:40] for hit in result.hits]}")


if __name__ == "__main__":
    main()
