"""`radt demo`: corpus, knowledge base, a query, and entities never trained on, drawn with and without retrieval.

What is already there is used again, so that a second run takes seconds.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from index.errors import QueryError
from index.knowledge_base import KnowledgeBase, Manifest
from radt.bundle import find_bundle
from radt.corpora.emoji import Entity, load_entities, select, write_emoji
from radt.corpora.scenes import PALETTE, benchmark_prompt
from radt.corpora.wording import noun, plural, with_article
from radt.generate import drawn_pictures, neighbor_pictures, subtitle
from radt.neighbors import with_pictures_of
from radt.pipeline import GeneratedImage, TextToImage, file_name
from radt.sheet import Picture, Row, Sheet, write_sheet

if TYPE_CHECKING:
    from index.embedder import ClipEmbedder

Say = Callable[[str], None]
QUERY = "a smiling cat"
QUERY_HITS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoReport:
    """Where everything lies."""

    corpus: Path
    kb: Path
    pictures: Path
    query_page: Path
    sheet_png: Path
    sheet_html: Path

    def to_json(self) -> dict[str, str]:
        """Every path as text."""
        return {name: str(path) for name, path in asdict(self).items()}


def run_demo(
    out: Path,
    *,
    model: str | Path | None = None,
    num_entities: int = 8,
    num_pictures: int = 2,
    k: int | None = None,
    seed: int = 0,
    renditions: int = 4,
    say: Say = lambda line: None,
) -> DemoReport:
    """Do all of it below `out`; `k` is the model's own if None. A missing font or model is a UserError."""
    prompts = held_out_prompts(num_entities)
    folder = find_bundle(model)
    corpus = make_corpus(out / "emoji", renditions, say)
    kb = make_knowledge_base(out / "kb", corpus, folder, say)
    query_page = query(kb, out / "query.html", say)
    pipeline = TextToImage.load(folder, kb=kb)
    k = pipeline.settings().k if k is None else k
    rows: list[list[GeneratedImage]] = []
    started = time.perf_counter()
    for number, prompt in enumerate(prompts):
        rows.append(draw_row(pipeline, prompt, out / "pictures", number=number, n=num_pictures, k=k, seed=seed))
        say(f"drawn {number + 1} of {len(prompts)}: {prompt}")
    swapped = draw_swapped(pipeline, rows, out / "pictures", seed=seed)
    say(f"{len(prompts) * (num_pictures + 2)} pictures in {time.perf_counter() - started:.0f} s")
    png, page = write_sheet(demo_sheet(rows, swapped), out / "sheet.png")
    return DemoReport(
        corpus=corpus, kb=kb.directory, pictures=out / "pictures", query_page=query_page, sheet_png=png, sheet_html=page
    )


def make_corpus(out: Path, renditions: int, say: Say) -> Path:
    """Pictures of every emoji from the installed font."""
    written = write_emoji(out, renditions=renditions)
    state = "already there" if written.shards_kept == written.shards else "drawn"
    say(f"corpus: {written.pairs} pictures of emoji with captions, {state}: {out}")
    return out


def make_knowledge_base(directory: Path, corpus: Path, bundle: Path, say: Say) -> KnowledgeBase:
    """Embed the corpus with the bundle's own encoder; what is embedded already is left alone."""
    from index.embedder import ClipEmbedder
    from index.ingest.build import BuildConfig, build

    embedder = ClipEmbedder.load(str(bundle))
    _drop_if_of_another_model(directory, embedder, say)
    kb = KnowledgeBase.create(directory, embedder)
    report = build(kb, [str(corpus)], BuildConfig())
    say(
        f"knowledge base: {report.pairs_total} pairs, {report.pairs_added} of them new, searcher {report.searcher} "
        f"(recall@10 {report.recall_at_10:.3f}), {report.seconds:.0f} s: {directory}"
    )
    return kb


def _drop_if_of_another_model(directory: Path, embedder: "ClipEmbedder", say: Say) -> None:
    """Vectors of another model are of no use, and all that lies in the demonstration's folder can be made again."""
    if (directory / "kb.json").exists() and Manifest.read(directory).fingerprint != embedder.fingerprint:
        say(f"knowledge base: made by another model, so it is built again: {directory}")
        shutil.rmtree(directory)


def query(kb: KnowledgeBase, page: Path, say: Say) -> Path:
    """Look one description up and show what is found on a page of its own."""
    from index.search.answer import Question, ask
    from index.search.contact_sheet import write_contact_sheet

    answer = ask(kb, Question(label=QUERY, text=QUERY), {"k": QUERY_HITS})
    write_contact_sheet(page, answer)
    names = ", ".join(hit.caption.partition(":")[0] for hit in answer.result.hits[:4])
    say(f"query {QUERY!r} finds {names}, ...: {page}")
    return page


def held_out_prompts(num: int) -> list[str]:
    """Prompts for entities that no training saw, of all groups in turn, chosen by lot; the grounds go in turn too.

    Of four and more, the last two ask for several of one entity, and for two entities. Too many are a QueryError.
    """
    grounds = [name for name in PALETTE if name not in ("white", "black", "gray")]
    entities = by_lot(select(load_entities(), "heldout"))
    if num >= len(entities):
        raise QueryError(f"--entities {num}: the held-out entities are enough for {len(entities) - 1} prompts")
    plain = num if num < 4 else num - 2
    prompts = [
        benchmark_prompt(entity, grounds[place % len(grounds)]).caption for place, entity in enumerate(entities[:plain])
    ]
    if plain < num:
        nouns = [noun(entity) for entity in entities[plain:][:3]]
        several, first, second = sorted(nouns, key=lambda name: plural(name) is None)
        difficult = (
            f"three {plural(several)}" if plural(several) else f"three of: {several}",
            f"{with_article(first)} left of {with_article(second)}",
        )
        for place, things in enumerate(difficult, plain):
            prompts.append(f"{things} on {with_article(grounds[place % len(grounds)])} background")
    return prompts


def by_lot(entities: Sequence[Entity]) -> list[Entity]:
    """One of each group, then another of each; the order within a group is a hash's, the same every time."""
    groups: dict[str, list[Entity]] = {}
    for entity in sorted(entities, key=lambda entity: blake2b(" ".join(entity.codes).encode()).digest()):
        groups.setdefault(entity.group, []).append(entity)
    rounds = zip_longest(*(groups[name] for name in sorted(groups)))
    return [entity for each in rounds for entity in each if entity is not None]


def draw_row(
    pipeline: TextToImage, prompt: str, folder: Path, *, number: int, n: int, k: int, seed: int
) -> list[GeneratedImage]:
    """One picture from the text alone, then `n` with neighbours, the first of them from the same noise."""
    drawn = [*pipeline(prompt, k=0, seed=seed), *pipeline(prompt, k=k, n=n, seed=seed)]
    for place, picture in enumerate(drawn):
        kind = "text-only" if place == 0 else "with-neighbours"
        picture.save(folder / kind / file_name(number, prompt, picture.seed))
    return drawn


def draw_swapped(
    pipeline: TextToImage, rows: Sequence[Sequence[GeneratedImage]], folder: Path, *, seed: int
) -> list[GeneratedImage]:
    """Every prompt once more, from the next row's pictures under its own captions, and from the same noise."""
    drawn = []
    for number, (row, other) in enumerate(zip(rows, [*rows[1:], *rows[:1]], strict=True)):
        references = with_pictures_of(row[-1].neighbors, other[-1].neighbors)
        (picture,) = pipeline(row[-1].prompt, k=len(references), references=references, seed=seed)
        picture.save(folder / "pictures-of-the-next" / file_name(number, picture.prompt, picture.seed))
        drawn.append(picture)
    return drawn


def demo_sheet(rows: Sequence[Sequence[GeneratedImage]], swapped: Sequence[GeneratedImage]) -> Sheet:
    """Prompt, neighbours, without, with, and with another's pictures."""
    return Sheet(
        title="Drawing what was never trained on",
        subtitle=subtitle(rows[0][-1]),
        columns=("Neighbours found", "Without retrieval", "With retrieval", "From the next row's pictures"),
        rows=tuple(
            Row(
                prompt=row[0].prompt,
                note="held out of all training",
                cells=(
                    neighbor_pictures(row[-1]),
                    drawn_pictures(row[:1]),
                    drawn_pictures(row[1:]),
                    (Picture(image=other.image, lines=("under these captions",)),),
                ),
            )
            for row, other in zip(rows, swapped, strict=True)
        ),
    )
